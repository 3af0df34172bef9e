"""Activations of a graph stored in float16, where TF32 is allowed: both have ten bits of mantissa.

TF32 rounds the factors of a matrix product to that and reads four bytes for each; stored in float16 they are two, and
products run twice as fast. What float16 lacks is range. So sums stay in float32: the residual stream, norms and
softmax inside, weights and all derivatives by them. Cotangents are those of a loss that is scaled, as `Half` sees to.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

HALF = torch.float16
ROOM = 2.0**-6, 2.0**9  # where the largest cotangent may lie; float16 reaches from 2^-24 to 2^16
AIM = 2.0**2
BEYOND = 2.0**10  # by which a scale is moved where all that is known is that it was too large, or too small
# Calls that take float16 as they are; all others are given float32.
VIEWS = """
    view reshape transpose permute flatten unflatten contiguous chunk split unbind squeeze unsqueeze expand movedim
    swapaxes __getitem__ __get__ size dim numel __len__ dropout detach
"""
KEPT = frozenset([*VIEWS.split(), "linear", "gelu", "mul", "__mul__", "__rmul__", "sigmoid"])
SUMS = frozenset(["add", "__add__", "__radd__", "sub", "__sub__", "__rsub__"])


class Half:
    """The scale of losses whose cotangents are stored in float16, moved as they ask for."""

    def __init__(self, scale: float = 2.0**10) -> None:
        self.scale = scale

    def holds(self, peak: float) -> bool:
        """Return whether cotangents of which that is the largest fit; else the next graph has another scale."""
        if ROOM[0] <= peak <= ROOM[1]:
            return True
        self.scale *= _power(AIM / peak) if 0 < peak < math.inf else BEYOND if peak == 0 else 1 / BEYOND
        return False


def _power(value: float) -> float:
    """Return the power of two below: a scale by it rounds nothing."""
    return 2.0 ** math.floor(math.log2(value))


def small(tensors: list[Tensor]) -> Tensor:
    """Return the power of two that brings the largest entry to an eighth or somewhat less; nothing is waited for."""
    peak = torch.stack([t.float() for t in torch._foreach_norm(tensors, math.inf)]).max()
    return torch.exp2(-4 - torch.where(peak > 0, peak, 1).log2().floor())


def stored(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the tensor in the type of another; expanded over a first axis, it still is."""
    if tensor.dtype == like.dtype:
        return tensor
    if tensor.dim() > 2 and tensor.stride(0) == 0:
        return tensor[:1].to(like.dtype).expand_as(tensor)
    return tensor.to(like.dtype)


def over_rows(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Return the matrix products of groups, sums over many rows, in the type of another tensor."""
    if a.dtype == like.dtype:
        return torch.bmm(a, b)
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=like.dtype)
    return torch.bmm(a.to(like.dtype), b.to(like.dtype))


def in_float32(arguments: Any) -> Any:
    """Return a call's arguments with what is in float16 in float32."""
    return tree_map_only(Tensor, lambda tensor: tensor.float() if tensor.dtype == HALF else tensor, arguments)


def is_taken(name: str, args: tuple[Any, ...]) -> bool:
    """Return whether the function of that name takes its arguments in float16 where they are."""
    if name in SUMS:  # with a tensor in float32 the sum is in float32
        return any(isinstance(argument, Tensor) and argument.dtype != HALF for argument in args)
    writes = name.startswith(("__i", "__set")) or (name.endswith("_") and not name.endswith("__"))
    return writes or name in KEPT  # what is written into must be the tensor itself
