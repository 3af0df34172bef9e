"""The tables of the page as rows of finished texts, each with the number it is sorted by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sharpscope.report.curves import Grid, layer_grid, measures
from sharpscope.report.verdict import Verdict
from sharpscope.report.words import (
    MINUS,
    alpha_text,
    duration,
    interval,
    layer_name,
    measure_name,
    p_text,
    percent,
    points,
    shortened,
    significant,
    with_error,
)
from sharpscope.result import ScanResult
from sharpscope.stragglers.paired import Difference
from sharpscope.stragglers.wording import BEYOND, STRAGGLER

NOTHING = "–"
MOST = 240  # rows of the straggler table: a scan by tensor has thousands, and its page a limit
MARKED = (STRAGGLER, BEYOND)
NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Entry:
    """What a table cell shows, what it sorts by (None: last), and a class for its look."""

    text: str
    key: float | None = None
    look: str = ""


@dataclass(frozen=True)
class Line:
    """One table row; ``number`` is the layer's place in depth order, which ties it to the figures."""

    cells: tuple[Entry, ...]
    number: int | None = None


@dataclass(frozen=True)
class Table:
    """Column names and rows; the first column names the row; ``left_out`` rows are not here."""

    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    left_out: int = 0


def _entry(value: float, text: str) -> Entry:
    return Entry(text if math.isfinite(value) else NOTHING, value if math.isfinite(value) else None, "n")


def verdict_table(result: ScanResult, found: Verdict) -> Table:
    """Return accuracies at both ends and at the recommended alpha, and the paired changes, split by split."""
    assert found.recommendation is not None
    columns = ("data", "kind", "images", "zero-shot", f"alpha {alpha_text(found.recommendation.alpha)}", "fine-tuned")
    lines = []
    for row in found.table:
        n = result.meta["splits"].get(row.split, {}).get("n")
        cells = [Entry(row.split), Entry(row.role), Entry(f"{n:,}" if n else NOTHING, n, "n")]
        cells += [_entry(value, percent(value)) for value in row.accuracy.values()]
        lines.append(Line((*cells, *(_change(gap) for gap in row.change.values()))))
    return Table((*columns, "change against zero-shot", "change against fine-tuned"), tuple(lines))


def _change(gap: Difference | None) -> Entry:
    if gap is None:
        return Entry("the same model")
    word = {1: "better", 0: "no clear difference", -1: "worse"}[gap.sign]
    return Entry(f"{points(gap.value)} ({interval(gap)}): {word}", gap.value, f"{word.split()[0]} words")


def straggler_table(result: ScanResult) -> Table:
    """Return tau of every layer and measure with the OOD error beside chance and distance; the first :data:`MOST`."""
    table = result.stragglers
    lines = [
        Line(
            (
                Entry(layer_name(row["layer"])),
                Entry(measure_name(row["measure"])),
                Entry(row["verdict"], look="words moves" if row["verdict"] in MARKED else "words"),
                _entry(row["tau"], _tau(row["tau"])),
                _entry(row["tau_low"], f"{_tau(row['tau_low'])} to {_tau(row['tau_high'])}"),
                _entry(row["null_high"], f"{_tau(row['null_low'])} to {_tau(row['null_high'])}"),
                _entry(row["p_family"], p_text(row["p_family"])),
                _entry(row["q"], p_text(row["q"])),
                _entry(row["relative_delta"], percent(row["relative_delta"])),
            ),
            _number(result, row["layer"]),
        )
        for row in table.head(MOST).to_dict("records")
    ]
    columns = ("layer", "measure", "verdict", "tau", "95 %", "90 % of chance", "family-wise p", "FDR q", "moved")
    return Table(columns, tuple(lines), max(0, len(table) - MOST))


def _tau(tau: float) -> str:
    return f"{tau:.2f}".replace("-", MINUS)


def _number(result: ScanResult, layer: str) -> int | None:
    order = list(result.meta["layers"])
    return order.index(layer) if layer in order else None


def layer_table(result: ScanResult, found: Verdict) -> Table:
    """Return one row per measure and layer: the measure at both ends and the recommended alpha, errors, distance."""
    chosen = found.recommendation.alpha if found.recommendation else None
    named = [(0.0, "zero-shot"), (1.0, "fine-tuned")]
    if chosen not in (None, 0.0, 1.0):
        named.insert(1, (float(chosen or 0), f"alpha {alpha_text(chosen or 0)}"))
    taus = {(row["layer"], row["measure"]): row["tau"] for row in result.stragglers.to_dict("records")}
    lines = []
    for measure in measures(result):
        grid = layer_grid(result, measure)
        for row, layer in enumerate(grid.layers):
            values = [_value(grid, row, alpha) for alpha, _ in named]
            tail = _quality(grid, row) + _facts(result, layer, taus.get((layer, measure), math.nan))
            head = (Entry(layer_name(layer), row), Entry(measure_name(measure)))
            lines.append(Line((*head, *values, *tail), _number(result, layer)))
    tail_names = ("growth", "worst error", "converged", "weights", "‖delta‖", "moved", "tau")
    return Table(("layer", "measure", *(name for _, name in named), *tail_names), tuple(lines))


def _value(grid: Grid, row: int, alpha: float) -> Entry:
    if alpha not in grid.alphas or not grid.measured[row, grid.alphas.index(alpha)]:
        return Entry("not measured")
    column = grid.alphas.index(alpha)
    value, stderr = float(grid.value[row, column]), float(grid.stderr[row, column])
    return Entry(with_error(value, stderr), value, "n unsure" if grid.unsure[row, column] else "n")


def _quality(grid: Grid, row: int) -> tuple[Entry, ...]:
    measured = grid.measured[row]
    if not measured.any():
        return (Entry(NOTHING), Entry(NOTHING), Entry(NOTHING))
    ends = [grid.value[row, grid.alphas.index(a)] if a in grid.alphas else math.nan for a in (1.0, 0.0)]
    ratio = ends[0] / ends[1] if min(ends) > 0 else math.nan
    worst = float(np.nanmax(grid.relative[row]))
    done, total = int(grid.converged[row].sum()), int(measured.sum())
    return (
        _entry(ratio, f"×{significant(float(ratio), 2)}"),
        Entry(percent(worst), worst if math.isfinite(worst) else 1e300, "n"),
        Entry(f"{done} of {total}", done / total, "n"),
    )


def _facts(result: ScanResult, layer: str, tau: float) -> tuple[Entry, ...]:
    facts: Mapping[str, Any] = result.meta["layers"].get(layer, {})
    size, delta, start = (float(facts.get(key, math.nan)) for key in ("size", "delta_norm", "start_norm"))
    moved = delta / start if start > 0 else math.nan
    return (
        _entry(size, f"{size:,.0f}"),
        _entry(delta, significant(delta)),
        _entry(moved, percent(moved)),
        _entry(tau, _tau(tau)),
    )


def plain(value: Any) -> str:
    """Return a value of the metadata as text, whatever its kind.

    >>> plain(None), plain(True), plain({"m": 16, "noise": "normal"}), plain([0.0, 0.5])
    ('not recorded', 'yes', 'm 16, noise normal', '0, 0.5')
    """
    if value is None:
        return NOT_RECORDED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return significant(value, 6)
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(key)} {plain(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(map(plain, value)) or "none"
    return str(value)


def _words(key: object) -> str:
    return str(key).replace("_", " ")


def provenance(result: ScanResult) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield groups of facts: models, plan, measures, software and machine, cost; what is not recorded says so."""
    meta = result.meta
    yield "Models", [fact for role, facts in meta.get("models", {}).items() for fact in _model(_words(role), facts)]
    plan = {key: meta.get(key) for key in ("alphas", "seed", "alpha_convention")}
    if meta.get("objective", "image") != "image":
        plan["objective"] = f"{meta['objective']}, batches of {meta['plan']['batch_size']}"
    yield "Plan", [(_words(key), plain(value)) for key, value in plan.items()]
    yield "Measures", [(measure_name(name), plain(settings)) for name, settings in meta["measures"].items()]
    yield "Software and machine", [(_words(key), plain(value)) for key, value in meta.get("provenance", {}).items()]
    yield "Cost", [(_words(key), _cost(key, value)) for key, value in meta.get("cost", {}).items()]


def _model(role: str, facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what a model is: its name, then a line a fact; a path that is the name is not said again."""
    yield role, plain(facts.get("name"))
    for key, value in facts.items():
        if key != "name" and not (key == "path" and value == facts.get("name")):
            yield f"{role}: {_words(key)}", plain(value)


def _cost(key: str, value: Any) -> str:
    if key == "seconds" and isinstance(value, int | float):
        return duration(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else plain(value)


def split_table(result: ScanResult) -> Table:
    """Return what each data set is: role, images, classes, images measured, fingerprint."""
    lines = []
    for name, facts in result.meta["splits"].items():
        classes, measured = facts.get("classes"), facts.get("measured")
        lines.append(
            Line(
                (
                    Entry(name),
                    Entry(str(facts["role"]).upper()),
                    _entry(float(facts.get("n", math.nan)), f"{facts.get('n', 0):,}"),
                    Entry(f"{len(classes):,}" if classes else NOT_RECORDED, look="n"),
                    Entry(f"{measured:,}" if measured else NOTHING, measured, "n"),
                    Entry(shortened(plain(facts.get("fingerprint")), 17)),
                )
            )
        )
    columns = ("data", "role", "images", "classes", "for sharpness", "fingerprint")
    return Table(columns, tuple(lines))


def unused_layers(result: ScanResult) -> list[str]:
    """Return the layers that no gradient reaches."""
    return list(result.meta.get("unused", []))
