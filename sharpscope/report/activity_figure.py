"""Figure 12: what Selective Projection Decay held back, by layer and time, beside how far each layer got."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.patches import Patch, Rectangle

from sharpscope.errors import UsageError
from sharpscope.optim.activity import Audit, sentence
from sharpscope.report.canvas import GRID, INK, MARK, MISSING, MUTED, PAPER, Panels, literal, panels, styled
from sharpscope.report.words import layer_label, percent
from sharpscope.table import Array

MOST = 40  #: windows drawn; a longer log is joined into so many


def activity_figure(audit: Audit, *, ax: Sequence[Axes] | None = None) -> Panels:
    """Return two Axes by layer: the share of tensor-steps held back over the steps, and the distance in the end.

    Hatched: the gradient pulled back (c < 0) but no step of the window grew the distance, so the plain step stood.
    Grey: no decision was made (lambda 0, or no gradient).

    Raises
    ------
    UsageError
        If the log has no entry yet.
    """
    table = audit.activity
    if table.empty:
        raise UsageError("the audit log has no entry yet", "train for as many steps as every=..., or close the log")
    layers, steps = list(dict.fromkeys(table["layer"])), sorted(set(table["step"]))
    with styled():
        made = panels(ax, (1, 2), (7.8, 1.6 + 0.26 * len(layers)), sharey=True, width_ratios=(2.1, 1))
        _shares(made[0], _windows(table, layers, steps), steps, own=ax is None)
        made[0].set_yticks(range(len(layers)), [layer_label(layer) for layer in layers])
        literal(made[0].get_yticklabels())
        _distances(made[1], table, layers)
        return made


def activity_answer(audit: Audit) -> str:
    """Return the answer under the figure, also its alternative text."""
    return sentence(audit.activity)


def _windows(table: pd.DataFrame, layers: list[str], steps: list[int]) -> dict[str, Array]:
    """Return decisions, gated and active as (layers, windows)."""
    size = -(-len(steps) // MOST)
    place = {step: i // size for i, step in enumerate(steps)}
    sums = table.assign(window=table["step"].map(place)).groupby(["layer", "window"])
    found = sums[["decisions", "gated", "active"]].sum().unstack("window", fill_value=0).reindex(layers).fillna(0)
    return {name: found[name].to_numpy(dtype=float) for name in ("decisions", "gated", "active")}


def _shares(ax: Axes, counts: dict[str, Array], steps: list[int], *, own: bool) -> None:
    decided, gated, active = counts["decisions"], counts["gated"], counts["active"]
    share = np.where(decided > 0, active / np.where(decided > 0, decided, 1), np.nan)
    colours = ListedColormap(mpl.colormaps["YlGnBu"](np.linspace(0, 0.8, 256)), "held back").with_extremes(bad=MISSING)
    top = float(np.nanmax(share, initial=0.01))
    scale = Normalize(0, top)
    ax.imshow(share, cmap=colours, norm=scale, aspect="auto", interpolation="nearest")
    for row, column in np.argwhere((gated > 0) & (active == 0)):
        ax.add_patch(_hatch(float(column) - 0.5, float(row) - 0.5))
    size = -(-len(steps) // MOST)
    ends = [steps[min(i + size, len(steps)) - 1] for i in range(0, len(steps), size)]
    shown = range(0, len(ends), -(-len(ends) // 8))
    ax.set_xticks(list(shown), [f"{ends[i]:,}" for i in shown])
    ax.set_xlabel("optimiser step")
    ax.set_title("Tensor-steps held back")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    bar = ax.figure.colorbar(ScalarMappable(scale, colours), ax=ax, location="top", fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_ticks([0, top], labels=["0 %", percent(top, 0 if top >= 0.1 else 1)])
    if own and ((gated > 0) & (active == 0)).any():
        words = "c < 0, but no step grew the distance"
        key = Patch(facecolor=PAPER, edgecolor=MARK, hatch="////", linewidth=0, label=words)
        ax.figure.legend(handles=[key], loc="outside lower left")


def _hatch(x: float, y: float) -> Rectangle:
    return Rectangle((x, y), 1, 1, fill=False, hatch="////", edgecolor=MARK, linewidth=0)


def _distances(ax: Axes, table: pd.DataFrame, layers: list[str]) -> None:
    last = table[table["step"] == table["step"].max()].set_index("layer").reindex(layers)
    relative = last["relative_distance"].to_numpy(dtype=float)
    absolute = bool(np.isnan(relative).all())
    values = last["distance"].to_numpy(dtype=float) if absolute else 100 * relative
    ax.barh(range(len(layers)), np.nan_to_num(values), height=0.55, color=MUTED)
    ax.set_title("Distance in the end")
    ax.set_xlabel("‖theta − anchor‖" if absolute else "‖theta − anchor‖ / ‖anchor‖, %")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_color(INK)
    ax.grid(axis="x", color=GRID)
    for row in np.flatnonzero(np.isnan(values)):
        ax.text(0, int(row), " unknown", va="center", color=MUTED, fontsize=8)
