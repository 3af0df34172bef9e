"""The measures by name, and names to measures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import is_dataclass, replace
from difflib import get_close_matches
from typing import Any, Protocol

from sharpscope.curvature.directional import Directional
from sharpscope.curvature.estimate import Estimates
from sharpscope.curvature.lanczos import Eigenvalue
from sharpscope.curvature.point import Point
from sharpscope.curvature.trace import Trace
from sharpscope.errors import UsageError
from sharpscope.partition import Partition
from sharpscope.perturbation import AverageMSharpness, MSharpness
from sharpscope.table import EVALUATIONS


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
TAKEN = ("evaluation", *EVALUATIONS)  # names of cells and rows that say what the model answers


def measures_from(chosen: Sequence[str | Measure], group: int | None = None) -> tuple[Measure, ...]:
    """Return the measures meant, defaults for those given by name; ``group``: their m, instead of its default.

    Raises
    ------
    UsageError
        For an unknown name (with the nearest known one), what is no measure, or one measure twice.
    """
    if chosen is None:
        raise UsageError("measures=None", "measures=[] for accuracy only")
    # A single one is plainly meant.
    given = [chosen] if isinstance(chosen, str) or not isinstance(chosen, Iterable) else chosen
    found = [_named(item, group) if isinstance(item, str) else _own(item) for item in given]
    names = [measure.name for measure in found]
    if twice := {name for name in names if names.count(name) > 1}:
        fix = "one of each per scan; m-sharpness with other settings by a name: label='NAME'"
        raise UsageError(f"measure {min(twice)!r} is given twice", fix)
    return tuple(found)


def _named(name: str, group: int | None) -> Measure:
    if name not in MEASURES:
        near = get_close_matches(name, MEASURES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"measure {name!r} is unknown", f"{hint}known: {', '.join(MEASURES)}")
    found = MEASURES[name]
    return replace(found, m=group) if isinstance(found, MSharpness) and group is not None else found


def _own(measure: Any) -> Measure:
    """Return the configured measure, whose settings become part of the plan."""
    name = getattr(measure, "name", None)
    if isinstance(measure, type) or not callable(measure) or not isinstance(name, str):
        raise UsageError(
            f"measure {measure!r} is none: needs a name in text, and a call at a point",
            f"Trace(relative=0.01), or one of {', '.join(MEASURES)}",
        )
    if not is_dataclass(measure):
        raise UsageError(
            f"measure {name!r} is no dataclass, so that its settings cannot be kept",
            f"@dataclasses.dataclass(frozen=True) above class {type(measure).__name__}",
        )
    if name in TAKEN:
        raise UsageError(f"measure name {name!r} stands for an evaluation", "give the measure another name")
    return measure  # type: ignore[return-value]
