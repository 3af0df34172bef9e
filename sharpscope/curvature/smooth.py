"""Activations, norms and attention whose second derivative is one pass over memory instead of a dozen.

Autograd differentiates the backward of GELU and LayerNorm operation by operation: 15 to 30 kernels, each reading and
writing a whole activation, and as many tensors kept. On a GPU that is half the time of a Hessian product. Here the
backward is a function with a closed-form derivative of its own. The third derivative is not there and not needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from sharpscope.curvature.attention import attention, plain
from sharpscope.curvature.fusion import Fused

Derivatives = Callable[[Tensor], tuple[Tensor, Tensor]]


def _quick_gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return first and second derivative of ``x sigmoid(1.702 x)``."""
    s = torch.sigmoid(1.702 * x)
    slope = 1.702 * s * (1 - s)
    return s + x * slope, slope * (2 + 1.702 * x * (1 - 2 * s))


def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return first and second derivative of ``x Phi(x)``, Phi the normal distribution."""
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density, density * (2 - x * x)


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return first and second derivative of GELU's tanh approximation, arXiv 1606.08415."""
    root, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(root * (x + cubic * x**3))
    inner, bend = root * (1 + 3 * cubic * x * x), root * 6 * cubic * x
    slope = (1 - t * t) * inner
    return 0.5 * (1 + t) + 0.5 * x * slope, slope + 0.5 * x * ((1 - t * t) * bend - 2 * t * slope * inner)


def _pulled(derivatives: Derivatives) -> Fused:
    def slope(g: Tensor, x: Tensor) -> Tensor:
        return g * derivatives(x)[0]

    return Fused(slope)


def _bent(derivatives: Derivatives) -> Fused:
    def both(c: Tensor, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = derivatives(x)
        return c * first, c * g * second

    return Fused(both)


KINDS = {name: (_pulled(d), _bent(d)) for name, d in (("quick", _quick_gelu), ("none", _gelu), ("tanh", _gelu_tanh))}


class _ActivationSlope(torch.autograd.Function):
    """``g f'(x)``."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(g, x)
        ctx.kind = kind
        slope: Tensor = KINDS[kind][0](g, x)
        return slope

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor, Tensor, None]:
        return *KINDS[ctx.kind][1](c, *ctx.saved_tensors), None


class _Activation(torch.autograd.Function):
    """A GELU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind = kind
        return x * torch.sigmoid(1.702 * x) if kind == "quick" else torch.nn.functional.gelu(x, approximate=kind)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return _ActivationSlope.apply(g, x, ctx.kind), None  # type: ignore[no-untyped-call]


def _projected(u: Tensor, unit: Tensor, rate: Tensor) -> Tensor:
    """Return the derivative of normalisation, a symmetric matrix, times u."""
    return rate * (u - u.mean(-1, keepdim=True) - unit * (u * unit).mean(-1, keepdim=True))


def _norm_slopes(g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rate: Tensor) -> Tensor:
    return _projected(g * weight, (x - mean) * rate, rate)


def _norm_bends(
    c: Tensor, p: Tensor, q: Tensor, g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the derivatives by g, x, and by the weight before summing over rows; c, p, q as in `_NormSlope`."""
    unit, a = (x - mean) * rate, g * weight
    flat = _projected(c, unit, rate)
    mean_c, mean_a = (c * unit).mean(-1, keepdim=True), (a * unit).mean(-1, keepdim=True)
    whole = (c * a).mean(-1, keepdim=True) - c.mean(-1, keepdim=True) * a.mean(-1, keepdim=True) - mean_c * mean_a
    by_x = _projected(g * p - rate * (c * mean_a + a * mean_c), unit, rate) - unit * rate * rate * whole
    return weight * flat + unit * p + q, by_x, g * flat


_norm_slope, _norm_bend = Fused(_norm_slopes), Fused(_norm_bends)


def _rows(tensor: Tensor) -> Tensor:
    """Return the sum over all axes but the last."""
    return tensor.flatten(0, -2).sum(0)


class _NormSlope(torch.autograd.Function):
    """The three gradients of an affine LayerNorm as functions of g, x and the weight.

    With x' = (x - mean) * rate and cotangents c, p, q of the three: the sum over rows of
    ``c . rate (a - mean a - x' mean(a x')) + g . (x' p) + g . q`` with ``a = g weight`` is differentiated.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rate: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(g, x, weight, mean, rate)
        return _norm_slope(g, x, weight, mean, rate), _rows(g * ((x - mean) * rate)), _rows(g)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, c: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor | None, ...]:
        by_g, by_x, by_weight = _norm_bend(c, p, q, *ctx.saved_tensors)
        return by_g, by_x, _rows(by_weight) if ctx.needs_input_grad[2] else None, None, None


class _Norm(torch.autograd.Function):
    """LayerNorm over the last axis, with weight and bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rate = torch.native_layer_norm(x, (x.shape[-1],), weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rate)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return *_NormSlope.apply(g, *ctx.saved_tensors), None  # type: ignore[no-untyped-call]


class _Smooth(TorchFunctionMode):
    """Routes attention, GELU, QuickGELU (three calls: scale, sigmoid, product) and LayerNorm to the closed forms."""

    def __init__(self) -> None:
        super().__init__()
        self._scaled: tuple[Tensor, Tensor] | None = None  # 1.702 x and x
        self._gate: tuple[Tensor, Tensor] | None = None  # sigmoid(1.702 x) and x

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name == "gelu" and args[0].requires_grad:
            return _Activation.apply(args[0], kwargs.get("approximate", "none"))  # type: ignore[no-untyped-call]
        if name == "layer_norm" and (norm := _affine(*args, **kwargs)):
            return _Norm.apply(*norm)  # type: ignore[no-untyped-call]
        if name == "scaled_dot_product_attention" and (asked := plain(*args, **kwargs)):
            return attention(*asked)
        if name in ("mul", "__mul__", "__rmul__"):
            if self._gate is not None and any(
                args[i] is self._gate[0] and args[1 - i] is self._gate[1] for i in (0, 1)
            ):
                return _Activation.apply(self._gate[1], "quick")  # type: ignore[no-untyped-call]
            found = function(*args, **kwargs)
            number, tensor = sorted(args[:2], key=lambda a: isinstance(a, Tensor))
            if not isinstance(number, Tensor) and number == 1.702 and tensor.requires_grad:
                self._scaled = (found, tensor)
            return found
        found = function(*args, **kwargs)
        if name == "sigmoid" and self._scaled is not None and args[0] is self._scaled[0]:
            self._gate = (found, self._scaled[1])
        return found


def _affine(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor, float] | None:
    """Return the arguments of `_Norm` if that is what the call is."""
    if weight is None or bias is None or len(shape) > 1 or not x.requires_grad:
        return None
    return x, weight, bias, eps


def smooth(*, on: bool = True) -> AbstractContextManager[Any]:
    """Return a context in which GELUs and affine LayerNorms are recorded with closed-form second derivatives.

    On a CPU it does not pay: nothing is fused there (a block product took a quarter longer).
    """
    return _Smooth() if on else nullcontext()
