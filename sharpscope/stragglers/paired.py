"""Differences between two models judged on the same images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sharpscope.table import Array

Z95 = 1.959963984540054  # normal quantile: 95 % two-sided


@dataclass(frozen=True)
class Difference:
    """A paired difference with its standard error, in the unit of what was compared."""

    value: float
    stderr: float

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % normal interval."""
        return self.value - Z95 * self.stderr, self.value + Z95 * self.stderr

    @property
    def sign(self) -> int:
        """1 or -1 if the interval lies wholly on that side of zero, else 0."""
        low, high = self.interval
        return 1 if low > 0 else -1 if high < 0 else 0


def difference(candidate: Array, reference: Array) -> Difference:
    """Return the mean of ``candidate - reference`` over images, shape ``(n,)`` each, with its paired standard error.

    With no image on which the two disagree the variance estimate is 0; it is then replaced by that of one
    disagreement, so that agreement on ten images is not certainty.
    """
    gaps = candidate.astype(np.float64) - reference.astype(np.float64)
    count = len(gaps)
    spread = float(gaps.std(ddof=1)) if count > 1 else math.inf
    return Difference(float(gaps.mean()), max(spread, 1 / math.sqrt(count)) / math.sqrt(count))


def mean_difference(differences: Sequence[Difference]) -> Difference:
    """Return the mean over independent data sets, each set weighing the same."""
    count = len(differences)
    return Difference(
        sum(d.value for d in differences) / count, math.sqrt(sum(d.stderr**2 for d in differences)) / count
    )
