"""A folder of intermediate results belongs to one choice of settings."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def claim(work: Path, settings: Mapping[str, Any]) -> None:
    """Write what the results in the folder are of; exit if it holds those of other settings."""
    work.mkdir(parents=True, exist_ok=True)
    said, file = json.dumps(settings, default=str), work / "settings.json"
    if file.exists() and file.read_text() != said:
        sys.exit(f"{work} holds results of other settings: {file.read_text()}; choose another --work, or remove it")
    file.write_text(said)
