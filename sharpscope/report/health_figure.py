"""Figure 9: can the estimates be trusted? The estimate as draws come in, and the error left in every layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from sharpscope.report.canvas import (
    GRID,
    INK,
    MUTED,
    PAPER,
    SERIES,
    SHAPES,
    Look,
    Panels,
    layer_axis,
    literal,
    number_ticks,
    panels,
    place_in,
    styled,
)
from sharpscope.report.curves import LIMIT, Grid, layer_grid
from sharpscope.report.words import alpha_text, layer_label, measure_name, percent, titled
from sharpscope.result import ScanResult
from sharpscope.table import Array, cell_key, reach

WORST = 3
FLOOR = 1e-3  # relative errors below 0.1 % share the left edge
OTHERS = 20  # runs drawn in grey beside the worst
ROWS = 60  # layers in the right panel: beyond, the worst ones
POINTS = 120  # a running line is thinned to about so many points


@dataclass(frozen=True)
class Run:
    """The estimate of one layer at one alpha after each draw; ``reach`` is half its 95 % interval (NaN: none)."""

    layer: str
    alpha: float
    error: float
    draws: Array
    estimate: Array
    reach: Array


def is_ritz(measure: str) -> bool:
    """Return whether the samples are the estimate after each step; other measures keep draws to be averaged."""
    return "lambda_" in measure


def running(samples: Array, ritz: bool) -> tuple[Array, Array]:
    """Return estimate and standard error after each draw: the running mean, or the Ritz values as they are."""
    if ritz:
        return samples, np.full(len(samples), np.nan)
    draws = np.arange(1, len(samples) + 1)
    mean = np.cumsum(samples) / draws
    centred = samples - samples.mean()  # sums of squares of centred numbers: no cancellation
    shift = np.cumsum(centred) / draws
    variance = np.clip(np.cumsum(centred**2) / draws - shift**2, 0, None)
    with np.errstate(divide="ignore", invalid="ignore"):
        return mean, np.where(draws > 1, np.sqrt(variance / (draws - 1)), np.nan)


def worst_cells(grid: Grid) -> list[tuple[str, float, float]]:
    """Return per measured layer its worst cell as (layer, alpha, relative error): unsure layers first, by error."""
    found = []
    for layer, errors, unsure in zip(grid.layers, grid.relative, grid.unsure, strict=True):
        if not np.isnan(errors).all():
            place = int(np.nanargmax(errors))
            found.append((not unsure.any(), -float(errors[place]), layer, grid.alphas[place]))
    return [(layer, alpha, -negative) for _, negative, layer, alpha in sorted(found, key=lambda cell: cell[:2])]


def _runs(result: ScanResult, grid: Grid) -> Iterator[Run]:
    arrays = {cell.key: cell.arrays for cell in result.cells}
    for layer, alpha, error in worst_cells(grid):
        samples = arrays.get(cell_key(alpha, result.curvature_split, grid.measure), {}).get(layer)
        if samples is not None and samples.ndim == 1 and len(samples):
            estimate, stderr = running(np.asarray(samples, dtype=float), is_ritz(grid.measure))
            kept = np.unique(np.linspace(0, len(estimate) - 1, POINTS).round().astype(int))
            reached = [reach(grid.measure, float(stderr[i]), int(i) + 1) if i else np.nan for i in kept]
            yield Run(layer, alpha, error, kept + 1, estimate[kept], np.array(reached))


def health_figure(result: ScanResult, measure: str = "trace", *, ax: Sequence[Axes] | None = None) -> Panels:
    """Return two Axes: the running estimate per final estimate of each layer's worst alpha, and every layer's error.

    The three least certain layers are named and have 95 % bands; the next ones are thin and grey.
    Of a partition with very many layers the least certain are shown. For ``lambda_max`` the running estimate is the
    Ritz value after each Lanczos step.

    Raises
    ------
    UsageError
        If the scan holds no such measure.
    """
    grid = _measured(layer_grid(result, measure))
    with styled():
        made = panels(ax, (1, 2), (7.8, max(3.8, 1.8 + 0.2 * len(grid.layers))), width_ratios=(1.15, 1))
        runs, order = list(islice(_runs(result, grid), WORST + OTHERS)), list(result.meta["layers"])
        for i, run in reversed(list(enumerate(runs))):
            _draw_run(made[0], run, i, order)
        _finish_runs(made[0], runs, measure)
        _legend(made[0], measure, own=ax is None)
        _errors(made[1], grid, [run.layer for run in runs[:WORST]], order)
        return made


def _measured(grid: Grid) -> Grid:
    """Return the grid with the layers that have a value; of more than :data:`ROWS` the least certain."""
    chosen = {layer for layer, _, _ in worst_cells(grid)[:ROWS]}
    kept = np.array([layer in chosen for layer in grid.layers])
    layers = tuple(name for name, keep in zip(grid.layers, kept, strict=True) if keep)
    return replace(
        grid, layers=layers, value=grid.value[kept], stderr=grid.stderr[kept], converged=grid.converged[kept]
    )


def _draw_run(ax: Axes, run: Run, rank: int, order: Sequence[str]) -> None:
    scale = abs(run.estimate[-1]) or np.abs(run.estimate).max() or 1.0
    named = rank < WORST
    colour = SERIES[rank] if named else MUTED
    width, shade = (1.6, 1.0) if named else (0.7, 0.5)
    place = f"{layer_label(run.layer)} at alpha {alpha_text(run.alpha)}"
    (line,) = ax.plot(run.draws, run.estimate / scale, color=colour, linewidth=width, alpha=shade)
    line.set_gid(place_in(run.layer, order, "run"))
    if named:
        end: Look = {"marker": SHAPES[rank], "color": colour}
        end["label"] = f"{place}: relative error {_error_text(run.error)}"
        ax.plot(run.draws[-1:], run.estimate[-1:] / scale, **end)
        low, high = (run.estimate - run.reach) / scale, (run.estimate + run.reach) / scale
        ax.fill_between(run.draws, low, high, color=colour, alpha=0.1, linewidth=0)


def _error_text(error: float) -> str:
    return "unknown" if math.isinf(error) else percent(error, 1 if error < 0.1 else 0)


def _finish_runs(ax: Axes, runs: Sequence[Run], measure: str) -> None:
    ax.set_title(titled(measure_name(measure)), parse_math=False)
    ax.set_xlabel("Lanczos steps" if is_ritz(measure) else "groups" if measure.startswith("m_") else "probes")
    ax.set_ylabel("estimate so far / size of the last")
    upward = all(run.estimate[-1] >= 0 for run in runs)
    ax.set_ylim((0, 1.25) if is_ritz(measure) and upward else (-1, 3) if upward else (-3, 3))
    for end in (1,) if upward else (1, -1):
        ax.axhline(end, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.grid(axis="y", color=GRID)


def _legend(ax: Axes, measure: str, *, own: bool) -> None:
    handles, labels = ax.get_legend_handles_labels()
    shared: Look = {"handles": handles[::-1], "labels": labels[::-1], "alignment": "left"}
    bands = "" if is_ritz(measure) else "; bands: 95 %"
    shared["title"] = f"Least certain layers, each at its worst alpha{bands}"
    if own:
        literal(ax.figure.legend(loc="outside lower left", **shared).get_texts())
    else:
        literal(ax.legend(loc="lower right", **shared).get_texts())


def _errors(ax: Axes, grid: Grid, worst: Sequence[str], order: Sequence[str]) -> None:
    ax.set_title("Relative error by alpha")
    errors = np.clip(grid.relative, FLOOR, None)
    known = errors[np.isfinite(errors)]
    edge = max(1.0, 2 * float(known.max(initial=0.0)))
    for row, fine in product(range(len(grid.layers)), (True, False)):
        layer = grid.layers[row]
        chosen = errors[row][~np.isnan(errors[row]) & (grid.converged[row] == fine)]
        if len(chosen):  # an empty line that is not clipped would spoil the layout
            places = np.where(np.isinf(chosen), edge, chosen)
            (dots,) = ax.plot(places, np.full(len(chosen), row), clip_on=False, **_dot_look(layer, worst, fine))
            dots.set_gid(place_in(layer, order, f"dots-{fine}"))
    ax.axvline(LIMIT, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    ax.set_xscale("log")
    _percent_ticks(ax, float(known.min(initial=0.1)), edge, unknown=bool(np.isinf(errors).any()))
    layer_axis(ax, grid.layers, order, longest=30)
    ax.grid(axis="y", color=GRID)
    ax.set_xlabel("filled: converged; line: 30 %")


def _dot_look(layer: str, worst: Sequence[str], converged: bool) -> Look:
    named = layer in worst
    colour = SERIES[worst.index(layer)] if named else MUTED
    marker = SHAPES[worst.index(layer)] if named else "o"
    return {"color": colour, "marker": marker, "linestyle": "none", "markerfacecolor": colour if converged else PAPER}


def _percent_ticks(ax: Axes, low: float, edge: float, *, unknown: bool) -> None:
    ax.set_xlim(low / 1.3, edge * 1.15)
    ticks = [tick for tick in number_ticks(low / 1.3, edge, 5) if not unknown or tick < edge / 1.8]
    labels = [f"{100 * tick:g} %" for tick in ticks]
    if unknown:
        ticks, labels = [*ticks, edge], [*labels, "?"]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(FixedFormatter(labels))
    ax.xaxis.set_minor_locator(NullLocator())
