"""A saved scan and rules in, findings and documents out. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sharpscope.detectors import GateResult, check
from sharpscope.detectors.documents import as_json, junit, markdown
from sharpscope.errors import UsageError
from sharpscope.journal import replace_text
from sharpscope.result import open_result

DOCUMENTS = {"junit": junit, "json": as_json, "md": markdown}


def gate(folder: str | Path, rules: str | Path, documents: Mapping[str, str | None]) -> GateResult:
    """Return what the rules find in a saved scan, after writing the documents.

    Parameters
    ----------
    folder, rules
        See :func:`sharpscope.open` and :func:`sharpscope.check`.
    documents
        ``junit``, ``json``, ``md`` -> file, None for one that is not wanted.

    Raises
    ------
    UsageError
        For rules that cannot be meant, or a file that cannot be written.
    """
    found = check(open_result(folder), rules)
    for kind, place in documents.items():
        if place is not None:
            _write(Path(place), DOCUMENTS[kind](found))
    return found


def _write(place: Path, text: str) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        replace_text(place, text)
    except OSError as error:
        raise UsageError(f"{place} cannot be written: {error.strerror}", "name another file") from error
