"""What another scan left in a folder: its plan, and the page that must not stand beside new numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sharpscope.report.gate import CHECK


def plan_in(folder: Path) -> Any:
    """Return the plan of the finished scan in the folder, None if none can be read there."""
    try:
        return json.loads((folder / "scan.json").read_text(encoding="utf-8"))["plan"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remove_page(folder: Path) -> None:
    """Remove the page of a scan that the folder will not hold, and what the gate said of it."""
    if any((folder / name).is_file() for name in ("index.html", CHECK)):
        from sharpscope.report.page import remove  # matplotlib, only where there is something to remove

        remove(folder)
