"""A result at a glance, as text and as static HTML: no scripts, no widgets, no figures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from sharpscope.recipe import Recipe
from sharpscope.report.curves import measures
from sharpscope.report.tables import Table, verdict_table
from sharpscope.report.verdict import ENDS, Verdict, co_moving, verdict
from sharpscope.report.words import alpha_text, count, interval, listed, points
from sharpscope.result import ScanResult
from sharpscope.stragglers.paired import Difference
from sharpscope.stragglers.recommendation import Recommendation


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


def recommendation_as_html(advice: Recommendation) -> str:
    """Return what to ship and its paired changes against both ends as HTML for a notebook; every name is escaped."""
    uniform = advice.recipe == Recipe.uniform(advice.alpha)
    per_layer = f"an alpha per layer, {count(len(advice.recipe.rules), 'rule')}"
    shipped = f"alpha {alpha_text(advice.alpha)}" if uniform else per_layer
    ties = [alpha_text(alpha) for alpha in advice.ties if alpha != advice.alpha]
    untold = f"; not distinguishable from alpha {alpha_text(advice.alpha)}: alpha {listed(ties)}" if ties else ""
    chosen = f"Chosen by {advice.target} on half of the images, compared on the other{untold}."
    rows = [
        (
            split,
            *(_change(found[split], uniform and advice.alpha == ENDS[name]) for name, found in advice.versus.items()),
        )
        for split in next(iter(advice.versus.values()))
    ]
    table = _grid(["Accuracy", *(f"points vs {name} (95 %)" for name in advice.versus)], rows)
    return f"<div><p><strong>{escape(f'Recommended: {shipped}')}</strong></p><p>{escape(chosen)}</p>{table}</div>"


def _change(found: Difference, same: bool) -> str:
    return "the same model" if same else f"{points(found.value)} ({interval(found)})"


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
    return _grid(table.columns, [[cell.text for cell in line.cells] for line in table.lines])


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table of texts, which are escaped."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
