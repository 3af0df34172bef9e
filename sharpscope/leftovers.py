"""What a scan left in a folder: what it says of itself, and the page that must not stand beside new numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sharpscope.report.gate import CHECK

TABLES = ("layers", "evals", "stragglers", "interventions", "recipes")  # of a result, kept as CSV beside it
OWN = (
    "scan.json",
    "cells.jsonl",
    "correct.npz",
    *(f"{name}.csv" for name in TABLES),
    "config.resolved.toml",
    "index.html",
)


def own_files(folder: str | Path) -> list[Path]:
    """Return where a scan, its settings and its page lie in the folder; not what the gate said of it."""
    return [Path(folder) / name for name in OWN]


def meta_in(folder: Path) -> dict[str, Any]:
    """Return the plan and provenance of the finished scan in the folder, nothing if none can be read there."""
    try:
        found = json.loads((folder / "scan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def remove_page(folder: Path) -> None:
    """Remove the page of a scan that the folder will not hold, and what the gate said of it."""
    if any((folder / name).is_file() for name in ("index.html", CHECK)):
        from sharpscope.report.page import remove  # matplotlib, only where there is something to remove

        remove(folder)
