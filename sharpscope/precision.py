"""How torch computes, chosen for a while and given back: precision of products, choice of algorithms, no autocast."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch

from sharpscope.errors import UsageError

Precision = Literal["highest", "high"]


@contextmanager
def matmul_precision(precision: Precision) -> Iterator[None]:
    """Run matrix products and convolutions in full float32 (``highest``) or with a mantissa of ten bits (``high``)."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision == "high"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextmanager
def differentiable() -> Iterator[None]:
    """Let nothing around the block change what is differentiated in it: no autocast, whose rounding is noise.

    Raises
    ------
    UsageError
        In inference mode, of which there is no way out: tensors made there have no gradient.
    """
    if torch.is_inference_mode_enabled():
        raise UsageError("torch.inference_mode() is on, in which nothing has a gradient", "call it outside of that")
    with ExitStack() as off:
        for kind in ("cpu", "cuda", "xpu", "mps"):
            if torch.is_autocast_enabled(kind):
                off.enter_context(torch.autocast(kind, enabled=False))
        yield


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
        if wanted:  # the call imports torch's compiler: seconds, and after Ctrl-C within an import an error of its own
            torch.use_deterministic_algorithms(before)
