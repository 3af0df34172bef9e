"""Expected calibration error of stored predictions. Needs no torch."""

from __future__ import annotations

import numpy as np

from sharpscope.table import Array

BINS = 15


def places(confidence: Array) -> Array:
    """Return the bin of each confidence, int ``(n,)``: 15 of equal width."""
    return np.asarray(np.minimum((confidence * BINS).astype(int), BINS - 1))


def calibration_error(confidence: Array, correct: Array) -> float:
    """Return the expected calibration error: mean over examples of |accuracy - confidence| of their bin, 15 equal bins.

    Biased upward by sampling: a perfectly calibrated model shows a gap of order ``sqrt(bins / n)``.
    Source: arXiv 1706.04599.
    """
    place = places(confidence)
    gaps = np.bincount(place, weights=correct - confidence.astype(np.float64), minlength=BINS)
    return float(np.abs(gaps).sum() / len(correct))
