"""A matplotlib figure as SVG text: the same bytes every time, and fit to stand among others in one page."""

from __future__ import annotations

import io
import re
import warnings
from collections import Counter
from html import escape
from typing import Any

import matplotlib as mpl

from sharpscope.report.canvas import GRID, INK, MISSING, MUTED, PAPER, SERIES, styled

THEME = {
    **{INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper", MISSING: "--missing"},
    **{colour: f"--series-{i}" for i, colour in enumerate(SERIES)},
}
_UNDATED = dict.fromkeys(("Date", "Creator", "Format", "Type"))
_TAG = re.compile(r"<[^<>]+>")  # matplotlib escapes both signs in texts and attributes
_LAYER = re.compile(r'\bid="layer-(\d+)-[^"]*"')
_ID = re.compile(r'\s+id="([^"]*)"')
_REFERENCE = re.compile(r'(?:href="|url\()#([^")]+)')
_STYLE = re.compile(r' style="([^"]*)"')
_IDLE = re.compile(r' transform="rotate\(-0 [^"]*"')
_BETWEEN = re.compile(r">\s+<")
_EMPTY = re.compile(r"<g\s*/>|<g></g>")
_PLACE = re.compile(r'(?<=[\s"])(?:d|x|y)="[^"]*"')
_DECIMALS = re.compile(r"(\.\d\d)\d+")
_COLOUR = re.compile("|".join(THEME))


def svg(figure: Any) -> str:
    """Return a figure as a standalone SVG document, without a date and with ids that do not change between runs."""
    buffer = io.StringIO()
    with styled(), mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sharpscope"}), warnings.catch_warnings():
        # Text stays text: the browser has the glyphs (of class names, say) that the font used for layout lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from (current )?font")
        figure.savefig(buffer, format="svg", metadata=_UNDATED)
    return buffer.getvalue()


def inlined(document: str, prefix: str, label: str) -> str:
    """Return a standalone SVG as an element for an HTML page.

    Ids that something refers to get the prefix (inlined figures share one name space), the others go; house colours
    become CSS variables; elements of a layer carry ``data-layer`` with its number in depth order; the whole is one
    image with a label for screen readers.
    """
    body = document[document.index("<svg") :]
    box = re.search(r'viewBox="([^"]+)"', body)
    assert box is not None, "matplotlib always writes a view box"
    used = set(_REFERENCE.findall(body))
    inner = _TAG.sub(lambda tag: _tag(tag.group(), prefix, used), body[body.index(">") + 1 :])
    inner = _with_classes(_EMPTY.sub("", _BETWEEN.sub("><", inner)), prefix)
    return f'<svg class="drawing" viewBox="{box.group(1)}" role="img" aria-label="{escape(label)}">{inner}'


def _with_classes(inner: str, prefix: str) -> str:
    """Return the drawing with each style that occurs twice or more written once, as a class."""
    found = Counter(style for tag in _TAG.findall(inner) for style in _STYLE.findall(tag))
    names = {style: f"{prefix}-{i}" for i, style in enumerate(s for s, times in found.items() if times > 1)}

    def named(style: re.Match[str]) -> str:
        return f' class="{names[style.group(1)]}"' if style.group(1) in names else style.group()

    rules = "".join(f".{name}{{{style}}}" for style, name in names.items())
    return f"<style>{rules}</style>{_TAG.sub(lambda tag: _STYLE.sub(named, tag.group()), inner)}"


def _tag(tag: str, prefix: str, used: set[str]) -> str:
    tag = _PLACE.sub(lambda place: _DECIMALS.sub(r"\1", place.group()), tag)  # a hundredth of a point is enough
    tag = _LAYER.sub(r'class="layer" data-layer="\1"', tag)
    tag = _ID.sub(lambda found: f' id="{prefix}-{found.group(1)}"' if found.group(1) in used else "", tag)
    tag = re.sub(r'(?:xlink:)?href="#', f'href="#{prefix}-', tag)
    tag = _IDLE.sub("", tag.replace("url(#", f"url(#{prefix}-").replace("\n", " "))
    return _COLOUR.sub(lambda colour: f"var({THEME[colour.group()]})", tag)
