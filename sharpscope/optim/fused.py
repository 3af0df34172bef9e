"""The projection in three passes over memory instead of two dozen, on GPUs that Triton knows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

_KINDS = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None and torch.version.cuda is not None


class Fused:
    """The tensors of one device and dtype, laid out for the kernels.

    Parameters
    ----------
    weights
        On one GPU, contiguous, of one dtype.
    anchors
        In the shapes, dtype and layout of the weights; None for zeros.
    """

    def __init__(self, weights: Sequence[Tensor], anchors: Sequence[Tensor] | None) -> None:
        from sharpscope.optim.kernels import SPAN

        device = weights[0].device
        self._kind = weights[0].dtype
        self._anchors = None if anchors is None else [anchor.data_ptr() for anchor in anchors]
        sizes = torch.tensor([weight.numel() for weight in weights])
        programs = (sizes + SPAN - 1) // SPAN
        owners = torch.arange(len(sizes)).repeat_interleave(programs)
        first = torch.cumsum(programs, 0) - programs
        starts = (torch.arange(len(owners)) - first[owners]) * SPAN
        self._owners, self._starts, self._sizes = owners.to(device), starts.to(device), sizes.to(device)
        self._programs = programs.to(device)
        self._pointers: dict[str, tuple[list[int], Tensor]] = {}

    @staticmethod
    def usable(weights: Sequence[Tensor], anchors: Sequence[Tensor] | None) -> bool:
        """Return whether the kernels can take these tensors here and now."""
        tensors = [*weights, *(anchors or ())]
        one = weights[0]
        return (
            one.is_cuda
            and one.dtype in _KINDS
            and _has_triton()
            and not torch.cuda.is_current_stream_capturing()  # pointers come from the host
            and all(t.is_contiguous() and t.dtype == one.dtype and t.device == one.device for t in tensors)
        )

    def sums(self, weights: Sequence[Tensor], gradients: Sequence[Tensor] | None) -> Tensor:
        """Return squared norms of the deviations and, with gradients, inner products: shape (1 or 2, n), float64."""
        from sharpscope.optim import kernels

        out = torch.empty(len(self._owners), 2, dtype=torch.float32, device=self._owners.device)
        known, slopes = self._table("weights", weights), None if gradients is None else self._table("slopes", gradients)
        kernels.sums[(len(self._owners),)](
            self._owners, self._starts, self._sizes, known, self._anchor_table(known),
            known if slopes is None else slopes, out,
            anchored=self._anchors is not None, graded=slopes is not None,
            kind=kernels.KINDS[self._kind], span=kernels.SPAN, block=kernels.BLOCK,
        )  # fmt: skip
        # Not index_add: its order, and so its rounding, would change from run to run.
        found = torch.segment_reduce(out.double(), "sum", lengths=self._programs, unsafe=True).T
        return found if gradients is not None else found[:1]

    def pull(self, weights: Sequence[Tensor], shares: Tensor) -> None:
        """Subtract ``share * deviation`` from the weights in place; shares of shape ``(n,)``."""
        from sharpscope.optim import kernels

        known = self._table("weights", weights)
        kernels.pull[(len(self._owners),)](
            self._owners, self._starts, self._sizes, known, self._anchor_table(known), shares.float(),
            anchored=self._anchors is not None,
            kind=kernels.KINDS[self._kind], span=kernels.SPAN, block=kernels.BLOCK,
        )  # fmt: skip

    def _anchor_table(self, instead: Tensor) -> Tensor:
        return instead if self._anchors is None else self._on_device("anchors", self._anchors)

    def _table(self, name: str, tensors: Sequence[Tensor]) -> Tensor:
        return self._on_device(name, [tensor.data_ptr() for tensor in tensors])

    def _on_device(self, name: str, pointers: list[int]) -> Tensor:
        """Return the pointers on the device; copied only when they have changed, and without waiting."""
        known = self._pointers.get(name)
        if known is None or known[0] != pointers:
            table = torch.tensor(pointers).to(self._owners.device, non_blocking=True)
            known = self._pointers[name] = (pointers, table)
        return known[1]
