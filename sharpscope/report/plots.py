"""The figures of a result as methods."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from sharpscope.report.canvas import Panels
from sharpscope.report.health_figure import health_figure
from sharpscope.report.heatmap_figure import heatmap_figure
from sharpscope.report.path_figure import path_figure
from sharpscope.report.plane_figure import plane_figure
from sharpscope.report.straggler_figure import straggler_figure
from sharpscope.result import ScanResult


class Plots:
    """Figures of one result; each returns matplotlib Axes (an array where there are two), draws into ``ax`` if given.

    Nothing touches pyplot: in a notebook the returned Axes show themselves, elsewhere ``.figure.savefig`` writes them.
    """

    def __init__(self, result: ScanResult) -> None:
        self._result = result

    def path(self, *, ax: Sequence[Axes] | None = None) -> Panels:
        """Return accuracy and loss along the path, see :func:`~sharpscope.report.path_figure.path_figure`."""
        return path_figure(self._result, ax=ax)

    def plane(self, *, ax: Axes | None = None) -> Axes:
        """Return the ID-OOD plane, see :func:`~sharpscope.report.plane_figure.plane_figure`."""
        return plane_figure(self._result, ax=ax)

    def heatmap(self, measure: str = "trace", *, ax: Sequence[Axes] | None = None) -> Panels:
        """Return one measure by layer and alpha, see :func:`~sharpscope.report.heatmap_figure.heatmap_figure`."""
        return heatmap_figure(self._result, measure, ax=ax)

    def health(self, measure: str = "trace", *, ax: Sequence[Axes] | None = None) -> Panels:
        """Return the estimates as draws come in, see :func:`~sharpscope.report.health_figure.health_figure`."""
        return health_figure(self._result, measure, ax=ax)

    def stragglers(self, *, ax: Sequence[Axes] | None = None) -> Panels:
        """Return tau by layer beside distance, see :func:`~sharpscope.report.straggler_figure.straggler_figure`."""
        return straggler_figure(self._result, ax=ax)
