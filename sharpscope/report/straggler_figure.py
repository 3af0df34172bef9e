"""Straggler figure: which layers' sharpness runs with the OOD error, beside how far each layer moved."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from sharpscope.errors import UsageError
from sharpscope.report.canvas import GRID, INK, MUTED, PAPER, SERIES, SHAPES, Look, Panels, literal, panels, styled
from sharpscope.report.curves import depth_order, measures
from sharpscope.report.words import layer_name, measure_name, shortened
from sharpscope.result import ScanResult
from sharpscope.stragglers.wording import CO_MOVES

ROWS = 60  # layers shown at most


def straggler_figure(result: ScanResult, *, ax: Sequence[Axes] | None = None) -> Panels:
    """Return two Axes by layer: rank correlation of sharpness with the OOD error, and the relative distance moved.

    Of a partition with very many layers those with the largest absolute tau are shown.
    Filled markers co-move (absolute tau of at least one half, above the noise of the measurement), open ones do not or
    are undecided. No test is implied: the points of one path are not independent.

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
    kinds = measures(result)
    with styled():
        made = panels(
            ax, (1, 2), (7.8, 1.4 + max(0.3, 0.08 * len(kinds)) * len(rows)), sharey=True, width_ratios=(2.1, 1)
        )
        _rows_to_highlight(made[0], rows, list(result.meta["layers"]))
        for i, kind in enumerate(kinds):
            _dots(made[0], table[table["measure"] == kind], rows, (i - (len(kinds) - 1) / 2) * 0.8 / len(kinds), i)
        _finish_dots(made[0], rows, kinds, own=ax is None)
        _distances(made[1], table, rows)
        return made


def _rows_to_highlight(ax: Axes, rows: Sequence[str], order: Sequence[str]) -> None:
    for row, layer in enumerate(rows):
        if layer in order:
            band = Rectangle((-1.08, row - 0.5), 2.16, 1, facecolor="none", edgecolor="none", zorder=5)
            band.set_gid(f"layer-{order.index(layer)}-row")
            ax.add_patch(band)


def _dots(ax: Axes, table: pd.DataFrame, rows: Sequence[str], shift: float, rank: int) -> None:
    for found in table.itertuples():
        face = SERIES[rank % len(SERIES)] if str(found.verdict).startswith("co-moves") else PAPER
        look = {**_look(rank), "markerfacecolor": face}
        ax.plot([found.tau], [rows.index(str(found.layer)) + shift], markersize=5, zorder=3, clip_on=False, **look)


def _finish_dots(ax: Axes, rows: Sequence[str], kinds: Sequence[str], *, own: bool) -> None:
    ax.set_title("Kendall's tau with the mean OOD error")
    for side in (-1, 1):
        ax.axvspan(side * CO_MOVES, side * 1.08, color=GRID, alpha=0.45, linewidth=0, zorder=0)
    ax.axvline(0, color=MUTED, linewidth=0.8)
    ax.set_xlim(-1.08, 1.08)
    ax.set_xticks([-1, -0.5, 0, 0.5, 1], ["−1", "−0.5", "0", "0.5", "1"])
    ax.set_xlabel("−1: opposite order, 1: same order; filled: co-moves")
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_yticks(range(len(rows)), [shortened(layer_name(name)) for name in rows])
    literal(ax.get_yticklabels())
    for edge in np.arange(0.5, len(rows) - 1):
        ax.axhline(edge, color=GRID, linewidth=0.6, zorder=0)
    keys = [Line2D([], [], linestyle="none", label=measure_name(kind), **_look(i)) for i, kind in enumerate(kinds)]
    if own:
        spacing: Look = {"ncols": 4 if len(keys) <= 4 else 3, "handletextpad": 0.1, "columnspacing": 1.2}
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
