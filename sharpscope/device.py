"""The device that a process computes on."""

from __future__ import annotations

import os

import torch

from sharpscope.errors import UsageError


def own_device(chosen: str | None) -> torch.device:
    """Return the device, for ``cuda`` among several processes of a machine the GPU that is this one's.

    None is a GPU if there is one, else the CPU.

    Raises
    ------
    UsageError
        If there is no such device here, or there are more processes than GPUs.
    """
    chosen = chosen or ("cuda" if torch.cuda.is_available() else "cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if chosen != "cuda" or int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == 1:
        return _working(chosen)
    if local >= torch.cuda.device_count():
        raise UsageError(
            f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes, and there are {torch.cuda.device_count()} "
            "GPUs",
            f"--nproc-per-node {torch.cuda.device_count()}, or --device cpu",
        )
    torch.cuda.set_device(local)  # kernels that are compiled run on the current device
    return _working(f"cuda:{local}")


def _working(chosen: str) -> torch.device:
    """Return the device of this name, on which a number was made and read back."""
    try:
        # A name alone says nothing: torch.device("cuda") exists without a GPU, and "meta" holds no numbers.
        # Float64, in which sums are taken, is what Apple's "mps" has not.
        torch.ones((), device=chosen, dtype=torch.float64).item()
        return torch.device(chosen)
    except torch.OutOfMemoryError:
        raise  # the device is there, and full
    except (AssertionError, ImportError, RuntimeError, TypeError) as refusal:  # torch raises each of them
        known = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        said = str(refusal).partition("\n")[0]
        raise UsageError(
            f"--device {chosen} (device={chosen!r}) is no device of this machine that can be computed on: {said}",
            f"one of {', '.join(known)}, or leave it out",
        ) from refusal
