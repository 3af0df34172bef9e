"""Numbers with 95 % intervals from images: proportions and means, of one model or paired between two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from sharpscope.detectors.findings import Limits
from sharpscope.stragglers.interval import share_interval
from sharpscope.stragglers.paired import Z95, Difference, counted, disagreements, mean_difference, score
from sharpscope.table import Array

POWER = 0.8  #: with which the images asked for decide, if the number found is the true one


@dataclass(frozen=True)
class Estimate:
    """A number, its 95 % interval and how many images or draws it rests on."""

    value: float
    low: float
    high: float
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        """Both ends."""
        return self.low, self.high

    def scaled(self, factor: float) -> Estimate:
        """Return the same in another unit, ``factor`` of which make one."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor, self.n)

    def needed(self, limits: Limits) -> int | None:
        """Return how many images or draws decide with a power of 80 % if the value is the true number.

        The distance of the value from the limit, in standard errors, grows with the root of their number. None if
        the value lies on the limit or the interval has no end.
        """
        ends = [limit for limit in (limits.low, limits.high) if math.isfinite(limit)]
        crossed = [limit for limit in ends if self.low <= limit <= self.high]
        counts = [self._needed(limit) for limit in crossed]
        return None if not counts or None in counts else max(count for count in counts if count is not None)

    def _needed(self, limit: float) -> int | None:
        reached = self.standard_errors_from(limit)
        if reached == 0:
            return None
        return math.ceil(self.n * ((Z95 + float(stats.norm.ppf(POWER))) / reached) ** 2)

    def standard_errors_from(self, limit: float) -> float:
        """Return how many standard errors the value lies from the limit."""
        half = self.value - self.low if limit < self.value else self.high - self.value
        return Z95 * abs(self.value - limit) / half


@dataclass(frozen=True)
class PairedProportion(Estimate):
    """A difference of proportions on the same images: alone right were one ``gained``, the other ``lost`` times."""

    gained: int
    lost: int

    def standard_errors_from(self, limit: float) -> float:
        """Return the score statistic: with few disagreements it grows faster than the width tells."""
        return abs(score(self.gained, self.lost, self.n, limit))


def proportion(correct: Array) -> Estimate:
    """Return the share of true entries with its Wilson interval."""
    return Estimate(*share_interval(correct), len(correct))


def average(values: Array) -> Estimate:
    """Return the mean with Student's interval; a single value has an infinite one."""
    count, mean = len(values), float(values.mean(dtype=np.float64))
    if count < 2:
        return Estimate(mean, -math.inf, math.inf, count)
    half = float(stats.t.ppf(0.975, count - 1) * values.std(ddof=1, dtype=np.float64)) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count)


def paired_proportion(candidate: Array, reference: Array) -> PairedProportion:
    """Return the difference in share of true entries on the same images, see :func:`paired_counts`."""
    return paired_counts(*disagreements(candidate, reference), len(candidate))


def paired_counts(gained: int, lost: int, n: int) -> PairedProportion:
    """Return ``(gained - lost) / n`` with Tango's score interval, see :func:`sharpscope.stragglers.paired.counted`."""
    found = counted(gained, lost, n)
    return PairedProportion(found.value, found.low, found.high, n, gained, lost)


def paired_average(candidate: Array, reference: Array) -> Estimate:
    """Return the mean difference on the same images, with Student's interval."""
    return average(candidate.astype(np.float64) - reference.astype(np.float64))


def independent(estimate: Estimate, reference: Estimate) -> Difference:
    """Return the difference to a reference on different images: the distances of the ends add in squares (MOVER)."""
    gap = estimate.value - reference.value
    below = math.hypot(estimate.value - estimate.low, reference.high - reference.value)
    above = math.hypot(estimate.high - estimate.value, reference.value - reference.low)
    return Difference(gap, gap - below, gap + above)


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean over independent data sets, see :func:`sharpscope.stragglers.paired.mean_difference`."""
    if len(estimates) == 1:
        return estimates[0]
    found = mean_difference([Difference(e.value, e.low, e.high) for e in estimates])
    return Estimate(found.value, found.low, found.high, sum(e.n for e in estimates))
