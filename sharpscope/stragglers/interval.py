"""Means over images of one or several data sets with intervals: accuracies in per cent, gaps in points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from sharpscope.stragglers.paired import Z95, Difference, mean_difference
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


def wilson(value: Array | float, n: Array | float) -> tuple[Array, Array]:
    """Return both ends of the 95 % Wilson interval of a proportion; it keeps a width at 0 and 1."""
    scale = 1 + Z95**2 / n
    centre = (value + Z95**2 / (2 * n)) / scale
    half = Z95 / scale * np.sqrt(value * (1 - value) / n + Z95**2 / (4 * n**2))
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def share_interval(correct: Array) -> tuple[float, float, float]:
    """Return the share of true entries, bool ``(n,)``, with both ends of its Wilson interval."""
    share = float(correct.mean())
    low, high = wilson(share, len(correct))
    return share, float(low), float(high)


def accuracy_interval(per_set: Sequence[Array]) -> Interval:
    """Return the accuracy, bool ``(n,)`` for each set, sets weighing the same, in per cent: MOVER of Wilson's ends.

    Student's interval passes 100 % near it: at an accuracy of 99 %, known from 250 images of one set, its low end lies
    above the truth in 8 % of cases, Wilson's in none. The high end of MOVER over several sets errs there in 7 % of
    cases instead of 2.5 %, at 90 % in 4 %.
    """
    found = mean_difference([Difference(*share_interval(correct)) for correct in per_set])
    return Interval(100 * found.value, 100 * max(found.low, 0.0), 100 * min(found.high, 1.0))  # rounding apart, within


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
