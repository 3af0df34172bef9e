"""Linear layers of groups of examples, each group with a view of the same weights, differentiable twice.

With x ``(groups, rows, in)`` and W ``(groups, out, in)``: output x W', and for a cotangent g the gradients g W, g' x
and the sum of g over rows. Where all groups have one matrix in memory, a product with it is one for all rows; torch's
own derivatives take one a group, which leaves a GPU with small ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sharpscope.curvature.half import HALF, over_rows, stored
from sharpscope.curvature.passes import goes_on, unheard


def _times(a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix products of the groups."""
    if b.stride(0) == 0:
        return (a.flatten(0, 1) @ b[0]).view(*a.shape[:2], -1)
    return torch.bmm(a, b)


def _slopes(g: Tensor, x: Tensor, weight: Tensor, like: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    by_x, by_weight, by_bias = wanted
    return (
        _times(g, weight) if by_x else None,
        over_rows(g.mT, x, like) if by_weight else None,
        g.sum(1, keepdim=True, dtype=like.dtype) if by_bias else None,
    )


class _LinearSlope(torch.autograd.Function):
    """``g W, g' x``, and the sum of g over rows; W as it is and as it is stored beside x."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, beside: Tensor, wanted: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(g, x, weight, beside)
        ctx.set_materialize_grads(False)
        return _slopes(g, x, beside, weight, wanted)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, c: Tensor | None, p: Tensor | None, q: Tensor | None) -> tuple[Tensor | None, ...]:
        g, x, weight, beside = ctx.saved_tensors
        by_g = None if c is None else _times(c, beside.mT)
        if p is not None:
            p = stored(p, x)
            by_g = _times(x, p.mT) if by_g is None else torch.baddbmm(by_g, x, p.mT)
        if q is not None:
            by_g = (q.expand_as(g) if by_g is None else by_g + q).to(g.dtype)
        by_x = _times(g, p) if p is not None and goes_on(ctx, 1) else None
        by_weight = over_rows(g.mT, c, weight) if c is not None and goes_on(ctx, 2) else None
        return by_g, by_x, by_weight, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, peaks: list[Tensor] | None) -> Tensor:
        beside, bias = stored(weight, x), None if bias is None else stored(bias, x)
        ctx.save_for_backward(x, weight, beside)
        ctx.peaks = peaks
        if bias is None:
            return _times(x, beside.mT)
        if beside.stride(0) == bias.stride(0) == 0:
            return torch.addmm(bias[0, 0], x.flatten(0, 1), beside[0].mT).view(*x.shape[:2], -1)
        return torch.baddbmm(bias, x, beside.mT)

    @staticmethod
    @unheard
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, beside = ctx.saved_tensors
        wanted = tuple(goes_on(ctx, place) for place in range(3))
        if not torch.is_grad_enabled():  # a product's way down, which nothing differentiates
            return *_slopes(g, x, beside, weight, wanted), None
        if ctx.peaks is not None and g.dtype == HALF:
            ctx.peaks.append(torch.linalg.vector_norm(g.detach(), torch.inf))
        found: tuple[Tensor | None, ...] = _LinearSlope.apply(g, x, weight, beside, wanted)  # type: ignore[no-untyped-call]
        return *found, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, peaks: list[Tensor] | None = None) -> Tensor:
    """Return the layer's output; the first axis of x, weight ``(groups, out, in)`` and bias counts the groups.

    Where x is float16, so are output and cotangents, and the largest entry of these is added to the peaks.
    """
    groups = len(weight)
    rows = x.reshape(groups, -1, x.shape[-1])
    found: Tensor = _Linear.apply(rows, weight, None if bias is None else bias.unsqueeze(1), peaks)  # type: ignore[no-untyped-call]
    return found.view(*x.shape[:-1], -1)
