"""Figure 8: is an alpha per layer worth it? ID against OOD accuracy of everything that was tried."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from sharpscope.errors import UsageError
from sharpscope.report.canvas import GRID, INK, PAPER, SERIES, SHAPES, Look, axes, literal, styled
from sharpscope.report.choices import quoted
from sharpscope.report.words import shortened
from sharpscope.result import ScanResult

UNIFORM: Look = {"color": INK, "marker": "o", "linewidth": 1.4, "markersize": 4}


def pareto_figure(result: ScanResult, *, ax: Axes | None = None) -> Axes:
    """Return Axes with ID (across) and mean OOD accuracy (up) of uniform alphas, recipes, and resets of one layer.

    All are scored on the half of the images that nothing was chosen on. Crosses are 95 % intervals of the best uniform
    alpha and of the recipe chosen, which alone are honest quotes: the best of the other dots would be picked by what it
    is judged by.

    Raises
    ------
    UsageError
        If the scan has no OOD set, or a set has a single image.
    """
    table = result.recipes
    if not result.ood_splits or table.empty:
        raise UsageError("the trade of ID for OOD accuracy needs an OOD set", "scan with ood={name: data}")
    with styled():
        made = axes(ax, (7.4, 4.4))
        uniform = table[table["kind"] == "uniform"]
        made.plot(uniform["id"], uniform["ood"], label=f"uniform alpha ({len(uniform)})", zorder=3, **UNIFORM)
        for rank, (kind, found) in enumerate(table[table["kind"] != "uniform"].groupby("kind", sort=False)):
            look: Look = {"marker": SHAPES[rank % len(SHAPES)], "color": SERIES[rank % len(SERIES)], "mfc": PAPER}
            label = f"{shortened(str(kind), 26)} ({len(found)})"
            made.plot(found["id"], found["ood"], linestyle="none", zorder=2, label=label, **look)
        _crosses(made, table)
        made.set_xlabel("ID accuracy, %")
        made.set_ylabel("mean OOD accuracy, %")
        made.grid(color=GRID)
        title = "tried, scored on the half\nthat nothing was chosen on"
        title += "" if len(uniform) < len(table) else "\n(no recipes were tried)"
        spacing: Look = {"alignment": "left", "labelspacing": 0.8}  # rings are higher than a line
        legend = made.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), title=title, **spacing)
        literal(legend.get_texts())
        return made


def _crosses(ax: Axes, table: pd.DataFrame) -> None:
    for (label, row), colour in zip(quoted(table), (INK, SERIES[1]), strict=False):
        place = (float(row["id"]), float(row["ood"]))
        arms = [
            np.clip([[row[name] - row[f"{name}_low"]], [row[f"{name}_high"] - row[name]]], 0, None)
            for name in ("id", "ood")
        ]
        ax.errorbar(*place, xerr=arms[0], yerr=arms[1], fmt="none", ecolor=colour, elinewidth=0.9, alpha=0.7)
        ring: Look = {"marker": "o", "mfc": "none", "mec": colour, "markersize": 13, "linestyle": "none"}
        ax.plot(*place, label=f"{label}: {shortened(str(row['recipe']), 20)}", zorder=5, **ring)
