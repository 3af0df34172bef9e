"""Figure 10: whether a layer moved far, or along a curved way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator
from matplotlib.transforms import Bbox

from sharpscope.errors import UsageError
from sharpscope.report.canvas import GRID, MUTED, PAPER, SERIES, Look, axes, literal, number_ticks, place_in, styled
from sharpscope.report.curves import layer_grid, measures
from sharpscope.report.words import alpha_text, layer_label, significant
from sharpscope.result import ScanResult
from sharpscope.table import MODEL, Array, reach

SMALL = 7.0  # size of names
SIDES = (("left", 5.0, 3.0), ("right", -5.0, 3.0), ("left", 5.0, -9.0), ("right", -5.0, -9.0), ("center", 0.0, 8.0))
NAMED = 12  # layers with their names beside the dot
KINDS = ("directional", "gauss_newton_directional", "trace", "gauss_newton_trace")  # the first one in the scan is drawn


@dataclass(frozen=True)
class Ways:
    """Distance and curvature of each layer at one alpha, arrays of shape ``(layers,)``.

    ``curvature`` is per unit of way: along the delta where ``along``, else the mean over all directions (the trace by
    the number of weights). ``reach`` is half of its 95 % interval.
    """

    layers: tuple[str, ...]
    alpha: float
    along: bool
    distance: Array
    curvature: Array
    reach: Array

    @property
    def rise(self) -> Array:
        """Half of curvature times distance squared: what the loss would rise by on a parabola of this curvature."""
        return np.asarray(0.5 * self.curvature * self.distance**2)


def ways(result: ScanResult) -> Ways:
    """Return distance and curvature per layer, at the recommended alpha if it was scanned, else the middle one.

    Raises
    ------
    UsageError
        If the scan holds neither a directional measure nor a trace, or no layer moved.
    """
    kind = next((kind for kind in KINDS if kind in measures(result)), None)
    if kind is None:
        raise UsageError("the scan holds no curvature along the delta", "scan with the measure 'directional'")
    grid, facts = layer_grid(result, kind), result.meta["layers"]
    column = grid.alphas.index(_alpha(result, grid.alphas))
    rows = [row for row, name in enumerate(grid.layers) if name in facts and grid.measured[row, column]]
    rows = [row for row in rows if facts[grid.layers[row]]["delta_norm"] > 0]
    if not rows:
        raise UsageError(f"no layer that moved has a {kind} at alpha {grid.alphas[column]:g}", "scan more alphas")
    layers, along = tuple(grid.layers[row] for row in rows), kind.endswith("directional")
    found = result.layers
    draws = found[(found["measure"] == kind) & (found["alpha"] == grid.alphas[column])].set_index("layer")["draws"]
    distance = np.array([float(facts[name]["delta_norm"]) for name in layers])
    unit = distance**2 if along else np.array([float(facts[name]["size"]) for name in layers])
    half = [reach(kind, float(grid.stderr[row, column]), int(draws[grid.layers[row]])) for row in rows]
    return Ways(layers, grid.alphas[column], along, distance, grid.value[rows, column] / unit, np.array(half) / unit)


def _alpha(result: ScanResult, alphas: tuple[float, ...]) -> float:
    middle = alphas[len(alphas) // 2]
    if not {0.0, 1.0} <= {alpha for alpha, _ in result.correct} or min(map(len, result.correct.values())) < 2:
        return middle
    chosen = result.recommend().alpha
    return chosen if chosen in alphas else middle


def distance_figure(result: ScanResult, *, ax: Axes | None = None) -> Axes:
    """Return Axes with a dot a layer: distance moved (across) and curvature per unit of way (up), both logarithmic.

    Curvature is along the layer's own delta if the scan holds ``directional``, else the mean over all directions
    (``trace``). On a thin line distance and curvature would raise the loss alike. An open dot has a negative
    curvature, drawn at its size. Bars are 95 %.

    Raises
    ------
    UsageError
        If the scan holds neither measure.
    """
    found, order = ways(result), list(result.meta["layers"])
    with styled():
        made = axes(ax, (7.2, 4.6))
        size = np.abs(found.curvature)
        for i, layer in enumerate(found.layers):
            if size[i] > 0:
                _dot(made, found, i, size[i], place_in(layer, order, "dot"))
        made.set_xscale("log")
        made.set_yscale("log")
        _finish(made, found)
        _names(made, found)
        return made


def _dot(ax: Axes, found: Ways, i: int, size: float, gid: str | None) -> None:
    half = float(found.reach[i])
    if np.isfinite(half) and half > 0:
        ax.plot(
            [found.distance[i]] * 2, [max(size - half, size / 10), size + half], color=MUTED, linewidth=0.9, zorder=1
        )
    look: Look = {"marker": "o", "color": SERIES[0], "markersize": 6, "linestyle": "none"}
    (dot,) = ax.plot(found.distance[i], size, **look, mfc=SERIES[0] if found.curvature[i] > 0 else PAPER, zorder=3)
    dot.set_gid(gid)


def _finish(ax: Axes, found: Ways) -> None:
    left, right = ax.get_xlim()
    low, high = ax.get_ylim()
    places = np.geomspace(left, right, 30)
    rises = np.abs(found.rise)[np.abs(found.rise) > 0]
    for level in np.geomspace(rises.min(), rises.max(), 4) if len(rises) else ():
        ax.plot(places, 2 * level / places**2, color=GRID, linewidth=0.9, zorder=0)
    ax.set_xlim(left, right)
    ax.set_ylim(low, high)
    _number_axes(ax)
    ax.set_xlabel("distance moved, ‖delta‖ of the layer")
    kind = "curvature along the layer's own delta" if found.along else "mean curvature (trace by number of weights)"
    ax.set_ylabel(f"{kind}\nat alpha {alpha_text(found.alpha)}, per unit of way squared")
    ax.set_title("Thin lines: the same rise of loss; open dots: negative curvature", fontweight="normal", fontsize=8.5)


def _names(ax: Axes, found: Ways) -> None:
    """Name the layers that weigh most, each on the first side of its dot where no other name stands, if any."""
    ranked = np.argsort(-np.abs(found.rise), kind="stable")[:NAMED]
    taken: list[Bbox] = []
    for i in ranked:
        if found.curvature[i] != 0 and found.layers[i] != MODEL:
            place, text = (found.distance[i], abs(found.curvature[i])), layer_label(found.layers[i], 28)
            dot = ax.transData.transform(place) * 72 / ax.figure.dpi
            free = (side for side in SIDES if not _box(dot, text, side).count_overlaps(taken))
            if (side := next(free, None)) is None:
                continue
            taken.append(_box(dot, text, side))
            offset: Look = {"textcoords": "offset points", "xytext": side[1:], "ha": side[0], "fontsize": SMALL}
            literal([ax.annotate(text, place, **offset)])


def _box(dot: Array, text: str, side: tuple[str, float, float]) -> Bbox:
    """Return about where a name would stand, in points."""
    width, (x, y) = 0.62 * SMALL * len(text), dot + side[1:]
    left = x - {"left": 0.0, "center": 0.5, "right": 1.0}[side[0]] * width
    return Bbox.from_bounds(left, y, width, SMALL)


def _number_axes(ax: Axes) -> None:
    for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        ticks = number_ticks(low, high)
        axis.set_ticks(ticks, [significant(tick) for tick in ticks])
        axis.set_minor_locator(NullLocator())
