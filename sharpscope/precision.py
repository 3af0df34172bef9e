"""How torch computes, chosen for a while and given back: the precision of products, the choice of algorithms."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["highest", "high"]


@contextmanager
def matmul_precision(precision: Precision) -> Iterator[None]:
    """Run matrix products and convolutions in full float32 (``highest``) or TF32 (``high``) inside the block."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision == "high"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Run only algorithms that give the same bits every time inside the block, if that is wanted.

    torch raises ``RuntimeError`` at an operation that has none. On a GPU cuBLAS needs a workspace of fixed size, which
    it reads from the environment when it starts: set here, unless it is set already.
    """
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
