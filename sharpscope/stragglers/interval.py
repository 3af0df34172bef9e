"""Means over images of several data sets, in points, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from sharpscope.table import Array


@dataclass(frozen=True)
class Interval:
    """A mean in points (per cent) with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 if the interval lies wholly on that side of zero, else 0."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def mean_interval(per_set: Sequence[Array], draws: Sequence[float] = ()) -> Interval:
    """Return the mean over sets of the mean over images, sets weighing the same, in points.

    Parameters
    ----------
    per_set
        Paired gaps, an array ``(n,)`` for each set.
    draws
        The same mean for each random direction, where the gaps are means over directions: their spread is added to
        that over images, with Student's quantile for the degrees of freedom of the sum (Welch-Satterthwaite).
    """
    value = 100 * float(np.mean([gaps.mean() for gaps in per_set]))
    parts = [(100 * _error(gaps) / len(per_set)) ** 2 for gaps in per_set]
    freedoms = [max(len(gaps) - 1, 1) for gaps in per_set]
    if len(draws):
        parts.append(float(np.var(draws, ddof=1)) / len(draws) if len(draws) > 1 else math.inf)
        freedoms.append(max(len(draws) - 1, 1))
    variance = sum(parts)
    if not math.isfinite(variance):
        return Interval(value, -math.inf, math.inf)
    freedom = variance**2 / sum(part**2 / f for part, f in zip(parts, freedoms, strict=True))
    width = float(stats.t.ppf(0.975, freedom)) * math.sqrt(variance)
    return Interval(value, value - width, value + width)


def _error(gaps: Array) -> float:
    """Return the standard error of the mean; images that all agree count as if one did not."""
    count = len(gaps)
    spread = float(gaps.std(ddof=1)) if count > 1 else math.inf
    return max(spread, 1 / math.sqrt(count)) / math.sqrt(count)
