"""The memory a scan may take: a limit that is kept, and batches in pieces that stay below it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from sharpscope.counts import whole
from sharpscope.curvature.graphs import HEADROOM
from sharpscope.device import own_device

VECTORS = 12  # in the size of the weights: both ends, gradient, way, probe, image and a few Lanczos vectors
PEAK = 2.0  # peak with products, over what autograd saves; 1.3 to 2.0 in benchmarks/results/growth-h200.json


@contextmanager
def limited(memory: int | None, device: str | None) -> Iterator[None]:
    """Let this process take so many bytes of the GPU inside the block and no more; None: all there are.

    torch's allocator keeps the limit: beyond it, memory runs out. Without a GPU nothing is limited.

    Raises
    ------
    UsageError
        If the limit is none.
    """
    if memory is not None:
        whole("memory", memory, fix="the bytes that the scan may take, e.g. 20 * 2**30")
    place = own_device(device)
    if memory is None or place.type != "cuda":
        yield
        return
    index = torch.cuda.current_device() if place.index is None else place.index
    total = torch.cuda.mem_get_info(index)[1]
    before = torch.cuda.get_per_process_memory_fraction(index)
    torch.cuda.set_per_process_memory_fraction(min(memory / total, 1.0), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, index)


class GraphBytes(NamedTuple):
    """What a gradient graph keeps: for each example, and once however many there are, as weights in float16."""

    example: int
    once: int = 0

    @classmethod
    def of(cls, measured: Sequence[int]) -> GraphBytes:
        """Return it from the graph of one example and of two, or of what could be measured of them."""
        if len(measured) < 2:
            return cls(sum(measured))
        one, two = measured
        return cls(max(two - one, 0), max(min(2 * one - two, one), 0))


def pieces_for(batch: int, graph: GraphBytes, weights: int, free: int) -> int:
    """Return the pieces, 1, 2, 4, ..., that a batch is to be computed in so that a product fits in what is free.

    Parameters
    ----------
    batch
        Examples in it.
    graph
        What its gradient graph keeps.
    weights
        Bytes of the weights.
    free
        Bytes; a share of them is kept for graphs (:data:`sharpscope.curvature.graphs.HEADROOM`).

    >>> [pieces_for(64, GraphBytes(example=10), weights=10, free=free) for free in (800, 8000)]
    [4, 1]
    """
    room = max(free - VECTORS * weights - PEAK * graph.once, free / 4) * (1 - HEADROOM)
    pieces = 1
    while pieces < batch and PEAK * graph.example * -(-batch // pieces) > room:
        pieces *= 2
    return pieces
