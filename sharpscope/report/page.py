"""The page: one self-contained HTML file, readable without scripts and in print, and its figures as SVG files."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from sharpscope.home import at_home
from sharpscope.journal import replace_text
from sharpscope.optim.activity import Audit, read_audit
from sharpscope.report.drawing import inlined, svg
from sharpscope.report.exhibits import ABOUT, SECTIONS, Exhibit, exhibits
from sharpscope.report.gate import CHECK, Gate, read_gate
from sharpscope.report.tables import (
    layer_table,
    provenance,
    split_table,
    straggler_table,
    unused_layers,
    verdict_table,
)
from sharpscope.report.verdict import co_moving, verdict
from sharpscope.result import ScanResult
from sharpscope.storage import writing

AUDIT = "spd.jsonl"
OURS = "<title>sharpscope: "  #: in every page
Drawn = tuple[Exhibit, str | None]  #: with its drawing, None if the result holds nothing to draw


@dataclass(frozen=True)
class Figure:
    """A figure as the template shows it."""

    number: int
    exhibit: Exhibit
    drawing: Markup


def write(result: ScanResult, folder: str | Path, *, audit: str | Path | None = None) -> Path:
    """Write ``index.html`` and ``figures/*.svg`` into the folder, over what is there, and return the page's path.

    A file is written beside its place and renamed, so that a reader never sees half of one; figures that an earlier run
    left and this one does not draw are removed. The same result gives the same bytes.

    Parameters
    ----------
    result
        What to show.
    folder
        Where to. A ``check.json`` found there (``sharpscope check --json``) is shown beside the verdict.
    audit
        Log of an SPD training; None: ``spd.jsonl`` in the folder, if there is one.

    Raises
    ------
    UsageError
        If the audit log cannot be read.
    OutputError
        If the folder cannot be written.
    """
    place = at_home(folder)
    log = at_home(audit) if audit is not None else place / AUDIT
    found = exhibits(result, read_audit(log) if audit is not None or log.is_file() else None)
    drawn = [(exhibit, None if exhibit.figure is None else svg(exhibit.figure)) for exhibit in found]
    text = _page(result, drawn, read_gate(place / CHECK))  # what cannot be drawn leaves the page that was there
    with writing(place):
        (place / "figures").mkdir(parents=True, exist_ok=True)
        for exhibit, document in drawn:
            if document is not None:
                replace_text(place / "figures" / f"{exhibit.name}.svg", document)
        _remove_stale(place / "figures", {exhibit.name for exhibit, document in drawn if document is not None})
        replace_text(place / "index.html", text)
    return place / "index.html"


def remove(folder: str | Path) -> None:
    """Remove what :func:`write` and ``sharpscope check`` left in the folder; a page by somebody else stays."""
    place = at_home(folder)
    index, findings = place / "index.html", place / CHECK
    if index.is_file() and OURS in index.read_text(encoding="utf-8", errors="replace"):
        index.unlink()
        _remove_stale(place / "figures", set())
    if read_gate(findings) is not None:
        findings.unlink()


def _remove_stale(folder: Path, kept: set[str]) -> None:
    for file in folder.glob("*.svg"):
        own = file.stem.partition("-")[0] in ABOUT or file.stem == "stragglers"  # its name up to version 0.1.0
        if own and file.stem not in kept:
            file.unlink()


def render(result: ScanResult, *, audit: Audit | None = None, gate: Gate | None = None) -> str:
    """Return the page as text, writing nothing."""
    drawn = [(found, None if found.figure is None else svg(found.figure)) for found in exhibits(result, audit)]
    return _page(result, drawn, gate)


def _page(result: ScanResult, drawn: list[Drawn], gate: Gate | None) -> str:
    found, script = verdict(result), _asset("page.js")
    return (
        _environment()
        .from_string(_asset("page.html"))
        .render(
            result=result,
            verdict=found,
            gate=gate,
            comparison=verdict_table(result, found) if found.recommendation else None,
            co_moving=co_moving(result),
            figures=_figures(drawn),
            absent={name: [e for e, document in drawn if document is None and e.section == name] for name in SECTIONS},
            stragglers=straggler_table(result),
            layers=layer_table(result, found),
            splits=split_table(result),
            provenance=list(provenance(result)),
            unused=unused_layers(result),
            style=Markup(_asset("page.css")),  # noqa: S704 - our own file
            script=Markup(script),  # noqa: S704 - our own file
            script_hash=_hash(script),
        )
    )


def _figures(drawn: list[Drawn]) -> dict[str, list[Figure]]:
    """Return the figures by the section of the page they stand in, numbered in the order they are seen."""
    ordered = [
        (e, document) for name in SECTIONS for e, document in drawn if document is not None and e.section == name
    ]
    numbered = [Figure(i, exhibit, _drawing(i, exhibit, document)) for i, (exhibit, document) in enumerate(ordered, 1)]
    return {name: [figure for figure in numbered if figure.exhibit.section == name] for name in SECTIONS}


def _drawing(number: int, exhibit: Exhibit, document: str) -> Markup:
    element = inlined(document, f"f{number}", f"{exhibit.title}. {exhibit.answer}")
    return Markup(element)  # noqa: S704 - matplotlib escapes the names in a drawing, inlined() those in its label


def _hash(script: str) -> str:
    """Return the script's digest as a content security policy names it: no other script may run in the page."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _asset(name: str) -> str:
    return (files("sharpscope.report") / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
