"""Figure 7: the alpha that each layer gets in the best recipe tried, against the best uniform one."""

from __future__ import annotations

from matplotlib.axes import Axes

from sharpscope.report.canvas import GRID, INK, MUTED, PAPER, SERIES, axes, layer_axis, layer_rows, styled
from sharpscope.report.choices import best_recipe
from sharpscope.report.words import alpha_text
from sharpscope.result import ScanResult

ROWS = 60  # layers shown at most: those furthest from the uniform alpha


def recipe_figure(result: ScanResult, *, ax: Axes | None = None) -> Axes:
    """Return Axes by layer: alpha of the best recipe tried, chosen on one half of the images.

    The dashed line is the best uniform alpha, the band the uniform alphas that these images cannot tell from it. Filled
    dots leave the band. Whether the recipe is worth it is the question of :func:`pareto_figure`.

    Raises
    ------
    UsageError
        If no recipes were tried.
    """
    advice, recipe, _ = best_recipe(result)
    order = list(result.meta["layers"])
    alphas = recipe.alphas(order)
    far = sorted(order, key=lambda layer: -abs(alphas[layer] - advice.alpha))[:ROWS]
    rows = [layer for layer in order if layer in far]
    low, high = min(advice.ties), max(advice.ties)
    with styled():
        made = axes(ax, (7.4, 1.6 + 0.24 * len(rows)))
        made.axvspan(low, high, color=GRID, alpha=0.7, linewidth=0, zorder=0, label="not told apart from it")
        label = f"best uniform alpha: {alpha_text(advice.alpha)}"
        made.axvline(advice.alpha, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1, label=label)
        for row, layer in enumerate(rows):
            value = alphas[layer]
            made.hlines(row, min(value, advice.alpha), max(value, advice.alpha), color=MUTED, linewidth=1.2, zorder=2)
            face = PAPER if low <= value <= high else SERIES[0]
            made.plot([value], [row], marker="o", color=SERIES[0], mfc=face, markersize=6, zorder=3, clip_on=False)
        made.set_xlabel("alpha of the layer: 0 stays zero-shot, 1 is fine-tuned")
        made.set_xlim(min(-0.05, *alphas.values()), max(1.05, *alphas.values()))
        made.grid(axis="y", color=GRID)
        layer_axis(made, rows, order)
        layer_rows(made, rows, order)
        made.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02))
        return made
