"""A saved scan and rules in, findings and documents out. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sharpscope.commands.documents import write_documents
from sharpscope.detectors import GateResult, check
from sharpscope.detectors.documents import as_json, junit, markdown
from sharpscope.home import at_home
from sharpscope.leftovers import own_files
from sharpscope.saved import open_result

DOCUMENTS = {"junit": junit, "json": as_json, "md": markdown}


def gate(folder: str | Path, rules: str | Path, documents: Mapping[str, str | None]) -> GateResult:
    """Return what the rules find in a saved scan, after writing the documents.

    Parameters
    ----------
    folder, rules
        See :func:`sharpscope.open` and :func:`sharpscope.check`.
    documents
        ``junit``, ``json``, ``md`` -> file, ``-`` for stdout, None for one that is not wanted.

    Raises
    ------
    UsageError
        For rules that cannot be meant, or a place that is no place for a document; then none is written.
    """
    found = check(open_result(folder), rules)
    texts = [(place, DOCUMENTS[kind](found)) for kind, place in documents.items() if place is not None]
    write_documents(texts, read=[at_home(rules), *own_files(folder)])
    return found
