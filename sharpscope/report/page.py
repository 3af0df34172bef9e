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

from sharpscope.report.drawing import inlined, svg
from sharpscope.report.exhibits import Exhibit, exhibits
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

SECTIONS = ("path", "stragglers", "sharpness", "health")


@dataclass(frozen=True)
class Figure:
    """A figure as the template shows it."""

    number: int
    exhibit: Exhibit
    drawing: Markup


def write(result: ScanResult, folder: str | Path) -> Path:
    """Write ``index.html`` and ``figures/*.svg`` into the folder, over what is there, and return the page's path.

    A file is written beside its place and renamed, so that a reader never sees half of one. The same result gives
    the same bytes.
    """
    place = Path(folder)
    (place / "figures").mkdir(parents=True, exist_ok=True)
    drawn = [(exhibit, svg(exhibit.figure)) for exhibit in exhibits(result)]
    for exhibit, document in drawn:
        _replace(place / "figures" / f"{exhibit.name}.svg", document)
    return _replace(place / "index.html", _page(result, drawn))


def render(result: ScanResult) -> str:
    """Return the page as text, writing nothing."""
    return _page(result, [(exhibit, svg(exhibit.figure)) for exhibit in exhibits(result)])


def _page(result: ScanResult, drawn: list[tuple[Exhibit, str]]) -> str:
    found, script = verdict(result), _asset("page.js")
    return (
        _environment()
        .from_string(_asset("page.html"))
        .render(
            result=result,
            verdict=found,
            comparison=verdict_table(result, found) if found.recommendation else None,
            co_moving=co_moving(result),
            figures=_figures(drawn),
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


def _figures(drawn: list[tuple[Exhibit, str]]) -> dict[str, list[Figure]]:
    """Return the figures by the section of the page they stand in, numbered in the order they are seen."""
    sections = {name: [pair for pair in drawn if pair[0].section == name] for name in SECTIONS}
    ordered = [pair for name in SECTIONS for pair in sections[name]]
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


def _replace(path: Path, text: str) -> Path:
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    return beside.replace(path)
