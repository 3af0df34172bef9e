"""Layer-wise sharpness along the path between a model and its fine-tuned self.

``scan(model_a, model_b, loader)`` measures, ``layers(model)`` shows the partition, ``load`` and ``folder`` read CLIP
checkpoints and image folders, ``open`` reads a saved scan. Importing this package imports nothing heavy: each name
is loaded at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sharpscope._version import __version__

if TYPE_CHECKING:
    from sharpscope.comparison import diff
    from sharpscope.crosscheck import verify
    from sharpscope.data import Split
    from sharpscope.detectors import check
    from sharpscope.folders import folder
    from sharpscope.merging import merge
    from sharpscope.models import load
    from sharpscope.optim import SGDSPD, AdamSPD
    from sharpscope.partition import layers
    from sharpscope.recipe import Recipe
    from sharpscope.result import ScanResult
    from sharpscope.saved import open_result as open
    from sharpscope.scanner import scan
    from sharpscope.sources import images
    from sharpscope.stragglers.cohort import across_models

# No public function shares its name with a module: importing the module would shadow it.
_HOMES = {
    "AdamSPD": ("sharpscope.optim", "AdamSPD"),
    "SGDSPD": ("sharpscope.optim", "SGDSPD"),
    "Recipe": ("sharpscope.recipe", "Recipe"),
    "ScanResult": ("sharpscope.result", "ScanResult"),
    "Split": ("sharpscope.data", "Split"),
    "across_models": ("sharpscope.stragglers.cohort", "across_models"),
    "check": ("sharpscope.detectors", "check"),
    "diff": ("sharpscope.comparison", "diff"),
    "folder": ("sharpscope.folders", "folder"),
    "images": ("sharpscope.sources", "images"),
    "layers": ("sharpscope.partition", "layers"),
    "load": ("sharpscope.models", "load"),
    "merge": ("sharpscope.merging", "merge"),
    "open": ("sharpscope.saved", "open_result"),
    "scan": ("sharpscope.scanner", "scan"),
    "verify": ("sharpscope.crosscheck", "verify"),
}

__all__ = [
    "SGDSPD",
    "AdamSPD",
    "Recipe",
    "ScanResult",
    "Split",
    "__version__",
    "across_models",
    "check",
    "diff",
    "folder",
    "images",
    "layers",
    "load",
    "merge",
    "open",
    "scan",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sharpscope' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
