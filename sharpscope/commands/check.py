"""A saved scan and rules in, findings and documents out. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sharpscope.detectors import GateResult, check
from sharpscope.detectors.documents import as_json, junit, markdown
from sharpscope.documents import write_documents
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
        For rules that cannot be meant, or a file that cannot be written; then none is.
    """
    found = check(open_result(folder), rules)
    wanted = {kind: Path(place) for kind, place in documents.items() if place is not None}
    write_documents({place: DOCUMENTS[kind](found) for kind, place in wanted.items()})
    return found
