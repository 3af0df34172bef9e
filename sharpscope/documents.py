"""Several files that belong together, written all or none."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from sharpscope.errors import UsageError
from sharpscope.journal import replace_text


def write_documents(texts: Mapping[Path, str]) -> None:
    """Write files, and the folders they lie in: all of them, or none.

    Raises
    ------
    UsageError
        If one cannot be written.
    """
    made: list[Path] = []
    try:
        for place in texts:
            made += _made(place.parent)
            if place.is_dir():
                raise IsADirectoryError(errno.EISDIR, "it is a folder", str(place))
            place.with_name(place.name + ".part").write_text("", encoding="utf-8")
        for place, text in texts.items():
            replace_text(place, text)
    except OSError as error:
        for place in texts:
            with suppress(OSError):
                place.with_name(place.name + ".part").unlink()
        for folder in reversed(made):
            with suppress(OSError):
                folder.rmdir()
        raise UsageError(f"{place} cannot be written: {error.strerror}", "name another file") from error


def _made(folder: Path) -> list[Path]:
    """Make a folder and those above it; return the new ones, the uppermost first."""
    new = [place for place in (*reversed(folder.parents), folder) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return new
