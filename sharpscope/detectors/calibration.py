"""The calibration error with a 95 % interval that knows its bias: sampling alone opens a gap in every bin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize
from scipy.special import ndtr

from sharpscope.calibration import places
from sharpscope.detectors.images import Examples
from sharpscope.detectors.intervals import Estimate
from sharpscope.stragglers.paired import Z95
from sharpscope.table import Array

PRIOR = 2  #: images of a bin that stand for its variance if it is calibrated
_TINY = 1e-12  # stands for no spread at all


@dataclass(frozen=True)
class Bins:
    """The bins of one or several data sets; the calibration error is the sum of the absolute gaps.

    Attributes
    ----------
    gaps
        Absolute gap of each bin times its share of the images.
    spreads
        Standard error of each, of which the signed gap is a normal draw.
    shares
        Share of the images.
    n
        Number of images.
    """

    gaps: Array
    spreads: Array
    shares: Array
    n: int

    @property
    def value(self) -> float:
        """The calibration error, as defined."""
        return float(self.gaps.sum())

    def truth(self, shape: Array, z: float) -> float:
        """Return the true error, spread over the bins in this shape, above whose expected number the found one is by z.

        In standard errors, so at 0 it is an estimate without bias and at 1.96 the low end of an interval; 0 if no
        true error is small enough.
        """
        parts = shape / shape.sum() if shape.sum() > 0 else self.shares / self.shares.sum()

        def beyond(error: float) -> float:
            mean, variance = _folded(error * parts, self.spreads)
            return self.value - mean - z * math.sqrt(variance)

        if beyond(0.0) <= 0:
            return 0.0
        return 1.0 if beyond(1.0) >= 0 else float(optimize.brentq(beyond, 0.0, 1.0, xtol=1e-6))

    def low(self, z: float) -> float:
        """Return the true error if it lies in the bins whose gaps exceed their noise: the less, as the rest is bias."""
        return self.truth(np.maximum(self.gaps - self.spreads, 0.0), z)

    def high(self, z: float) -> float:
        """Return the true error if it is the same in every bin: the more, as it hides the noise of all."""
        return self.truth(self.shares, z)


def _folded(means: Array, spreads: Array) -> tuple[float, float]:
    """Return the mean and variance of a sum of absolute values of normal numbers, see Leone et al. 1961."""
    z = means / spreads
    folded = spreads * math.sqrt(2 / math.pi) * np.exp(-z * z / 2) + means * (1 - 2 * ndtr(-z))
    return float(folded.sum()), float((means**2 + spreads**2 - folded**2).sum())


def _signed(model: Examples) -> tuple[Array, Array]:
    """Return bin of each image, and its correctness minus its confidence."""
    return places(model["confidence"]), model["correct"] - model["confidence"].astype(np.float64)


def bins(sets: Sequence[Examples]) -> Bins:
    """Return the bins of the mean over data sets, each set weighing the same."""
    found = [_bins(model) for model in sets]
    gaps, variances, shares = (np.concatenate(parts) for parts in zip(*found, strict=True))
    k, n = len(sets), sum(len(model["correct"]) for model in sets)
    return Bins(gaps / k, np.maximum(np.sqrt(variances) / k, _TINY), shares / k, n)


def _bins(model: Examples) -> tuple[Array, Array, Array]:
    """Return gaps, their variances and shares; few images that are all right still vary as their confidence says."""
    place, gap = _signed(model)
    confidence, n = model["confidence"].astype(np.float64), len(place)
    sums = [np.bincount(place, weights=weights) for weights in (gap, gap * gap, confidence * (1 - confidence))]
    images = np.bincount(place)
    signed, squares, meant = (found[images > 0] for found in sums)
    counts = images[images > 0]
    seen = squares - signed**2 / n
    shared = counts / (counts + PRIOR)
    return np.abs(signed) / n, (shared * seen + (1 - shared) * meant) / n**2, counts / n


def calibration(sets: Sequence[Examples]) -> Estimate:
    """Return the mean calibration error of data sets with its interval, which holds the number and an image's width."""
    found = bins(sets)
    return _around(found.value, found.low(Z95), found.high(-Z95), found.n, least=0.0)


def calibration_change(sets: Sequence[tuple[Examples, Examples]]) -> Estimate:
    """Return the mean calibration error of models minus that of their references on the same images.

    The distances of the ends add in squares (MOVER), less their correlation over images: its square, as that of
    absolute values that may be noise.
    """
    one, other = bins([model for model, _ in sets]), bins([reference for _, reference in sets])
    shared = _correlation(sets)
    shared *= abs(shared)
    low = _lowest(one, other, shared)
    high = -_lowest(other, one, shared)
    return _around(one.value - other.value, low, high, one.n, least=-1.0)


def _lowest(one: Bins, other: Bins, shared: float) -> float:
    down, up = one.low(0.0), other.high(0.0)
    below, above = down - one.low(Z95), other.high(-Z95) - up
    return down - up - math.sqrt(max(below**2 + above**2 - 2 * shared * below * above, 0.0))


def _correlation(sets: Sequence[tuple[Examples, Examples]]) -> float:
    """Return how the calibration errors of models and references go together by the choice of images."""
    pairs = [np.cov(_pulls(model), _pulls(reference), bias=True) / len(model["correct"]) for model, reference in sets]
    (first, both), (_, second) = np.sum(pairs, axis=0)
    return float(both / math.sqrt(first * second)) if first > 0 and second > 0 else 0.0


def _pulls(model: Examples) -> Array:
    """Return what each image adds to the gap of its bin, in the direction of that gap."""
    place, gap = _signed(model)
    return np.asarray(gap * np.sign(np.bincount(place, weights=gap))[place])


def _around(value: float, low: float, high: float, n: int, *, least: float) -> Estimate:
    return Estimate(value, max(min(low, value - 1 / n), least), max(high, value + 1 / n), n)
