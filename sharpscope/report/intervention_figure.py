"""Figure 6: what moving only one layer does to accuracy, beside random moves as long."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from sharpscope.errors import UsageError
from sharpscope.report.canvas import (
    GRID,
    INK,
    MUTED,
    PAPER,
    SERIES,
    Look,
    Panels,
    layer_axis,
    layer_rows,
    panels,
    styled,
)
from sharpscope.report.curves import depth_order
from sharpscope.result import ScanResult
from sharpscope.stragglers.effects import MEAN_OOD
from sharpscope.stragglers.standing import NECESSARY

ROWS = 40  # layers shown at most: those with the largest effects
HOW = "run it again with --interventions (interventions=True in scan): each layer is then moved alone"
OOD_LOOK: Look = {"marker": "o", "color": SERIES[0], "linestyle": "none", "markersize": 5}
ID_LOOK: Look = {"marker": "s", "color": INK, "linestyle": "none", "markersize": 3.5}
CONTROL_LOOK: Look = {"marker": "D", "color": MUTED, "linestyle": "none", "markersize": 3.5, "mfc": PAPER}


def bases(result: ScanResult) -> list[tuple[str, str]]:
    """Return the question and the base of each panel, in the order of the frame."""
    found = result.interventions[["question", "base"]].drop_duplicates()
    return [(str(question), str(base)) for question, base in found.itertuples(index=False)]


def intervention_figure(result: ScanResult, *, ax: Sequence[Axes] | None = None) -> Panels:
    """Return one Axes per base: the change of OOD and ID accuracy in points when only this layer is moved.

    ``necessary`` moves a layer back to zero-shot in the base named, ``sufficient`` moves it to fine-tuned in the
    zero-shot model. Bars are paired 95 % intervals; the open diamond below is the mean effect of random moves of equal
    length, its bar holds the spread over directions too. Filled: the effect is off zero and beats the control.

    Raises
    ------
    UsageError
        If no interventions were run.
    """
    if result.interventions.empty:
        raise UsageError("interventions were not run in this scan", HOW)
    frame, order, asked = result.interventions, list(result.meta["layers"]), bases(result)
    target = MEAN_OOD if (frame["split"] == MEAN_OOD).any() else result.id_split
    kept = frame[frame["split"] == target].groupby("layer")["effect"].apply(lambda e: e.abs().max())
    shown = set(kept.sort_values(ascending=False, kind="stable").head(ROWS).index)
    rows = [name for name in depth_order(result) if name in shown]
    with styled():
        made = panels(ax, (1, len(asked)), (7.8, 1.5 + 0.3 * len(rows)), sharey=True)
        for panel, (question, base) in zip(made, asked, strict=True):
            chosen = frame[(frame["question"] == question) & (frame["base"] == base)]
            _panel(panel, chosen, rows, target, result.id_split)
            way = "to zero-shot" if question == NECESSARY else "to fine-tuned"
            panel.set_title(f"{question.capitalize()}:\none layer {way}\nin the {_in_words(base)}")
        layer_axis(made[0], rows, order)
        for panel in made:
            layer_rows(panel, rows, order)
        _legend(made[0], target, own=ax is None)
        return made


def _in_words(base: str) -> str:
    return f"mix at {base}" if base.startswith("alpha") else f"{base} model"


def _panel(ax: Axes, frame: pd.DataFrame, rows: Sequence[str], target: str, id_split: str) -> None:
    aimed = frame[frame["split"] == target].set_index("layer").reindex(rows)
    _bars(ax, aimed, ("effect", "low", "high"), -0.18, OOD_LOOK, aimed["supported"].eq(True).to_numpy())
    _bars(ax, aimed, ("control", "control_low", "control_high"), 0.25, CONTROL_LOOK, np.zeros(len(rows), dtype=bool))
    if target != id_split:
        own = frame[frame["split"] == id_split].set_index("layer").reindex(rows)
        _bars(ax, own, ("effect", "low", "high"), 0.04, ID_LOOK, own["supported"].eq(True).to_numpy())
    ax.axvline(0, color=MUTED, linewidth=0.8, zorder=0)
    ax.set_xlabel("change in accuracy, points")
    for edge in np.arange(0.5, len(rows) - 1):
        ax.axhline(edge, color=GRID, linewidth=0.6, zorder=0)


def _bars(
    ax: Axes, found: pd.DataFrame, names: tuple[str, str, str], shift: float, look: Look, full: np.ndarray
) -> None:
    value, low, high = (found[name].to_numpy(dtype=float) for name in names)
    places = np.arange(len(found)) + shift
    known = np.isfinite(low) & np.isfinite(high)
    ax.hlines(places[known], low[known], high[known], color=look["color"], linewidth=1)
    for mask, face in ((full, look["color"]), (~full, PAPER)):
        if mask.any():
            ax.plot(value[mask], places[mask], **{**look, "mfc": face})


def _legend(ax: Axes, target: str, *, own: bool) -> None:
    first = "mean OOD" if target == MEAN_OOD else "ID"
    keys = [Line2D([], [], label=f"{first} (filled: beats zero and the control)", **OOD_LOOK)]
    keys += [Line2D([], [], label="ID", **{**ID_LOOK, "mfc": PAPER})] if target == MEAN_OOD else []
    keys += [Line2D([], [], label="random moves as long (control)", **CONTROL_LOOK)]
    if own:
        ax.figure.legend(handles=keys, loc="outside lower left", ncols=3, handletextpad=0.3)
    else:
        ax.legend(handles=keys).set_in_layout(False)
