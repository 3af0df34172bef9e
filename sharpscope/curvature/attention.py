"""Attention whose second derivative is one kernel, or eleven small products, instead of some forty.

With S = scale q k', P = softmax(S) and output P v, the gradients for a cotangent g are

    dP = g v',  T = dP - rows(P dP),  dS = P T,  dq = scale dS k,  dk = scale dS' q,  dv = P' g

where a product of two matrices of one shape is taken entry by entry and rows() sums over a row. Their cotangents
a, b, c come back through

    D = scale (a k' + q b'),  U = D - rows(P D),  E = P U,  F = T U + g c',  W = P (F - rows(P F))

as E v + P c for g, E' g for v, scale (W k + dS b) for q and scale (W' q + dS' a) for k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sharpscope.curvature.fusion import Fused, kernels, wide
from sharpscope.curvature.passes import leave, left, unheard

TOKENS, WIDTHS = 64, (16, 32, 64)  # largest number of tokens, and widths of a head, that the kernel takes


def _centred(p: Tensor, dp: Tensor) -> Tensor:
    wide_p, wide_dp = wide(p), wide(dp)
    return (wide_dp - (wide_p * wide_dp).sum(-1, keepdim=True)).to(p.dtype)


def _slopes(p: Tensor, dp: Tensor) -> Tensor:
    return (wide(p) * (wide(dp) - (wide(p) * wide(dp)).sum(-1, keepdim=True))).to(p.dtype)


def _bends(p: Tensor, t: Tensor, d: Tensor, gc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return dS, E and W of the module's docstring."""
    dtype = p.dtype
    p, t, d, gc = wide(p), wide(t), wide(d), wide(gc)
    u = d - (p * d).sum(-1, keepdim=True)
    f = t * u + gc
    ds, e, w = p * t, p * u, p * (f - (p * f).sum(-1, keepdim=True))
    return ds.to(dtype), e.to(dtype), w.to(dtype)


_centre, _slope, _bend = Fused(_centred, axes=1), Fused(_slopes, axes=1), Fused(_bends, axes=1)


def _kernels(q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Return the module of Triton kernels if they take these tensors."""
    same = q.shape == k.shape == v.shape and q.dim() == 4 and q.shape[-2] <= TOKENS and q.shape[-1] in WIDTHS
    return kernels(q) if same else None


def _in_kernel(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, more: tuple[Tensor, ...] | None, scale: float
) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = _kernels(q, k, v).slopes(g, q, k, v, more, scale)
    return found


class _Slope(torch.autograd.Function):
    """``dq, dk, dv`` of the attention that the node is; what is left to that is added."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        p: Tensor | None,
        node: Any,
        more: tuple[Tensor, ...] | None,
    ) -> tuple[Tensor, ...]:
        ctx.node = node
        if p is None:
            ctx.save_for_backward(g, q, k, v)
            return _in_kernel(g, q, k, v, more, node.scale)
        g = g.contiguous()  # read several times
        t = _centre(p, torch.bmm(g, v.mT))
        ctx.save_for_backward(g, q, k, v, p, t)
        return _gradients(g, q, k, p, p * t, more, node.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor | None, ...]:
        g, q, k, v, *known = ctx.saved_tensors
        scale = ctx.node.scale
        if not known:
            by_g, *rest = _kernels(q, k, v).bends(a, b, c, g, q, k, v, scale)
            return by_g, *leave(ctx.node, *rest), None, None, None
        p, t = known
        a, b, c = (tensor.contiguous() for tensor in (a, b, c))
        ds, e, w = _bend(p, t, _sum(torch.bmm(a, k.mT), q, b.mT).mul_(scale), torch.bmm(g, c.mT))
        by_q, by_k = _sum(torch.bmm(w, k), ds, b).mul_(scale), _sum(torch.bmm(w.mT, q), ds.mT, a).mul_(scale)
        return _sum(torch.bmm(e, v), p, c), *leave(ctx.node, by_q, by_k, torch.bmm(e.mT, g)), None, None, None


def _sum(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the total with the products of a and b added in place."""
    return total.baddbmm_(a, b)


def _gradients(
    g: Tensor, q: Tensor, k: Tensor, p: Tensor, ds: Tensor, more: tuple[Tensor, ...] | None, scale: float
) -> tuple[Tensor, ...]:
    found = torch.bmm(ds, k).mul_(scale), torch.bmm(ds.mT, q).mul_(scale), torch.bmm(p.mT, g)
    return found if more is None else tuple(own.add_(part) for own, part in zip(found, more, strict=True))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        if triton := _kernels(q, k, v):
            ctx.save_for_backward(q, k, v, None)
            found: Tensor = triton.attention(q, k, v, scale)
            return found
        p = torch.softmax(wide(torch.bmm(q, k.mT)) * scale, -1).to(q.dtype)
        ctx.save_for_backward(q, k, v, p)
        return torch.bmm(p, v)

    @staticmethod
    @unheard
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_Slope.apply(g, q, k, v, p, ctx, left(ctx)), None  # type: ignore[no-untyped-call]
        # A product's way down, which nothing differentiates.
        if p is None:
            return *_in_kernel(g, q, k, v, left(ctx), ctx.scale), None
        g = g.contiguous()
        return *_gradients(g, q, k, p, _slope(p, torch.bmm(g, v.mT)), left(ctx), ctx.scale), None


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return ``softmax(scale q k') v``, shapes (..., tokens, width), differentiable twice."""
    if _kernels(q, k, v):
        found: Tensor = _Attention.apply(q, k, v, scale)  # type: ignore[no-untyped-call]
        return found
    shape = q.shape[:-2]
    q, k, v = (tensor.reshape(-1, *tensor.shape[-2:]) for tensor in (q, k, v))  # else every product copies them
    found = _Attention.apply(q, k, v, scale)  # type: ignore[no-untyped-call]
    return found.view(*shape, *found.shape[1:])


def attention_of_groups(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return :func:`attention` with groups along a first axis more."""
    found = attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), scale)
    return found.view(*q.shape[:2], *found.shape[1:])


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, float] | None:
    """Return the arguments of :func:`attention` if torch's ``scaled_dot_product_attention`` is asked for just that."""
    special = attn_mask is not None or dropout_p or is_causal or enable_gqa
    if special or not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        return None
    if not query.dtype == key.dtype == value.dtype:
        return None
    return query, key, value, query.shape[-1] ** -0.5 if scale is None else scale
