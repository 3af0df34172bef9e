"""The settings that determine the numbers of a scan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sharpscope.errors import UsageError
from sharpscope.losses import Loss, Towers, cross_entropy
from sharpscope.measures import Measure
from sharpscope.pairs import check_objective
from sharpscope.partition import Granularity
from sharpscope.precision import Precision


def alphas_from(chosen: int | Sequence[float]) -> tuple[float, ...]:
    """Return the points of the path: a number of evenly spaced ones, or those given, sorted.

    >>> alphas_from(3)
    (0.0, 0.5, 1.0)
    """
    if isinstance(chosen, int):
        if chosen < 2:
            raise UsageError(f"alphas={chosen}: a path has two ends at least", "alphas=11, or a list of points")
        return tuple(round(i / (chosen - 1), 12) for i in range(chosen))
    points = tuple(sorted(round(float(alpha), 12) for alpha in chosen))  # linspace's are those of a number of points
    if not points or not np.isfinite(points).all() or len(set(points)) < len(points):
        raise UsageError(f"alphas={list(chosen)}: needs distinct finite numbers", "e.g. alphas=[0, 0.5, 1]")
    return points


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
        if not 1 <= self.chains <= len(self.alphas):
            raise UsageError(f"chains={self.chains} of {len(self.alphas)} alphas: 1 or more, each of an alpha or more")
        if (self.limit is not None and self.limit < 1) or self.batch_size < 1:
            raise UsageError(f"limit={self.limit}, batch_size={self.batch_size}: both must be 1 or more")
        if self.precision not in ("highest", "high"):
            raise UsageError(f"precision={self.precision!r}", "'highest', or 'high' for TF32")
        if self.seed < 0:
            raise UsageError(f"seed={self.seed}", "0 or more")  # numpy's generators take no other
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
