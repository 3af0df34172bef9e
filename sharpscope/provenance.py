"""What a scan was computed with."""

from __future__ import annotations

import os
import platform
from typing import Any

import numpy as np
import torch

from sharpscope._version import __version__


def provenance(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return versions, device and arithmetic that the numbers were made with."""
    return {
        "sharpscope": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "dtype": str(dtype).removeprefix("torch."),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "attention": "math (unfused) for curvature",
    }
