"""The settings that determine the numbers of a scan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sharpscope.counts import is_whole, whole
from sharpscope.errors import UsageError
from sharpscope.losses import Loss, Towers, cross_entropy
from sharpscope.measures import Measure
from sharpscope.pairs import check_objective
from sharpscope.partition import Granularity
from sharpscope.precision import Precision

_COUNT = "--alphas 11 (alphas=11): as many points from 0 to 1"
_POINTS = "--alphas 0,0.5,1 (alphas=[0, 0.5, 1]): the points"


def alphas_from(chosen: int | Sequence[float]) -> tuple[float, ...]:
    """Return the points of the path: a number of evenly spaced ones, or those given, sorted.

    >>> alphas_from(3)
    (0.0, 0.5, 1.0)
    """
    if is_whole(chosen):
        count = whole("alphas", chosen, 2, "a path has two ends at least: alphas=11, or a list of points")
        return tuple(round(i / (count - 1), 12) for i in range(count))
    found = _numbers(chosen)
    points = tuple(sorted(round(alpha, 12) for alpha in found))  # linspace's are those of a number of points
    if not points or not np.isfinite(points).all() or len(set(points)) < len(points):
        raise UsageError(f"alphas={found}: needs distinct finite numbers", _POINTS)
    if len(points) == 1 and points[0].is_integer() and not 0 <= points[0] <= 1:
        raise UsageError(f"alphas={found}: a point far off the path, which runs from 0 to 1", f"{_COUNT}; {_POINTS}")
    return points


def path_notes(points: Sequence[float]) -> list[str]:
    """Return what must be said of the points of a path: an end that is missing, alphas beyond the two models.

    >>> path_notes([0.0, 0.5, 1.0])
    []
    """
    ends = ((0.0, "0 (the zero-shot model)"), (1.0, "1 (the fine-tuned model)"))
    missing = [end for alpha, end in ends if alpha not in points]
    beyond = [f"{alpha:g}" for alpha in points if not 0 <= alpha <= 1]
    said = [f"the alphas lack {' and '.join(missing)}: nothing is recommended without both ends"] if missing else []
    return said + ([f"alpha {', '.join(beyond)} lies beyond the two models, outside of [0, 1]"] if beyond else [])


def _numbers(chosen: Any) -> list[float]:
    try:
        if isinstance(chosen, str):  # its characters would be numbers
            raise TypeError
        return [float(alpha) for alpha in chosen]
    except (TypeError, ValueError) as refusal:
        fix = "alphas=11, or a list of points, e.g. alphas=[0, 0.5, 1]"
        raise UsageError(f"alphas={chosen!r}: needs a whole number of points, or the points", fix) from refusal


# Settings that are whole numbers: the least, and what to give instead.
_WHOLE = {
    "seed": (0, "e.g. seed=0; the same seed gives the same numbers"),  # numpy's generators take none below 0
    "limit": (1, "--limit 256 (limit=256); --limit all (limit=None)"),
    "batch_size": (1, "e.g. batch_size=64"),
    "chains": (1, "chains=1, or as many as there are processes"),
}


@dataclass(frozen=True)
class Plan:
    """The settings that determine the numbers."""

    alphas: tuple[float, ...]
    measures: tuple[Measure, ...]
    seed: int
    limit: int | None
    batch_size: int
    granularity: Granularity
    loss: Loss = cross_entropy
    loss_name: str = "cross_entropy"
    label_smoothing: float = 0.0
    precision: Precision = "highest"
    chains: int = 1  # runs of alphas, each begun without a neighbour's eigenvectors
    objective: Towers = "image"  # what the loss is a function of

    def __post_init__(self) -> None:
        for name, (least, fix) in _WHOLE.items():
            if name != "limit" or self.limit is not None:
                object.__setattr__(self, name, whole(name, getattr(self, name), least, fix))
        if not callable(self.loss) or isinstance(self.loss, type):
            kind = "a class, no function" if isinstance(self.loss, type) else "no loss"
            raise UsageError(
                f"loss={self.loss!r} is {kind}",
                "its name, e.g. loss='cross_entropy', or a function of outputs and targets that returns the sum, "
                "e.g. nn.CrossEntropyLoss(reduction='sum')",
            )
        if self.chains > len(self.alphas):
            raise UsageError(f"chains={self.chains} of {len(self.alphas)} alphas: 1 or more, each of an alpha or more")
        if self.precision not in ("highest", "high"):
            raise UsageError(f"precision={self.precision!r}", "'highest', or 'high' for TF32")
        check_objective(self.objective, self.loss_name, self.label_smoothing, self.measures, self.batch_size)

    @property
    def rounds(self) -> list[tuple[int, ...]]:
        """Indices of the alphas in the order in which they are measured, those that come at once together.

        >>> Plan(alphas_from(5), (), 0, None, 64, "block", chains=2).rounds
        [(0, 3), (1, 4), (2,)]
        """
        runs = np.array_split(np.arange(len(self.alphas)), self.chains)
        return [tuple(int(run[i]) for run in runs if i < len(run)) for i in range(len(runs[0]))]

    def first(self, index: int) -> int:
        """Return the first alpha of the chain that an alpha is in."""
        return max(first for first in self.rounds[0] if first <= index)

    def begins(self, index: int) -> bool:
        """Return whether an alpha is the first of its chain."""
        return index in self.rounds[0]

    def ends(self, index: int) -> bool:
        """Return whether an alpha is the last of its chain."""
        return index + 1 in (*self.rounds[0], len(self.alphas))

    def stride(self, index: int) -> float:
        """Return the way from the alpha before to this one, over the way to that one; 0 if a chain begins there."""
        if self.begins(index) or self.begins(index - 1):
            return 0.0
        ahead, behind = np.diff(self.alphas[index - 2 : index + 1])[::-1]
        return float(ahead / behind)

    @property
    def settings(self) -> dict[str, Any]:
        """Measure name -> its settings."""
        return {measure.name: asdict(measure) for measure in self.measures}  # type: ignore[call-overload]
