"""The precision of float32 products on a GPU, chosen for a while and given back."""

from __future__ import annotations

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
