"""Figure 1: accuracy and loss along the path."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, NullLocator

from sharpscope.report.canvas import (
    DASHES,
    GRID,
    INK,
    MUTED,
    SERIES,
    SHAPES,
    Look,
    Panels,
    alpha_axis,
    literal,
    number_ticks,
    panels,
    styled,
)
from sharpscope.report.curves import Curve, accuracy, loss, mean_ood
from sharpscope.report.verdict import MEAN_OOD, Verdict, verdict
from sharpscope.report.words import alpha_text, shortened, significant
from sharpscope.result import ScanResult


def path_figure(result: ScanResult, *, ax: Sequence[Axes] | None = None) -> Panels:
    """Return two Axes: accuracy (upper) and loss (lower, logarithmic) over alpha, ID bold, OOD thin, 95 % bands."""
    with styled():
        upper, lower = made = panels(ax, (2, 1), (7.6, 5.6), sharex=True, height_ratios=(1.5, 1))
        for split, style in styles(result).items():
            _draw(upper, accuracy(result, split), style, shortened(split, 26))
            _draw(lower, _positive(loss(result, split)), style, shortened(split, 26))
        if len(result.ood_splits) > 1:
            mean = mean_ood(result)
            upper.plot(mean.alpha, mean.value, color=MUTED, linewidth=2.2, linestyle=(0, (2, 1)), label=MEAN_OOD)
        _mark_choice(made, verdict(result))
        _finish_accuracy(upper, own=ax is None)
        _finish_loss(lower)
        alpha_axis(lower, result.meta["alphas"])
        return made


def styles(result: ScanResult) -> dict[str, Look]:
    """Return how each split's line looks: ID first, bold and dark; colour, marker and dash tell the OOD sets apart."""
    found: dict[str, Look] = {
        result.id_split: {"color": INK, "marker": "o", "linewidth": 2.6, "markersize": 5, "zorder": 3}
    }
    for i, split in enumerate(result.ood_splits):
        dash = DASHES[i // len(SERIES) % len(DASHES)]
        found[split] = {"color": SERIES[i % len(SERIES)], "marker": SHAPES[i % len(SHAPES)], "linestyle": dash}
    return found


def _draw(ax: Axes, curve: Curve, style: Look, label: str) -> None:
    ax.plot(curve.alpha, curve.value, label=label, **style)
    ax.fill_between(curve.alpha, curve.low, curve.high, color=style["color"], alpha=0.14, linewidth=0)


def _positive(curve: Curve) -> Curve:
    """Return the curve for a logarithmic axis: no zeros, and no band that reaches below a tenth of the value."""
    value = np.where(curve.value > 0, curve.value, np.nan)
    return Curve(curve.alpha, value, np.fmax(curve.low, value / 10), curve.high)


def _mark_choice(made: Panels, found: Verdict) -> None:
    if found.recommendation is None:
        return
    chosen = found.recommendation.alpha
    for i, ax in enumerate(made):
        label = f"recommended: {alpha_text(chosen)}" if i == 0 else None
        ax.axvline(chosen, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1, label=label)


def _finish_accuracy(ax: Axes, *, own: bool) -> None:
    ax.set_title("Accuracy")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    ax.grid(axis="y", color=GRID)
    how: Look = {"title": "data set, 95 % bands", "alignment": "left"}
    if own:  # of the figure: beside both panels, where that of one would take its height for a long list
        legend = ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside right upper", **how)
    else:
        legend = ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), **how)
    literal(legend.get_texts())


def _finish_loss(ax: Axes) -> None:
    ax.set_title("Loss (logarithmic)")
    ax.grid(axis="y", color=GRID)
    if not np.isfinite(ax.dataLim.get_points()).all():
        return
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ticks = number_ticks(low, high)
    ax.yaxis.set_major_locator(FixedLocator(ticks))
    ax.yaxis.set_major_formatter(FixedFormatter([significant(tick) for tick in ticks]))
    ax.yaxis.set_minor_locator(NullLocator())
