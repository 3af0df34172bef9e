"""A result at a glance, as text and as static HTML: no scripts, no widgets, no figures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from sharpscope.report.curves import measures
from sharpscope.report.tables import Table, verdict_table
from sharpscope.report.verdict import Verdict, co_moving, verdict
from sharpscope.report.words import count
from sharpscope.result import ScanResult


def as_text(result: ScanResult) -> str:
    """Return the verdict, the comparison with both ends and the co-moving layers as lines of text."""
    found = verdict(result)
    lines = [_what(result), found.headline, *(f"  {reason}" for reason in found.reasons)]
    if found.recommendation:
        lines += ["", *_columns(verdict_table(result, found)), ""]
    return "\n".join([*lines, co_moving(result), *_warnings(result)])


def as_html(result: ScanResult) -> str:
    """Return the same as HTML for a notebook; every name in it is escaped."""
    found = verdict(result)
    items = [*found.reasons, co_moving(result), *_warnings(result)]
    parts = [
        f"<p>{escape(_what(result))}</p>",
        f"<p><strong>{escape(found.headline)}</strong></p>",
        f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>",
        _html_table(result, found) if found.recommendation else "",
    ]
    return f"<div>{''.join(parts)}</div>"


def _what(result: ScanResult) -> str:
    models = result.meta.get("models", {})
    names = [models.get(role, {}).get("name") or word for role, word in _ROLES]
    parts = [
        count(len(result.meta["alphas"]), "alpha"),
        count(len(result.meta["layers"]), "layer"),
        f"measures: {', '.join(measures(result)) or 'none'}",
    ]
    return f"sharpscope: {' to '.join(names)}, {', '.join(parts)}"


_ROLES = (("zero_shot", "zero-shot"), ("fine_tuned", "fine-tuned"))


def _warnings(result: ScanResult) -> list[str]:
    return [f"Warning: {warning}" for warning in result.meta.get("warnings", [])]


def _columns(table: Table) -> list[str]:
    """Return the table as aligned lines, the first column to the left."""
    rows = [table.columns, *([cell.text for cell in line.cells] for line in table.lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(_padded(row, widths)).rstrip() for row in rows]


def _padded(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    texts = row[0].ljust(widths[0]), row[1].ljust(widths[1])
    return [*texts, *(text.rjust(width) for text, width in zip(row[2:], widths[2:], strict=True))]


def _html_table(result: ScanResult, found: Verdict) -> str:
    table = verdict_table(result, found)
    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell.text)}</td>' for cell in line.cells)}</tr>" for line in table.lines
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
