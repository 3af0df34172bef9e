"""TOML files that people read and write: rules, configurations, recipes. Needs no torch."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sharpscope.errors import UsageError


def read_toml(path: Path, what: str, fix: str | None = None) -> dict[str, Any]:
    """Return the content of a file, which may be a pipe; ``what`` and ``fix`` say in errors what it should be.

    Raises
    ------
    UsageError
        If there is no file, or it is no TOML.
    """
    if path.is_dir() or not path.exists():
        raise UsageError(f"there is no {what} {path}", fix)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a mark
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no TOML: {error}", fix) from error


def toml(value: Any) -> str:
    """Return a string, number, truth value or list in TOML, whose strings are those of JSON but for one character."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml, value))}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def underscored(table: Mapping[str, Any], where: str | Path) -> dict[str, Any]:
    """Return the table with _ for - in its keys; ``UsageError`` if a key is there in both spellings."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        key = name.replace("-", "_")
        if key in found:
            raise UsageError(f"{where}: {key!r} is there twice, with - and with _", "leave one of them out")
        found[key] = value
    return found
