"""Functions of tensors in one kernel."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Fused:
    """A function of tensors, compiled into one kernel on a GPU where a compiler is there."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._plain = function
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *tensors: Tensor) -> Any:
        """Return the function's result."""
        # Detached: the compiler makes a variant for every combination of tensors that want gradients and do not.
        return self._fast(*(tensor.detach() for tensor in tensors)) if tensors[0].is_cuda else self._plain(*tensors)

    def _fast(self, *tensors: Tensor) -> Any:
        if self._compiled is None:  # only now: the compiler takes seconds to import
            try:
                self._compiled = torch.compile(self._plain, dynamic=True)
                return self._compiled(*tensors)
            except Exception as refusal:  # no compiler on the machine, or one that does not know the device
                warnings.warn(f"sharpscope runs unfused, {type(refusal).__name__} in torch.compile", stacklevel=2)
                self._compiled = self._plain
        return self._compiled(*tensors)


def kernels(*tensors: Tensor) -> Any:
    """Return the module of Triton kernels if they take such tensors and triton is there."""
    if not all(tensor.is_cuda and tensor.dtype == torch.float32 for tensor in tensors):
        return None
    try:
        from sharpscope.curvature import kernels
    except ImportError:
        return None
    return kernels
