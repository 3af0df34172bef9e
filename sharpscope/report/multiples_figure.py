"""Figure 5: the curves behind a flag: sharpness of a layer above the OOD error, over the same alphas."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from sharpscope.errors import UsageError
from sharpscope.report.canvas import GRID, MISSING, SERIES, Panels, literal, panels, place_in, styled
from sharpscope.report.curves import mean_ood, rows_of
from sharpscope.report.words import layer_label, measure_name, titled
from sharpscope.result import ScanResult
from sharpscope.stragglers.surrogates import surrogates
from sharpscope.stragglers.wording import NEEDED_ALPHAS
from sharpscope.table import MODEL, reach

MOST = 4  # layers drawn
SURROGATES = 20
FLAGS = ("straggler", "co-moves beyond the null")


def flagged(result: ScanResult) -> pd.DataFrame:
    """Return the rows of the straggler table to look at, one a layer: the flagged, else those that co-move most."""
    table = result.stragglers[result.stragglers["layer"] != MODEL].drop_duplicates("layer")
    found = table[table["verdict"].isin(FLAGS)]
    return (found if len(found) else table.sort_values("tau", ascending=False, kind="stable")).head(MOST)


def multiples_figure(result: ScanResult, *, ax: Sequence[Axes] | None = None) -> Panels:
    """Return two rows of Axes: sharpness of the flagged layers over alpha, below it the mean OOD error; no twin axes.

    Bands are 95 %. Grey lines are 20 curves that the OOD error could have been without regard to any layer, as smooth
    as itself (the path null): a layer that follows them as well is not special. If no layer is beyond the null, the
    ones with the largest tau are drawn.

    Raises
    ------
    UsageError
        If no layer could be compared with an OOD error.
    """
    chosen = flagged(result)
    if chosen.empty:
        raise UsageError("no OOD error to compare layers with", "scan with ood={name: data} and a curvature measure")
    count, order = len(chosen), list(result.meta["layers"])
    with styled():
        made = panels(ax, (2, count), (7.8, 4.4), sharex=True)
        for column, row in enumerate(chosen.itertuples()):
            _sharpness(made[column], result, str(row.layer), str(row.measure))
            made[column].patch.set_gid(place_in(str(row.layer), order, "panel"))
            _error(made[count + column], result, str(row.verdict), float(row.tau))
        made[0].set_ylabel("sharpness")
        made[count].set_ylabel("mean OOD error")
        return made


def _sharpness(ax: Axes, result: ScanResult, layer: str, measure: str) -> None:
    rows = rows_of(result, measure)
    found = rows[rows["layer"] == layer].sort_values("alpha")
    alpha, value = found["alpha"].to_numpy(), found["value"].to_numpy()
    half = np.array([reach(measure, float(r.stderr), int(r.draws)) for r in found.itertuples()])
    half = np.where(np.isfinite(half), half, np.nan)
    ax.fill_between(alpha, value - half, value + half, color=SERIES[0], alpha=0.18, linewidth=0)
    ax.plot(alpha, value, color=SERIES[0], marker="o")
    ax.set_title(f"{layer_label(layer, 22)}\n{fill(titled(measure_name(measure)), 24)}", fontsize=7.5)
    literal([ax.title])
    ax.tick_params(labelsize=7.5)
    ax.grid(axis="y", color=GRID)


def _error(ax: Axes, result: ScanResult, verdict: str, tau: float) -> None:
    curve = mean_ood(result)
    error = 1 - curve.value
    if len(error) >= NEEDED_ALPHAS:
        drawn = surrogates(curve.alpha, error, SURROGATES, np.random.default_rng([abs(result.meta["seed"]), 0]))
        ax.plot(curve.alpha, 100 * drawn.T, color=MISSING, linewidth=0.7, alpha=0.7, zorder=1)
    ax.fill_between(
        curve.alpha, 100 * (1 - curve.high), 100 * (1 - curve.low), color=SERIES[1], alpha=0.2, linewidth=0, zorder=2
    )
    ax.plot(curve.alpha, 100 * error, color=SERIES[1], marker="s", zorder=3)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    ax.set_title(fill(f"tau {tau:.2f}: {verdict}", 26), fontsize=7.5, fontweight="normal")
    ax.set_xlabel("alpha")
    ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    ax.tick_params(labelsize=7.5)
    ax.grid(axis="y", color=GRID)
