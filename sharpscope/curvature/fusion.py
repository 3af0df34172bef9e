"""Functions of tensors in one kernel."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Fused:
    """A function of tensors, compiled into one kernel on a GPU where a compiler is there.

    Parameters
    ----------
    function
        Of tensors; its results have the shape of the first.
    axes
        How many of the last axes the function sees as they are; None: all. Others are taken together, as the compiler
        makes a variant for every number of axes and for every axis of length one.
    """

    def __init__(self, function: Callable[..., Any], axes: int | None = None) -> None:
        self._plain = function
        self._axes = axes
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *tensors: Tensor) -> Any:
        """Return the function's result."""
        # Detached: the compiler makes a variant for every combination of tensors that want gradients and do not.
        return self._shaped(*(tensor.detach() for tensor in tensors)) if tensors[0].is_cuda else self._plain(*tensors)

    def _shaped(self, *tensors: Tensor) -> Any:
        if self._axes is None:
            return self._fast(*tensors)
        kept, shape = self._axes, tensors[0].shape
        found = self._fast(*(tensor.reshape(-1, *tensor.shape[tensor.dim() - kept :]) for tensor in tensors))
        return tree_map_only(Tensor, lambda tensor: tensor.view(shape), found)

    def _fast(self, *tensors: Tensor) -> Any:
        if self._compiled is None:  # only now: the compiler takes seconds to import
            try:
                self._compiled = torch.compile(self._plain, dynamic=True)
                return self._compiled(*tensors)
            except Exception as refusal:  # no compiler on the machine, or one that does not know the device
                warnings.warn(f"sharpscope runs unfused, {type(refusal).__name__} in torch.compile", stacklevel=2)
                self._compiled = self._plain
        return self._compiled(*tensors)


def wide(tensor: Tensor) -> Tensor:
    """Return what is in float16 in float32; within a compiled function no memory is written for that."""
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def keeps(x: Tensor) -> bool:
    """Return whether a graph keeps what its products need of a call with that argument, or they compute it anew.

    Anew takes one kernel on a GPU and no memory; on a CPU every call is a pass over memory of its own.
    """
    return not x.is_cuda and x.dtype != torch.float16


def kernels(*tensors: Tensor) -> Any:
    """Return the module of Triton kernels if they take such tensors and triton is there."""
    if not all(tensor.is_cuda and tensor.dtype in (torch.float32, torch.float16) for tensor in tensors):
        return None
    try:
        from sharpscope.curvature import kernels
    except ImportError:
        return None
    return kernels
