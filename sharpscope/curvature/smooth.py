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

from sharpscope.curvature.attention import attention, attention_of_groups, plain
from sharpscope.curvature.fusion import Fused, kernels
from sharpscope.curvature.groups import at_once
from sharpscope.curvature.linear import linear
from sharpscope.curvature.passes import goes_on, leave, left

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


def _pulled_onto(derivatives: Derivatives) -> Fused:
    def slope(g: Tensor, x: Tensor, more: Tensor) -> Tensor:
        return g * derivatives(x)[0] + more

    return Fused(slope)


def _bent(derivatives: Derivatives) -> Fused:
    def both(c: Tensor, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = derivatives(x)
        return c * first, c * g * second

    return Fused(both)


_DERIVATIVES: dict[str, Derivatives] = {"quick": _quick_gelu, "none": _gelu, "tanh": _gelu_tanh}
KINDS = {name: (_pulled(d), _pulled_onto(d), _bent(d)) for name, d in _DERIVATIVES.items()}


class _ActivationSlope(torch.autograd.Function):
    """``g f'(x)``, for the node that f is; what is left to that is added."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, node: Any, more: tuple[Tensor] | None) -> Tensor:
        ctx.save_for_backward(g, x)
        ctx.node = node
        slope, onto, _ = KINDS[node.kind]
        found: Tensor = slope(g, x) if more is None else onto(g, x, *more)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
        by_g, by_x = KINDS[ctx.node.kind][2](c, *ctx.saved_tensors)
        return by_g, *leave(ctx.node, by_x), None, None


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
        return _ActivationSlope.apply(g, x, ctx, left(ctx)), None  # type: ignore[no-untyped-call]


def _activation(x: Tensor, kind: str) -> Tensor:
    found: Tensor = _Activation.apply(x, kind)  # type: ignore[no-untyped-call]
    return found


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


def _weight_bends(c: Tensor, g: Tensor, x: Tensor, _weight: Tensor, mean: Tensor, rate: Tensor) -> Tensor:
    """Return the derivative by the weight before summing over rows."""
    return g * _projected(c, (x - mean) * rate, rate)


_fused_slopes, _fused_bends, _norm_weight_bend = Fused(_slopes), Fused(_bends), Fused(_weight_bends)
WIDEST = 8192  # row that a kernel holds


def _norm_slope(g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rate: Tensor, more: tuple[Tensor] | None) -> Tensor:
    if (triton := kernels(g, x, weight)) and x.shape[-1] <= WIDEST:
        found: Tensor = triton.norm_slope(g, x, weight, mean, rate, more)
    else:
        found = _fused_slopes(g, x, weight, mean, rate)
        found = found if more is None else found.add_(*more)
    return found


def _norm_bend(c: Tensor, p: Tensor | None, q: Tensor | None, *known: Tensor) -> tuple[Tensor, Tensor]:
    if (triton := kernels(c, *known)) and c.shape[-1] <= WIDEST:
        found: tuple[Tensor, Tensor] = triton.norm_bend(c, p, q, *known)
    else:
        p, q = (torch.zeros_like(known[2]) if part is None else part for part in (p, q))
        found = _fused_bends(c, p, q, *known)
    return found


def _rows(tensor: Tensor) -> Tensor:
    """Return the sums over all axes but the first and the last."""
    return tensor.sum(1, keepdim=True)


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
        more: tuple[Tensor] | None,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(g, x, weight, mean, rate)
        ctx.set_materialize_grads(False)
        ctx.node = node
        by_weight = _rows(g * ((x - mean) * rate)) if wanted[0] else None
        return _norm_slope(g, x, weight, mean, rate, more), by_weight, _rows(g) if wanted[1] else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, c: Tensor | None, p: Tensor | None, q: Tensor | None) -> tuple[Tensor | None, ...]:
        c = torch.zeros_like(ctx.saved_tensors[0]) if c is None else c
        by_g, by_x = _norm_bend(c, p, q, *ctx.saved_tensors)
        # A block's product does not ask for it in the layers above, and sums over rows are slow.
        by_weight = _rows(_norm_weight_bend(c, *ctx.saved_tensors)) if goes_on(ctx, 2) else None
        return by_g, *leave(ctx.node, by_x), by_weight, *(None,) * 5


class _Norm(torch.autograd.Function):
    """LayerNorm of rows, ``(groups, rows, width)``, with a weight and a bias for each group, ``(groups, 1, width)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rate = torch.native_layer_norm(x, (x.shape[-1],), None, None, eps)
        ctx.save_for_backward(x, weight, mean, rate)
        return torch.addcmul(bias, y, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        wanted = goes_on(ctx, 1), goes_on(ctx, 2)
        found = _NormSlope.apply(g, *ctx.saved_tensors, ctx, left(ctx), wanted)  # type: ignore[no-untyped-call]
        return *found, None


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return the LayerNorm over the last axis; weight and bias may have the first axis of x, as groups."""
    affine = (tensor.reshape(-1, 1, x.shape[-1]) for tensor in (weight, bias))
    groups = weight.shape[0] if weight.dim() > 1 else 1
    rows = x.reshape(groups, -1, x.shape[-1]).contiguous()
    found: Tensor = _Norm.apply(rows, *affine, eps)  # type: ignore[no-untyped-call]
    return found.view(x.shape)


def along_patches(
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor | None:
    """Return the convolution as a matrix product if its windows do not overlap, as those of a ViT; else None.

    With weights for each group of examples torch would have it as one convolution in groups, far slower.
    """
    sides = tuple(weight.shape[2:])
    plain = _pair(padding) in ((0, 0), "valid") and _pair(dilation) == (1, 1) and groups == 1
    if not plain or _pair(stride) != sides or x.dim() != 4:
        return None
    (high, wide), (rows, columns) = sides, (x.shape[-2] // sides[0], x.shape[-1] // sides[1])
    windows = x[..., : rows * high, : columns * wide].reshape(*x.shape[:2], rows, high, columns, wide)
    return product(windows.permute(0, 2, 4, 1, 3, 5).flatten(3), weight.flatten(1), bias).permute(0, 3, 1, 2)


def _pair(value: str | int | Sequence[int]) -> Any:
    return (value, value) if isinstance(value, int) else value if isinstance(value, str) else tuple(value)


class _Smooth(TorchFunctionMode):
    """Routes attention, GELU, QuickGELU (three calls: scale, sigmoid, product) and LayerNorm to the closed forms.

    Parameters
    ----------
    batched
        Within ``vmap``, whose tensors do not say that they require gradients.
    """

    def __init__(self, *, batched: bool = False) -> None:
        super().__init__()
        self._batched = batched
        self._scaled: tuple[_Seen, _Seen] | None = None  # 1.702 x and x
        self._gate: tuple[_Seen, _Seen] | None = None  # sigmoid(1.702 x) and x

    def _live(self, tensor: Tensor) -> bool:
        return self._batched or tensor.requires_grad

    def _call(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        return at_once(function, *arguments) if self._batched else function(*arguments)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return at_once(linear, input, weight, bias)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if not args or not isinstance(args[0], Tensor):  # called by keywords, or with no tensor
            return function(*args, **kwargs)
        if name == "gelu" and self._live(args[0]):
            return self._call(_activation, args[0], kwargs.get("approximate", "none"))
        if name == "layer_norm" and (norm := _affine(*args, **kwargs)) and self._live(norm[0]):
            return self._call(_norm, *norm)
        if name == "scaled_dot_product_attention" and (asked := plain(*args, **kwargs)) and self._live(asked[0]):
            return self._call(attention_of_groups if self._batched else attention, *asked)
        if self._batched and name in ("linear", "conv2d"):
            return self._windows(function, name, args, kwargs)
        return self._quick(function, name, args, kwargs)

    def _windows(self, function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "linear":
            return self._linear(*args, **kwargs)
        found = along_patches(self._linear, *args, **kwargs)
        return function(*args, **kwargs) if found is None else found

    def _quick(self, function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do what is asked; a QuickGELU is three calls, between which nothing may have been written."""
        product = name in ("mul", "__mul__", "__rmul__") and len(args) > 1
        if product and self._gate is not None:
            gate, x = self._gate
            if any(gate.is_still(args[i]) and x.is_still(args[1 - i]) for i in (0, 1)):
                return self._call(_activation, args[0] if x.is_still(args[0]) else args[1], "quick")
        found = function(*args, **kwargs)
        if product:
            number, tensor = sorted(args[:2], key=lambda a: isinstance(a, Tensor))
            if not isinstance(number, Tensor) and number == 1.702 and self._live(tensor):
                self._scaled = _Seen(found), _Seen(tensor)
        elif name == "sigmoid" and self._scaled is not None and self._scaled[0].is_still(args[0]):
            self._gate = _Seen(found), self._scaled[1]
        return found


class _Seen:
    """A tensor as it was when it was seen."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, tensor._version

    def is_still(self, other: object) -> bool:
        """Return whether it is that, and nothing was written into it since."""
        return other is self._tensor and self._tensor._version == self._version


def _affine(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_rest: Any,
    **_more: Any,
) -> tuple[Tensor, Tensor, Tensor, float] | None:
    """Return the arguments of `_norm` if that is what the call is."""
    return None if weight is None or bias is None or len(shape) > 1 else (x, weight, bias, eps)


def smooth(*, on: bool = True, batched: bool = False) -> AbstractContextManager[Any]:
    """Return a context in which GELUs, affine LayerNorms and attention have closed-form second derivatives.

    With ``batched``, within ``vmap``, linear layers and patches too. On a CPU it does not pay: nothing is fused there
    (a block product took a quarter longer).
    """
    return _Smooth(batched=batched) if on else nullcontext()
