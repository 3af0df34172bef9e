"""open_clip and timm need torchvision, whose wheels register operators for a CUDA torch: they are declared here.

A crutch for test machines that lets such a torchvision be imported beside a CPU torch; its operators are never called.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # what the other tests are made of
torch.set_num_threads(1)

if importlib.util.find_spec("open_clip") is None and os.environ.get("CI"):
    pytest.exit("open_clip is not installed: make environment, then PYTHONPATH=.libraries", returncode=1)

if importlib.util.find_spec("torchvision") is not None and not hasattr(torch.ops.torchvision, "nms"):
    OPERATORS = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
