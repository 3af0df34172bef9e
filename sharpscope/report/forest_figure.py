"""Figure 4: which layers' sharpness runs with the OOD error, held against chance, beside how far each layer moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from sharpscope.errors import UsageError
from sharpscope.report.canvas import (
    GRID,
    INK,
    MISSING,
    MUTED,
    PAPER,
    SERIES,
    SHAPES,
    Look,
    Panels,
    layer_axis,
    layer_rows,
    panels,
    styled,
)
from sharpscope.report.curves import depth_order, measures
from sharpscope.report.words import measure_name, p_text
from sharpscope.result import ScanResult

ROWS = 40  # layers shown at most
EDGE = 1.1  # beyond a correlation of one


def forest_figure(result: ScanResult, *, ax: Sequence[Axes] | None = None) -> Panels:
    """Return two Axes by layer: rank correlation of sharpness with the OOD error, and the relative distance moved.

    Grey bars hold 90 % of the correlations that chance reaches on this path (the path null), whiskers are 95 %
    bootstrap intervals at this noise, which pulls tau towards 0. Filled: co-moves (tau of at least one half); with a
    ring: beyond the null. The numbers to the right are family-wise p-values. Of a partition with very many layers those
    with the largest absolute tau are shown.

    Raises
    ------
    UsageError
        If no layer could be compared with an OOD error.
    """
    table = result.stragglers
    if table.empty:
        raise UsageError("no OOD error to compare layers with", "scan with ood={name: data} and a curvature measure")
    strongest = table.assign(size=table["tau"].abs()).sort_values("size", ascending=False, kind="stable")
    shown = set(strongest["layer"].drop_duplicates().head(ROWS))
    table = table[table["layer"].isin(shown)]
    rows = [name for name in depth_order(result) if name in shown]
    kinds, order = [kind for kind in measures(result) if (table["measure"] == kind).any()], list(result.meta["layers"])
    with styled():
        size = (7.8, 1.6 + max(0.3, 0.13 * len(kinds)) * len(rows))
        made = panels(ax, (1, 2), size, sharey=True, width_ratios=(2.4, 1))
        for i, kind in enumerate(kinds):
            _measure(made[0], table[table["measure"] == kind], rows, (i - (len(kinds) - 1) / 2) * 0.8 / len(kinds), i)
        _finish(made[0], rows)
        _distances(made[1], table, rows)
        layer_axis(made[0], rows, order)
        layer_rows(made[0], rows, order)
        layer_rows(made[1], rows, order)
        _legend(made[0], kinds, own=ax is None)
        return made


def _measure(ax: Axes, table: pd.DataFrame, rows: Sequence[str], shift: float, rank: int) -> None:
    places = np.array([rows.index(layer) + shift for layer in table["layer"]])
    low, high = table["null_low"].to_numpy(dtype=float), table["null_high"].to_numpy(dtype=float)
    known = np.isfinite(low)
    ax.barh(places[known], (high - low)[known], left=low[known], height=0.1, color=MISSING, alpha=0.6, zorder=1)
    low, high = table["tau_low"].to_numpy(dtype=float), table["tau_high"].to_numpy(dtype=float)
    ax.hlines(places[known], low[known], high[known], color=_look(rank)["color"], linewidth=1, zorder=2)
    for place, found in zip(places, table.itertuples(), strict=True):
        _dot(ax, place, found, rank)


def _dot(ax: Axes, place: float, found: Any, rank: int) -> None:
    verdict = str(found.verdict)
    look = _look(rank)
    filled = verdict.startswith(("co-moves", "straggler"))
    ax.plot([found.tau], [place], markersize=5, zorder=3, clip_on=False, **look, mfc=look["color"] if filled else PAPER)
    if verdict == "straggler" or "beyond" in verdict:
        ring: Look = {"marker": "o", "mfc": "none", "mec": INK, "markersize": 9, "linestyle": "none"}
        ax.plot([found.tau], [place], zorder=4, clip_on=False, **ring)
    if np.isfinite(found.p_family):
        side: Look = {"fontsize": 6.5, "va": "center", "ha": "left", "color": look["color"]}
        ax.text(1.02, place, p_text(found.p_family), transform=ax.get_yaxis_transform(), **side)


def _finish(ax: Axes, rows: Sequence[str]) -> None:
    ax.set_title("Kendall's tau with the mean OOD error")
    ax.set_title("p", loc="right", fontsize=8, x=1.06)
    ax.axvline(0, color=MUTED, linewidth=0.8, zorder=0)
    ax.set_xlim(-EDGE, EDGE)
    ax.set_xticks([-1, -0.5, 0, 0.5, 1], ["−1", "−0.5", "0", "0.5", "1"])
    ax.set_xlabel("−1: opposite order, 1: same order")
    for edge in np.arange(0.5, len(rows) - 1):
        ax.axhline(edge, color=GRID, linewidth=0.6, zorder=0)


def _legend(ax: Axes, kinds: Sequence[str], *, own: bool) -> None:
    keys: list[Line2D | Patch] = [
        Line2D([], [], linestyle="none", label=measure_name(kind), **_look(i)) for i, kind in enumerate(kinds)
    ]
    ring: Look = {"marker": "o", "mfc": "none", "mec": INK, "markersize": 9, "linestyle": "none"}
    keys += [Line2D([], [], label="beyond chance", **ring)]
    keys += [Patch(facecolor=MISSING, alpha=0.6, label="90 % of chance"), Line2D([], [], color=MUTED, label="95 %")]
    if own:
        spacing: Look = {"ncols": 4, "handletextpad": 0.3, "columnspacing": 1.2}
        ax.figure.legend(handles=keys, loc="outside lower left", **spacing)
    else:
        ax.legend(handles=keys).set_in_layout(False)


def _look(rank: int) -> Look:
    return {"marker": SHAPES[rank % len(SHAPES)], "color": SERIES[rank % len(SERIES)]}


def _distances(ax: Axes, table: pd.DataFrame, rows: Sequence[str]) -> None:
    moved = table.drop_duplicates("layer").set_index("layer")["relative_delta"].reindex(rows)
    ax.barh(range(len(rows)), 100 * moved.fillna(0).to_numpy(dtype=float), height=0.55, color=MUTED)
    ax.set_title("Distance moved")
    ax.set_xlabel("‖delta‖ / ‖zero-shot‖, %")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_color(INK)
