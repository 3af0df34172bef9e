"""Figure 3: one measure by layer and alpha, beside its ratio to alpha 0."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from sharpscope.report.canvas import (
    INK,
    MARK,
    MISSING,
    PAPER,
    Look,
    Panels,
    alpha_axis,
    layer_axis,
    layer_rows,
    number_ticks,
    panels,
    styled,
)
from sharpscope.report.curves import LIMIT, Grid, heat_grid
from sharpscope.report.words import layer_name, measure_name, significant, titled
from sharpscope.result import ScanResult
from sharpscope.table import Array

SWATCH = "#bfe3dc"  #: any colour of the scale: under the hatching in the legend


def heatmap_figure(result: ScanResult, measure: str = "trace", *, ax: Sequence[Axes] | None = None) -> Panels:
    """Return two Axes, layers in depth order by alpha: the measure in logarithmic colour, and its ratio to alpha 0.

    Hatched: relative standard error above 30 % or not converged. Grey: not measured. A minus sign on white: the
    estimate is zero or negative and has no logarithm; its size is in the layer table.

    Raises
    ------
    UsageError
        If the scan holds no such measure.
    """
    grid = heat_grid(result, measure)
    names = [_label(name, result, grid) for name in grid.layers]
    with styled():
        made = panels(ax, (1, 2), (7.8, 1.75 + 0.235 * len(grid.layers)), sharey=True)
        first, second = made
        _absolute(first, grid)
        _ratio(second, grid)
        for panel in made:
            alpha_axis(panel, grid.alphas, list(map(float, range(len(grid.alphas)))), digits=_room(names))
            panel.set_xlabel("alpha")
            panel.spines[:].set_visible(False)
            panel.tick_params(length=0, left=False)
            layer_rows(panel, grid.layers, list(result.meta["layers"]))
        layer_axis(first, grid.layers, list(result.meta["layers"]), names=names)
        _legend(first, grid, own=ax is None)
        return made


def _room(names: Sequence[str]) -> float:
    """Return how many digits fit side by side below a panel: two of them share what the names of layers leave."""
    return 46 - min(40, max(map(len, names))) / 2


def _label(layer: str, result: ScanResult, grid: Grid) -> str:
    unused = layer in result.meta.get("unused", []) and not grid.measured[grid.layers.index(layer)].any()
    return f"{layer} (unused)" if unused else layer_name(layer)


def _absolute(ax: Axes, grid: Grid) -> None:
    sign = ", sign changed" if grid.measure.endswith("lambda_min") else ""
    ax.set_title(titled(measure_name(grid.measure)) + sign, parse_math=False)
    positive = grid.measured & (grid.value > 0)
    known = positive & (grid.relative <= LIMIT)
    trusted = known if known.any() else positive
    _marks(ax, ~grid.measured, grid.measured & ~positive, grid.unsure)
    if not positive.any():
        ax.set_xlim(-0.5, len(grid.alphas) - 0.5)
        ax.set_ylim(len(grid.layers) - 0.5, -0.5)
        return
    low, high = _range(grid.value[trusted])
    colours = _part("YlGnBu", 0.05, 0.75)
    image = _image(ax, np.where(positive, grid.value, np.nan), colours, LogNorm(low, high))
    ticks = number_ticks(low, high)
    _colour_bar(ax, image, ticks, [significant(tick, 2) for tick in ticks])


def _ratio(ax: Axes, grid: Grid) -> None:
    ax.set_title("Ratio to alpha 0")
    base = grid.alphas.index(0.0) if 0.0 in grid.alphas else None
    start = grid.value[:, [base]] if base is not None else np.full((len(grid.layers), 1), np.nan)
    known = grid.measured & np.isfinite(start)
    usable = known & (grid.value > 0) & (start > 0)
    unsure = grid.unsure | (grid.unsure[:, [base]] if base is not None else False)
    _marks(ax, ~known, known & ~usable, usable & unsure)
    with np.errstate(divide="ignore", invalid="ignore"):
        power = np.where(usable, np.log2(np.where(usable, grid.value / start, 1.0)), np.nan)
    sure = usable & (grid.relative <= LIMIT)
    trusted = sure if sure.any() else usable
    limit = max(1, min(8, math.ceil(np.abs(power[trusted]).max(initial=0.0))))
    image = _image(ax, power, _part("RdBu_r", 0.14, 0.86), Normalize(-limit, limit))
    steps = range(-limit, limit + 1, -(-limit // 3))
    _colour_bar(ax, image, list(steps), [_times(step) for step in steps])


def _times(power: int) -> str:
    return f"×{2**power}" if power >= 0 else f"×1/{2**-power}"


def _range(values: Array) -> tuple[float, float]:
    high = float(values.max())
    low = max(float(values.min()), 1e-6 * high)  # an exact zero, 1e-17 after rounding, is not worth ten decades
    return (low, high) if high > 1.05 * low else (low / 1.3, high * 1.3)


def _part(name: str, start: float, stop: float) -> Colormap:
    """Return a colour map without its ends, on which dark hatching would not show."""
    return ListedColormap(mpl.colormaps[name](np.linspace(start, stop, 256)))


def _image(ax: Axes, values: Array, colours: Colormap, norm: Normalize) -> ScalarMappable:
    # An image of one pixel a cell, not a path a cell: a scan by tensor would make a page of many megabytes.
    rgba = colours(norm(np.ma.masked_invalid(values)))
    rgba[~np.isfinite(values), 3] = 0
    ax.imshow((255 * rgba).round().astype(np.uint8), interpolation="none", aspect="auto", zorder=1)
    return ScalarMappable(norm, colours)


def _colour_bar(ax: Axes, image: ScalarMappable, ticks: Sequence[float], labels: Sequence[str]) -> None:
    bar = ax.figure.colorbar(image, ax=ax, location="bottom", fraction=0.05, aspect=40, pad=0.02)
    bar.ax.xaxis.set_major_locator(FixedLocator(ticks))
    bar.ax.xaxis.set_major_formatter(FixedFormatter(labels))
    bar.ax.xaxis.set_minor_locator(NullLocator())
    bar.outline.set_visible(False)


def _cells(mask: Array) -> Path:
    """Return one path around every cell of the mask, so that a pattern costs one element."""
    square = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5)])
    return Path.make_compound_path(*(Path(square + place[::-1], closed=True) for place in np.argwhere(mask)))


def _marks(ax: Axes, missing: Array, not_positive: Array, unsure: Array) -> None:
    if missing.any():
        ax.add_patch(PathPatch(_cells(missing), facecolor=MISSING, edgecolor=PAPER, zorder=2))
    for mask, colour in ((unsure & ~not_positive, MARK), (unsure & not_positive, INK)):
        if mask.any():
            ax.add_patch(PathPatch(_cells(mask), fill=False, hatch="/////", edgecolor=colour, linewidth=0, zorder=3))
    if not_positive.any():
        rows, columns = np.nonzero(not_positive)
        ax.plot(columns, rows, marker="_", linestyle="none", color=INK, markersize=7, markeredgewidth=1.8, zorder=4)


def _legend(ax: Axes, grid: Grid, *, own: bool) -> None:
    keys: list[Patch | Line2D] = [
        Patch(facecolor=SWATCH, edgecolor=MARK, hatch="/////", label="error above 30 % or not converged")
    ]
    if not grid.measured.all():
        keys.append(Patch(facecolor=MISSING, label="not measured"))
    if (grid.measured & (grid.value <= 0)).any():
        minus: Look = {"marker": "_", "linestyle": "none", "color": INK, "markersize": 7, "markeredgewidth": 1.8}
        keys.append(Line2D([], [], label="zero or negative: no logarithm", **minus))
    if own:
        ax.figure.legend(handles=keys, loc="outside lower left", ncols=3)
        return
    below = ax.transAxes + ScaledTranslation(0, -0.5, ax.figure.dpi_scale_trans)
    legend = ax.legend(handles=keys, loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, borderaxespad=0)
    legend.set_in_layout(False)  # as wide as both panels: a layout engine would shrink the first to make room
