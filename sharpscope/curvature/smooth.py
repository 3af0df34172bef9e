"""The calls of a model that have closed-form second derivatives, and the tensors in them that are stored in float16.

Autograd differentiates the backward of GELU, LayerNorm and attention operation by operation: 15 to 40 kernels, each
reading and writing a whole activation, and as many tensors kept. That is half the time of a Hessian product. Here the
backward is a function with a closed-form derivative of its own: on a GPU one kernel that computes all anew, on a CPU
some calls that go on from what the graph keeps. The third derivative is not there and not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sharpscope.curvature.activation import activation
from sharpscope.curvature.attention import attention, attention_of_groups, plain
from sharpscope.curvature.groups import at_once
from sharpscope.curvature.half import HALF, in_float32, is_taken
from sharpscope.curvature.layer_norm import layer_norm
from sharpscope.curvature.linear import linear
from sharpscope.curvature.multi_head import self_attention
from sharpscope.curvature.patches import along_patches


class _Smooth(TorchFunctionMode):
    """Routes attention, GELU, QuickGELU (three calls: scale, sigmoid, product) and LayerNorm to the closed forms.

    Parameters
    ----------
    batched
        Within ``vmap``, whose tensors do not say that they require gradients.
    peaks
        Has what comes out of norms of sequences and passes through linear layers, GELU and attention in float16, and
        gathers the largest cotangent of each linear layer among them. None: nothing is stored in float16.
    """

    def __init__(self, *, batched: bool = False, peaks: list[Tensor] | None = None) -> None:
        super().__init__()
        self._batched = batched
        self._peaks = peaks
        self._scaled: tuple[_Seen, _Seen] | None = None  # 1.702 x and x
        self._gate: tuple[_Seen, _Seen] | None = None  # sigmoid(1.702 x) and x

    def _live(self, tensor: Tensor) -> bool:
        return self._batched or tensor.requires_grad

    def _call(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        return at_once(function, *arguments) if self._batched else function(*arguments)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        layer = partial(linear, peaks=self._peaks)
        if self._batched:
            return at_once(layer, input, weight, bias)
        return layer(input[None], weight[None], None if bias is None else bias[None])[0]

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name == "multi_head_attention_forward" and (attend := self_attention(*args, **kwargs)):
            with self:
                return attend(args[0]), None
        asked = None
        if name == "scaled_dot_product_attention" and args:
            asked = plain(*args, **kwargs)
        if self._peaks is not None and asked is None and not is_taken(name, args):
            args, kwargs = in_float32((args, kwargs))
        if not args or not isinstance(args[0], Tensor):  # called by keywords, or with no tensor
            return function(*args, **kwargs)
        if asked is not None and self._live(asked[0]):
            return self._call(attention_of_groups if self._batched else attention, *asked)
        if name == "gelu" and self._live(args[0]):
            return self._call(activation, args[0], kwargs.get("approximate", "none"))
        if name == "layer_norm" and (norm := _affine(*args, **kwargs)) and self._live(norm[0]):
            return self._call(layer_norm, *norm, self._stored(norm[0]))
        if name == "linear" and (self._batched or args[0].dtype == HALF):
            return self._linear(*args, **kwargs)
        if name == "conv2d" and self._batched:
            found = along_patches(self._linear, *args, **kwargs)
            return function(*args, **kwargs) if found is None else found
        return self._quick(function, name, args, kwargs)

    def _stored(self, x: Tensor) -> torch.dtype:
        """Return the type that a norm's output is stored in; a few rows, as of pooled features, are not worth it."""
        return HALF if self._peaks is not None and x.dtype == torch.float32 and x.dim() > 2 else x.dtype

    def _quick(self, function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do what is asked; a QuickGELU is three calls, between which nothing may have been written."""
        product = name in ("mul", "__mul__", "__rmul__") and len(args) > 1
        if product and self._gate is not None:
            gate, x = self._gate
            if any(gate.is_still(args[i]) and x.is_still(args[1 - i]) for i in (0, 1)):
                return self._call(activation, args[0] if x.is_still(args[0]) else args[1], "quick")
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
    if weight is None or bias is None or len(shape) > 1 or not x.dtype == weight.dtype == bias.dtype:
        return None
    return x, weight, bias, eps


def smooth(*, on: bool = True, batched: bool = False, peaks: list[Tensor] | None = None) -> AbstractContextManager[Any]:
    """Return a context in which GELUs, affine LayerNorms and attention have closed-form second derivatives.

    With ``batched``, within ``vmap``, linear layers and patches too. With ``peaks``, much of it is in float16, see
    `half.py`.
    """
    return _Smooth(batched=batched, peaks=peaks) if on else nullcontext()
