"""Where and with what a benchmark ran, and how much memory it took."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "sharpscope",
    "torch",
    "transformers",
    "numpy",
    "scipy",
    "pyhessian",
    "curvlinops-for-pytorch",
    "hessian-eigenthings",
)


def versions() -> dict[str, str | None]:
    """Return the version of every package that takes part, None for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str | None:
    here = Path(__file__).parent
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return done.stdout.strip() or None


def facts(device: str, threads: int) -> dict[str, Any]:
    """Return what a reader needs to judge timings: processor, cores, threads, load, GPU, precision, commit."""
    cuda = device.startswith("cuda")
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "float32_matmul": torch.get_float32_matmul_precision(),
        "sharpscope_commit": _commit(),
    }


class Memory:
    """Peak memory of this process over the baseline at construction: resident set on a CPU, allocator on a GPU."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self._baseline = torch.cuda.memory_allocated() if self._cuda else _status("VmRSS")

    def reset(self) -> None:
        """Forget earlier peaks."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS

    def peak(self) -> int:
        """Return the peak since the last reset, in bytes over the baseline."""
        now = torch.cuda.max_memory_allocated() if self._cuda else _status("VmHWM")
        return now - self._baseline


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
