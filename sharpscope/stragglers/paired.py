"""Differences in accuracy between two models judged on the same images: the one way for page, tables and gate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import optimize

from sharpscope.table import Array

Z95 = 1.959963984540054  # normal quantile: 95 % two-sided


@dataclass(frozen=True)
class Difference:
    """A paired difference of accuracies, a fraction, with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def interval(self) -> tuple[float, float]:
        """Both ends."""
        return self.low, self.high

    @property
    def sign(self) -> int:
        """1 or -1 if the interval lies wholly on that side of zero, else 0."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def score(gained: float, lost: float, n: int, gap: float) -> float:
    """Return the score statistic of the hypothesis that a paired difference of proportions is ``gap``.

    Of n images one model is alone right on ``gained``, the other on ``lost``. At a gap of 0 this is McNemar's
    statistic. Source: Tango 1998, Statistics in Medicine 17, 891.
    """
    linear = 2 * n * gap - gained - lost - (gained - lost) * gap
    constant = -lost * gap * (1 - gap)
    share = (math.sqrt(max(linear * linear - 8 * n * constant, 0.0)) - linear) / (4 * n)  # of the lost, under gap
    variance = n * (2 * share + gap * (1 - gap))
    distance = gained - lost - n * gap
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance) if distance else 0.0


def counted(gained: int, lost: int, n: int) -> Difference:
    """Return ``(gained - lost) / n`` with Tango's score interval.

    Where two models disagree on few images the normal interval is lopsided: of 1000 images, 5 lost in truth and a limit
    of -0.5 points, it passes 12 % of the candidates that it should pass 2.5 % of; this one 0.7 %.
    """
    value = (gained - lost) / n

    def end(z: float, outer: float) -> float:
        def beyond(gap: float) -> float:
            return score(gained, lost, n, gap) - z

        inside = outer * (1 - 1e-12)  # the variance is 0 at -1 and 1
        return outer if beyond(inside) * z <= 0 else float(optimize.brentq(beyond, inside, value))

    return Difference(value, end(Z95, -1.0), end(-Z95, 1.0))


def disagreements(candidate: Array, reference: Array) -> tuple[int, int]:
    """Return on how many images, bool ``(n,)`` each, the candidate alone is right, and the reference alone."""
    return int((candidate & ~reference).sum()), int((reference & ~candidate).sum())


def difference(candidate: Array, reference: Array) -> Difference:
    """Return the accuracy of the candidate minus that of the reference on the same images, bool ``(n,)`` each.

    See :func:`counted`. Two models that agree on every image leave the width that so few images leave.
    """
    return counted(*disagreements(candidate, reference), len(candidate))


def mean_difference(differences: Sequence[Difference]) -> Difference:
    """Return the mean over independent data sets, each set weighing the same.

    The distances of the ends add in squares, on each side for itself, so that lopsided intervals stay so (MOVER; Zou
    and Donner 2008, Statistics in Medicine 27, 1693).
    """
    k = len(differences)
    value = math.fsum(d.value for d in differences) / k
    below = math.hypot(*(d.value - d.low for d in differences)) / k
    above = math.hypot(*(d.high - d.value for d in differences)) / k
    return Difference(value, value - below, value + above)
