"""What ``sharpscope check`` found, as the page shows it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

CHECK = "check.json"  #: written into the folder of the scan by ``sharpscope check DIR --json DIR/check.json``


@dataclass(frozen=True)
class Checked:
    """One rule: its name, how it went in a word, and why in a sentence."""

    rule: str
    verdict: str
    reason: str


@dataclass(frozen=True)
class Gate:
    """Whether the gate passed, and every rule."""

    passed: bool
    rules: tuple[Checked, ...]


def read_gate(file: Path) -> Gate | None:
    """Return the findings in the file, None if there is no such file or it is none of ours."""
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        rules = tuple(Checked(str(r["id"]), str(r["verdict"]), str(r["reason"])) for r in found["rules"])
        return Gate(found["passed"] is True, rules)
    except (ValueError, KeyError, TypeError):
        return None
