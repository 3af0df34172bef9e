"""GELUs whose second derivative is one pass over memory instead of a dozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sharpscope.curvature.fusion import Fused, keeps, wide
from sharpscope.curvature.passes import leave, left, unheard

Derivatives = Callable[[Tensor], tuple[Tensor, Tensor]]


# Numbers are written out: what is read from another module the compiler takes for an argument, and fails at.


def _quick_gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return first and second derivative of ``x sigmoid(1.702 x)``."""
    s = torch.sigmoid(1.702 * x)
    slope = 1.702 * s * (1 - s)
    return s + x * slope, slope * (2 + 1.702 * x * (1 - 2 * s))


def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return first and second derivative of ``x Phi(x)``, Phi the normal distribution."""
    density = torch.exp(-0.5 * x * x) * 0.3989422804014327  # 1 / sqrt(2 pi)
    return 0.5 * (1 + torch.erf(x * 0.7071067811865476)) + x * density, density * (2 - x * x)


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return first and second derivative of GELU's tanh approximation, arXiv 1606.08415."""
    root, cubic = 0.7978845608028654, 0.044715  # root: of 2 / pi
    t = torch.tanh(root * (x + cubic * x**3))
    inner, bend = root * (1 + 3 * cubic * x * x), root * 6 * cubic * x
    slope = (1 - t * t) * inner
    return 0.5 * (1 + t) + 0.5 * x * slope, slope + 0.5 * x * ((1 - t * t) * bend - 2 * t * slope * inner)


def _quick(x: Tensor) -> Tensor:
    return (x * torch.sigmoid(1.702 * wide(x))).to(x.dtype)


def _pulled(derivatives: Derivatives) -> Fused:
    def slope(g: Tensor, x: Tensor) -> Tensor:
        return (g * derivatives(wide(x))[0]).to(x.dtype)

    return Fused(slope, axes=0)


def _pulled_onto(derivatives: Derivatives) -> Fused:
    def slope(g: Tensor, x: Tensor, more: Tensor) -> Tensor:
        return (g * derivatives(wide(x))[0] + more).to(x.dtype)

    return Fused(slope, axes=0)


def _bent(derivatives: Derivatives) -> Fused:
    def both(c: Tensor, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = derivatives(wide(x))
        c = wide(c)
        return (c * first).to(x.dtype), (c * g * second).to(x.dtype)

    return Fused(both, axes=0)


_DERIVATIVES: dict[str, Derivatives] = {"quick": _quick_gelu, "none": _gelu, "tanh": _gelu_tanh}
KINDS = {name: (_pulled(d), _pulled_onto(d), _bent(d)) for name, d in _DERIVATIVES.items()}


_QUICK = Fused(_quick, axes=0)


def _slope(g: Tensor, x: Tensor, kind: str, more: tuple[Tensor, ...] | None) -> Tensor:
    slope, onto, _ = KINDS[kind]
    found: Tensor = slope(g, x) if more is None else onto(g, x, *more)
    return found


def _times(g: Tensor, first: Tensor, more: tuple[Tensor, ...] | None) -> Tensor:
    return g * first if more is None else torch.addcmul(more[0], g, first)


class _ActivationSlope(torch.autograd.Function):
    """``g f'(x)``, for the node that f is; what is left to that is added."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, node: Any, more: tuple[Tensor, ...] | None) -> Tensor:
        ctx.node = node
        if not keeps(x):
            ctx.save_for_backward(g, x)
            return _slope(g, x, node.kind, more)
        node.first, second = _DERIVATIVES[node.kind](x)
        ctx.save_for_backward(node.first, second.mul_(g))
        return _times(g, node.first, more)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        by_g, by_x = KINDS[ctx.node.kind][2](c, a, b) if ctx.node.first is None else (c * a, c * b)
        return by_g, *leave(ctx.node, by_x), None, None


class _Activation(torch.autograd.Function):
    """A GELU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind, ctx.first = kind, None
        found: Tensor = _QUICK(x) if kind == "quick" else torch.nn.functional.gelu(x, approximate=kind)
        return found

    @staticmethod
    @unheard
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if not torch.is_grad_enabled():  # a product's way down, which nothing differentiates
            more = left(ctx)
            return _slope(g, x, ctx.kind, more) if ctx.first is None else _times(g, ctx.first, more), None
        return _ActivationSlope.apply(g, x, ctx, left(ctx)), None  # type: ignore[no-untyped-call]


def activation(x: Tensor, kind: str) -> Tensor:
    """Return a GELU: ``quick``, or torch's with ``none`` or ``tanh`` as approximation."""
    found: Tensor = _Activation.apply(x, kind)  # type: ignore[no-untyped-call]
    return found
