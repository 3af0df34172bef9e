"""Figure 2: OOD accuracy against ID accuracy in logit scale, in the order of the path."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from sharpscope.errors import UsageError
from sharpscope.report.canvas import GRID, INK, MUTED, PAPER, Look, axes, literal, styled
from sharpscope.report.curves import Curve, accuracy
from sharpscope.report.path_figure import styles
from sharpscope.report.verdict import verdict
from sharpscope.report.words import alpha_text, shortened
from sharpscope.result import ScanResult
from sharpscope.table import Array

TICKS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99, 0.997, 0.999)


def plane_figure(result: ScanResult, *, ax: Axes | None = None) -> Axes:
    """Return Axes with one line per OOD set through (ID accuracy, OOD accuracy), crosses for 95 % intervals.

    The logit scale is the one in which models of different strength tend to lie on a line (arXiv 2109.01903).

    Raises
    ------
    UsageError
        If the scan has no OOD set.
    """
    if not result.ood_splits:
        raise UsageError("the ID-OOD plane needs an OOD set, this scan has none", "scan with ood={name: data}")
    with styled():
        plane = axes(ax, (7.2, 4.6))
        plane.set_xscale("logit")
        plane.set_yscale("logit")
        looks = styles(result)
        across = _inside(accuracy(result, result.id_split))
        for split in result.ood_splits:
            _draw(plane, across, _inside(accuracy(result, split)), looks[split])
        _mark_choice(plane, result)
        _finish(plane, result)
        return plane


def _inside(curve: Curve) -> Curve:
    """Return the curve with 0 and 1, which have no logit, moved in to 0.0005 and 0.9995."""
    parts = (np.clip(part, 5e-4, 1 - 5e-4) for part in (curve.value, curve.low, curve.high))
    return Curve(curve.alpha, *parts)


def _reach(curve: Curve) -> Array:
    """Return the arms of the crosses, shape ``(2, alphas)``; the interval holds the value except where it was moved."""
    return np.stack([curve.value - curve.low, curve.high - curve.value]).clip(0)


def _draw(ax: Axes, across: Curve, up: Curve, style: Look) -> None:
    colour, marker = style["color"], style["marker"]
    shared = np.isin(across.alpha, up.alpha)
    across = Curve(across.alpha[shared], across.value[shared], across.low[shared], across.high[shared])
    ax.errorbar(
        across.value,
        up.value,
        yerr=_reach(up),
        xerr=_reach(across),
        fmt="none",
        ecolor=colour,
        alpha=0.3,
        linewidth=0.8,
    )
    ax.plot(across.value, up.value, color=colour, linewidth=1.2, linestyle=style.get("linestyle", "-"))
    between = ~np.isin(across.alpha, (0.0, 1.0))  # a path may lack an end or go beyond
    ax.plot(across.value[between], up.value[between], color=colour, marker=marker, linestyle="none", markersize=3.5)
    for alpha, face in ((0.0, PAPER), (1.0, colour)):
        ax.plot(
            across.value[across.alpha == alpha],
            up.value[across.alpha == alpha],
            color=colour,
            marker=marker,
            markersize=9,
            markerfacecolor=face,
            zorder=4,
        )
    _arrow(ax, across.value, up.value, colour)


def _arrow(ax: Axes, x: Array, y: Array, colour: object) -> None:
    """Put an arrow on the longest step, where there is room for it."""
    if len(x) < 2:
        return
    steps = np.diff(np.log(np.stack([x / (1 - x), y / (1 - y)])), axis=1)
    longest = int(np.hypot(*steps).argmax())
    start, stop = (x[longest], y[longest]), (x[longest + 1], y[longest + 1])
    arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.2, "mutation_scale": 13, "shrinkB": 4}
    ax.annotate("", xy=stop, xytext=start, arrowprops=arrow, zorder=5)


def _mark_choice(ax: Axes, result: ScanResult) -> None:
    advice = verdict(result).recommendation
    if advice is None:
        return
    across = _inside(accuracy(result, result.id_split)).at(advice.alpha)
    for split in result.ood_splits:
        up = _inside(accuracy(result, split)).at(advice.alpha)
        ax.plot(across, up, marker="o", markersize=14, color=INK, fillstyle="none", markeredgewidth=1, zorder=6)


def _finish(ax: Axes, result: ScanResult) -> None:
    for axis, limits in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        _percent_ticks(axis, limits)
    ax.grid(color=GRID)
    ax.set_xlabel(f"ID accuracy on {shortened(result.id_split)} (logit scale)", parse_math=False)
    ax.set_ylabel("OOD accuracy (logit scale)")
    legend = ax.legend(handles=_keys(result), loc="upper left", bbox_to_anchor=(1.01, 1.02))
    literal(legend.get_texts())


def _percent_ticks(axis: Axis, limits: tuple[float, float]) -> None:
    low, high = limits
    step = 0.01 if high - low < 0.06 else 0.02
    fine = [round(i * step, 4) for i in range(1, round(1 / step)) if low <= i * step <= high]
    wide = [tick for tick in TICKS if low <= tick <= high]
    chosen = wide if len(wide) >= 3 else fine
    axis.set_major_locator(FixedLocator(chosen))
    axis.set_major_formatter(FixedFormatter([f"{100 * tick:g} %" for tick in chosen]))
    axis.set_minor_locator(NullLocator())


def _keys(result: ScanResult) -> list[Line2D]:
    looks = styles(result)
    lines = [Line2D([], [], label=shortened(split, 26), **looks[split]) for split in result.ood_splits]
    end: Look = {"color": MUTED, "marker": "s", "linestyle": "none", "markersize": 8}
    lines.append(Line2D([], [], markerfacecolor=PAPER, label="alpha 0: zero-shot (open)", **end))
    lines.append(Line2D([], [], label="alpha 1: fine-tuned (filled)", **end))
    advice = verdict(result).recommendation
    if advice is not None:
        ring: Look = {"color": INK, "marker": "o", "linestyle": "none", "markersize": 11, "fillstyle": "none"}
        lines.append(Line2D([], [], label=f"recommended: {alpha_text(advice.alpha)}", **ring))
    return lines
