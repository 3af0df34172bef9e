"""The figures of a result as methods."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from sharpscope.optim.activity import Audit, read_audit
from sharpscope.report.activity_figure import activity_figure
from sharpscope.report.agreement_figure import agreement_figure
from sharpscope.report.canvas import Panels
from sharpscope.report.distance_figure import distance_figure
from sharpscope.report.forest_figure import forest_figure
from sharpscope.report.health_figure import health_figure
from sharpscope.report.heatmap_figure import heatmap_figure
from sharpscope.report.intervention_figure import intervention_figure
from sharpscope.report.multiples_figure import multiples_figure
from sharpscope.report.pareto_figure import pareto_figure
from sharpscope.report.path_figure import path_figure
from sharpscope.report.plane_figure import plane_figure
from sharpscope.report.recipe_figure import recipe_figure
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

    def forest(self, *, ax: Sequence[Axes] | None = None) -> Panels:
        """Return tau by layer against chance, see :func:`~sharpscope.report.forest_figure.forest_figure`."""
        return forest_figure(self._result, ax=ax)

    def multiples(self, *, ax: Sequence[Axes] | None = None) -> Panels:
        """Return the curves behind the flags, see :func:`~sharpscope.report.multiples_figure.multiples_figure`."""
        return multiples_figure(self._result, ax=ax)

    def interventions(self, *, ax: Sequence[Axes] | None = None) -> Panels:
        """Return what moving one layer does, see :func:`~sharpscope.report.intervention_figure.intervention_figure`."""
        return intervention_figure(self._result, ax=ax)

    def recipe(self, *, ax: Axes | None = None) -> Axes:
        """Return alpha by layer, see :func:`~sharpscope.report.recipe_figure.recipe_figure`."""
        return recipe_figure(self._result, ax=ax)

    def pareto(self, *, ax: Axes | None = None) -> Axes:
        """Return ID against OOD accuracy of all tried, see :func:`~sharpscope.report.pareto_figure.pareto_figure`."""
        return pareto_figure(self._result, ax=ax)

    def distance(self, *, ax: Axes | None = None) -> Axes:
        """Return distance against curvature, see :func:`~sharpscope.report.distance_figure.distance_figure`."""
        return distance_figure(self._result, ax=ax)

    def agreement(self, *, ax: Axes | None = None) -> Axes:
        """Return rank agreement of the measures, see :func:`~sharpscope.report.agreement_figure.agreement_figure`."""
        return agreement_figure(self._result, ax=ax)

    def activity(self, audit: Audit | str | Path, *, ax: Sequence[Axes] | None = None) -> Panels:
        """Return what SPD held back, see :func:`~sharpscope.report.activity_figure.activity_figure`."""
        return activity_figure(audit if isinstance(audit, Audit) else read_audit(audit), ax=ax)
