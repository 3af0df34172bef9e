"""Libraries that tests compare with and that users need not have."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

import pytest


def needs(name: str) -> ModuleType:
    """Import an optional dependency; a missing one skips here and fails in CI."""
    if importlib.util.find_spec(name) is None and not os.environ.get("CI"):
        pytest.skip(f"{name} is not installed")
    return importlib.import_module(name)
