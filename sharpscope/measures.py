"""The measures by name, and names to measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Protocol

from sharpscope.curvature.directional import Directional
from sharpscope.curvature.estimate import Estimates
from sharpscope.curvature.lanczos import Eigenvalue
from sharpscope.curvature.point import Point
from sharpscope.curvature.trace import Trace
from sharpscope.errors import UsageError
from sharpscope.partition import Partition
from sharpscope.perturbation import AverageMSharpness, MSharpness


class Measure(Protocol):
    """Settings as a frozen dataclass; called at a point, it yields an estimate for every layer, then for the model.

    All layers at once: sharing between them is where the speed comes from. Draws must depend on the seed, the
    measure, the layer and their number only, so that they are the same at every alpha and curves are smooth.
    """

    @property
    def name(self) -> str:
        """Name in the rows."""

    def __call__(self, point: Point, layers: Partition, seed: int) -> Estimates:
        """Yield layer ids with estimates."""


# With their default settings; anything else is passed as a configured measure.
MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Trace(),
        Eigenvalue(),
        MSharpness(),
        AverageMSharpness(),
        Eigenvalue("min"),
        Directional(),
        Trace(matrix="gauss_newton"),
        Eigenvalue(matrix="gauss_newton"),
        Directional(matrix="gauss_newton"),
        MSharpness(adaptive=True, rho=0.5),
        MSharpness(norm="inf", rho=0.001),
        MSharpness(steps=20, restarts=1),
        AverageMSharpness(adaptive=True, rho=0.1),
    )
}
DEFAULT = ("trace", "lambda_max", "m_sharpness")


def measures_from(chosen: Sequence[str | Measure], group: int | None = None) -> tuple[Measure, ...]:
    """Return the measures meant, defaults for those given by name; ``group``: their m, instead of its default.

    Raises
    ------
    UsageError
        For an unknown name (with the nearest known one) or one measure twice.
    """
    found = []
    for item in [chosen] if isinstance(chosen, str) else chosen:
        if isinstance(item, str) and item not in MEASURES:
            near = get_close_matches(item, MEASURES, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UsageError(f"measure {item!r} is unknown", f"{hint}known: {', '.join(MEASURES)}")
        found.append(_named(item, group) if isinstance(item, str) else item)
    names = [measure.name for measure in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"measure {min(twice)!r} is given twice", "one of each per scan")
    return tuple(found)


def _named(name: str, group: int | None) -> Measure:
    found = MEASURES[name]
    return replace(found, m=group) if isinstance(found, MSharpness) and group is not None else found
