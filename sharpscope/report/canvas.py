"""Figures without pyplot: colours, rc settings for the time of one drawing, panels that show themselves in a notebook.

pyplot keeps global state and decides on a backend; a plain Figure does neither, but notebooks do not display it.
The Axes made here therefore carry their own picture.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from sharpscope.errors import UsageError
from sharpscope.report.words import alpha_text, layer_label

INK = "#1b1f24"
MUTED = "#5b6470"
GRID = "#dfe3e8"
PAPER = "#ffffff"
MISSING = "#b9bfc7"  #: grey: not measured
MARK = "#1c2733"  #: hatching on colour: the same in light and dark, unlike INK
SERIES = ("#0072b2", "#d55e00", "#00795a", "#a8477f", "#8a6d00", "#3a94c9")  # after Okabe and Ito, darkened for lines
SHAPES = ("s", "^", "D", "v", "P", "X", "*")  # one more than colours: together 42 looks
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)))

Look = dict[str, Any]  #: how a line or marker is drawn: keywords of matplotlib

_RC: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": PAPER,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": PAPER,
    "hatch.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "patch.linewidth": 0.6,
}


def styled() -> AbstractContextManager[None]:
    """Return the context in which a figure is drawn; the caller's rc settings are back after it."""
    return mpl.rc_context(_RC)  # type: ignore[arg-type] # newer stubs list every key


def _picture(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


class ShownAxes(Axes):
    """Axes that a notebook displays."""

    def _repr_png_(self) -> bytes:
        return _picture(self.figure)


class Panels(np.ndarray[Any, Any]):
    """An array of Axes that a notebook displays."""

    def _repr_png_(self) -> bytes:
        return _picture(self.flat[0].figure)


def axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Return the given Axes, or those of a new figure of that size in inches; ``UsageError`` for several."""
    if isinstance(ax, Axes):
        return ax
    if ax is not None:
        raise UsageError(
            f"this figure has one panel, but ax is a {type(ax).__name__}", "one Axes: ax=plt.subplots()[1]"
        )
    return Figure(figsize=size, layout="constrained").add_subplot(axes_class=ShownAxes)


def panels(ax: Sequence[Axes] | None, shape: tuple[int, int], size: tuple[float, float], **layout: Any) -> Panels:
    """Return the given Axes as an array, or those of a new figure with rows x columns panels.

    Raises
    ------
    UsageError
        If the number of given Axes is not the number of panels.
    """
    needed = shape[0] * shape[1]
    if ax is None:
        figure = Figure(figsize=size, layout="constrained")
        made = figure.subplots(*shape, squeeze=False, subplot_kw={"axes_class": ShownAxes}, **layout)
    else:
        made = np.asarray(ax, dtype=object)
        if made.size != needed:
            raise UsageError(
                f"this figure has {needed} panels, but ax holds {made.size} Axes",
                f"pass an array of {needed} Axes, e.g. ax=plt.subplots({needed})[1]",
            )
    return np.asarray(made, dtype=object).reshape(-1).view(Panels)


def literal(texts: Iterable[Text]) -> None:
    """Make texts with names in them show a dollar sign as such instead of reading it as a formula."""
    for text in texts:
        text.set_parse_math(False)


def alpha_axis(ax: Axes, alphas: Sequence[float], places: Sequence[float] | None = None, *, digits: float = 58) -> None:
    """Label the x axis with the alphas and say which end is which; ``places`` if alpha is not the coordinate.

    Of labels that would touch some are left out, never those of the two models; ``digits`` is how many digits fit
    side by side between the first place and the last.
    """
    where = list(places or alphas)
    kept = _legible(alphas, where, digits / ((max(where) - min(where)) or 1))
    ax.set_xticks([where[i] for i in kept], [_ENDS.get(alphas[i], alpha_text(alphas[i])) for i in kept])
    ax.set_xlabel("alpha, from 0 (zero-shot) to 1 (fine-tuned)")


_ENDS = {0.0: "0\nzero-shot", 1.0: "1\nfine-tuned"}


def _legible(alphas: Sequence[float], where: Sequence[float], scale: float) -> list[int]:
    """Return which labels to write: both ends and every second, third, ... of the others, so that none touch."""

    def clear(one: int, other: int) -> bool:
        widths = (len(alpha_text(alphas[i])) for i in (one, other))
        return scale * abs(where[one] - where[other]) >= sum(widths) / 2 + 0.5

    every = range(len(alphas))
    ends = [i for i in every if alphas[i] in _ENDS]
    free = [i for i in every if all(i != end and clear(i, end) for end in ends)]
    shares = ([i for i in every[::step] if i in free] for step in range(1, len(alphas) + 1))
    others = next((share for share in shares if all(clear(*pair) for pair in pairwise(share))), [])
    return sorted([*ends, *others])


def place_in(layer: str, order: Sequence[str], part: str) -> str | None:
    """Return the id that ties a drawn element to a layer: the page highlights all of one number together."""
    return f"layer-{order.index(layer)}-{part}" if layer in order else None


def layer_axis(
    ax: Axes, layers: Sequence[str], order: Sequence[str], *, names: Sequence[str] | None = None, longest: int = 40
) -> None:
    """Give each layer a row from the top with its name; name and row can be picked in the page."""
    ax.set_ylim(len(layers) - 0.5, -0.5)
    ax.set_yticks(range(len(layers)), [layer_label(name, longest) for name in names or layers])
    labels = ax.get_yticklabels()
    literal(labels)
    for layer, label in zip(layers, labels, strict=True):
        label.set_gid(place_in(layer, order, "label"))


def layer_rows(ax: Axes, layers: Sequence[str], order: Sequence[str]) -> None:
    """Lay an unseen frame over each layer's row, as wide as the axis is now."""
    left, right = ax.get_xlim()
    for row, layer in enumerate(layers):
        if layer in order:
            size = (right - left, 1)
            frame = Rectangle((left, row - 0.5), *size, facecolor="none", edgecolor="none", zorder=5, clip_on=False)
            frame.set_gid(place_in(layer, order, "row"))
            ax.add_patch(frame)


def number_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers within the range for a logarithmic axis, at most ``most``; evenly spaced in a short one."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for mantissas in ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0,)):
        found = [m * 10.0**d for d in decades for m in mantissas if low <= m * 10.0**d <= high]
        if len(found) < 2:
            return [float(tick) for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
        if len(found) <= most:
            return found
    return found[:: -(-len(found) // most)]
