"""LayerNorm whose second derivative is one pass over memory instead of two dozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sharpscope.curvature.fusion import Fused, keeps, kernels
from sharpscope.curvature.passes import goes_on, leave, left, unheard


def _projected(u: Tensor, unit: Tensor, rate: Tensor) -> Tensor:
    """Return the derivative of normalisation, a symmetric matrix, times u."""
    return rate * (u - u.mean(-1, keepdim=True) - unit * (u * unit).mean(-1, keepdim=True))


def _slopes(g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rate: Tensor) -> Tensor:
    return _projected(g * weight, (x - mean) * rate, rate)


def _bends(
    c: Tensor, p: Tensor, q: Tensor, g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rate: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the derivatives by g and x; c, p, q as in `_NormSlope`."""
    unit, a = (x - mean) * rate, g * weight
    mean_c, mean_a = (c * unit).mean(-1, keepdim=True), (a * unit).mean(-1, keepdim=True)
    whole = (c * a).mean(-1, keepdim=True) - c.mean(-1, keepdim=True) * a.mean(-1, keepdim=True) - mean_c * mean_a
    by_x = _projected(g * p - rate * (c * mean_a + a * mean_c), unit, rate) - unit * rate * rate * whole
    return weight * _projected(c, unit, rate) + unit * p + q, by_x


def _weight_bends(c: Tensor, g: Tensor, x: Tensor, mean: Tensor, rate: Tensor) -> Tensor:
    """Return the derivative by the weight before summing over rows."""
    return g * _projected(c, (x - mean) * rate, rate)


_fused_slopes, _fused_bends, _norm_weight_bend = Fused(_slopes), Fused(_bends), Fused(_weight_bends, axes=1)
WIDEST = 8192  # row that a kernel holds


def _norm_slope(
    g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rate: Tensor, more: tuple[Tensor, ...] | None
) -> Tensor:
    if (triton := kernels(g, x, weight)) and x.shape[-1] <= WIDEST:
        found: Tensor = triton.norm_slope(g, x, weight, mean, rate, more)
    else:
        found = (_along if keeps(g) else _fused_slopes)(g, x, weight, mean, rate)
        found = found if more is None else found.add_(*more)
    return found


def _norm_bend(c: Tensor, p: Tensor | None, q: Tensor | None, *known: Tensor) -> tuple[Tensor, Tensor]:
    if (triton := kernels(c, *known)) and c.shape[-1] <= WIDEST:
        found: tuple[Tensor, Tensor] = triton.norm_bend(c, p, q, *known)
    else:
        p, q = (torch.zeros_like(known[2]) if part is None else part for part in (p, q))
        by_g, by_x = _fused_bends(c, p, q, *known)
        found = by_g.to(known[0].dtype), by_x
    return found


def _along(u: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rate: Tensor) -> Tensor:
    """Return the derivative of normalisation times u, or u weighted, on a CPU."""
    if weight is not None:
        if len(weight) > 1 and weight.stride(0) > 0:  # groups with weights that are computed
            u, weight = u * weight, None
        else:
            weight = weight[0, 0].contiguous()
    needed = [True, False, False]
    found: Tensor = torch.ops.aten.native_layer_norm_backward(u, x, x.shape[-1:], mean, rate, weight, None, needed)[0]
    return found


def _rows(tensor: Tensor) -> Tensor:
    """Return the sums over all axes but the first and the last."""
    return tensor.sum(1, keepdim=True, dtype=torch.float32 if tensor.dtype == torch.float16 else None)


def _sums(g: Tensor, x: Tensor, mean: Tensor, rate: Tensor, wanted: tuple[bool, bool]) -> tuple[Tensor | None, ...]:
    """Return the gradients by weight and bias."""
    return _rows(g * ((x - mean) * rate)) if wanted[0] else None, _rows(g) if wanted[1] else None


class _NormSlope(torch.autograd.Function):
    """The three gradients of an affine LayerNorm, the node, as functions of g, x and the weight.

    With x' = (x - mean) * rate and cotangents c, p, q of the three: the sum over rows of
    ``c . rate (a - mean a - x' mean(a x')) + g . (x' p) + g . q`` with ``a = g weight`` is differentiated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        weight: Tensor,
        mean: Tensor,
        rate: Tensor,
        node: Any,
        more: tuple[Tensor, ...] | None,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.node = node
        if not keeps(g):
            ctx.save_for_backward(g, x, weight, mean, rate)
            return _norm_slope(g, x, weight, mean, rate, more), *_sums(g, x, mean, rate, wanted)
        slope = _norm_slope(g, x, weight, mean, rate, None)
        unit = (x - mean).mul_(-rate * rate)  # u of `_kept_bend`
        tilt = (g * weight * unit).mean(-1, keepdim=True)
        ctx.save_for_backward(g, x, weight, mean, rate, slope, unit, tilt)
        return slope if more is None else slope + more[0], *_sums(g, x, mean, rate, wanted)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, c: Tensor | None, p: Tensor | None, q: Tensor | None) -> tuple[Tensor | None, ...]:
        g, x, weight, mean, rate, *known = ctx.saved_tensors
        c = torch.zeros_like(x) if c is None else c
        by_g, by_x = (_kept_bend if known else _norm_bend)(c, p, q, g, x, weight, mean, rate, *known)
        # A block's product does not ask for it in the layers above, and sums over rows are slow.
        by_weight = _rows(_norm_weight_bend(c, g, x, mean, rate)) if goes_on(ctx, 2) else None
        return by_g, *leave(ctx.node, by_x), by_weight, *(None,) * 5


def _kept_bend(
    c: Tensor,
    p: Tensor | None,
    q: Tensor | None,
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rate: Tensor,
    slope: Tensor,
    unit: Tensor,
    tilt: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return what `_bends` does, from what does not depend on c, on a CPU.

    With d the derivative of normalisation times c, slope that times ``g weight`` and u = -rate x', the derivative by x
    is ``d mean(g weight u) + slope mean(c u) + u mean(c slope)``, and with p that of normalisation times ``g p`` more.
    """
    d = _along(c, x, None, mean, rate)
    by_x = (d * tilt).addcmul_(slope, (c * unit).mean(-1, keepdim=True))
    by_x.addcmul_(unit, (c * slope).mean(-1, keepdim=True))
    by_g = d.mul_(weight)
    if p is not None:
        by_x += _along(g * p, x, None, mean, rate)
        by_g.addcmul_((x - mean) * rate, p)
    return by_g if q is None else by_g.add_(q), by_x


class _Norm(torch.autograd.Function):
    """LayerNorm of rows, ``(groups, rows, width)``, with a weight and a bias for each group, ``(groups, 1, width)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        y, mean, rate = torch.native_layer_norm(x, (x.shape[-1],), None, None, eps)
        ctx.save_for_backward(x, weight, mean, rate)
        return torch.addcmul(bias, y, weight).to(dtype)

    @staticmethod
    @unheard
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        wanted = goes_on(ctx, 1), goes_on(ctx, 2)
        if not torch.is_grad_enabled():  # a product's way down, which nothing differentiates
            x, weight, mean, rate = ctx.saved_tensors
            return _norm_slope(g, x, weight, mean, rate, left(ctx)), *_sums(g, x, mean, rate, wanted), None, None
        found = _NormSlope.apply(g, *ctx.saved_tensors, ctx, left(ctx), wanted)  # type: ignore[no-untyped-call]
        return *found, None, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Return the LayerNorm over the last axis in a type; weight and bias may have the first axis of x, as groups."""
    affine = (tensor.reshape(-1, 1, x.shape[-1]) for tensor in (weight, bias))
    groups = weight.shape[0] if weight.dim() > 1 else 1
    rows = x.reshape(groups, -1, x.shape[-1]).contiguous()
    found: Tensor = _Norm.apply(rows, *affine, eps, dtype)  # type: ignore[no-untyped-call]
    return found.view(x.shape)
