"""The barrier on the path: how far loss or error rises above the chord between both ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from sharpscope.detectors.findings import Finding, limits
from sharpscope.detectors.images import examples, splits_of
from sharpscope.detectors.intervals import Estimate
from sharpscope.detectors.judgement import PERCENT, PLAIN, judged
from sharpscope.errors import MeasurementError
from sharpscope.stragglers.paired import Z95
from sharpscope.table import Array

if TYPE_CHECKING:
    from sharpscope.result import ScanResult

Chord = Literal["linear", "mean"]
DRAWS = 20_000


def barrier(heights: Array, alphas: Array, chord: Chord = "linear") -> tuple[Array, Array]:
    """Return how far each alpha lies above the chord and the covariance of these, shapes ``(alphas,)`` and square.

    ``heights`` are loss or error of every image at every alpha from 0 to 1, shape ``(alphas, n)``. The chord is
    ``linear`` between both ends, or the ``mean`` of the ends (arXiv 1912.05671), which unequal ends exceed even on a
    straight line.
    """
    at_end = alphas if chord == "linear" else np.full_like(alphas, 0.5)
    gaps = heights - np.outer(1 - at_end, heights[0]) - np.outer(at_end, heights[-1])
    return gaps.mean(axis=1), np.cov(gaps) / heights.shape[1]


def _unsure(covariance: Array, n: int) -> Array:
    """Return the covariance with the variance of one disagreement where n images show none: no certainty from ten."""
    inner = np.zeros(len(covariance))
    inner[1:-1] = 1 / n**2
    return np.asarray(covariance + np.diag(np.maximum(inner - np.diag(covariance), 0.0)))


def highest(gaps: Array, covariance: Array, n: int) -> Estimate:
    """Return the largest gap with its 95 % interval.

    Below the upper end lies every gap (each by its own test, so no correction is due); above the lower end at least one
    (the quantile is that of the largest of all errors, correlated as they are).
    """
    errors = np.sqrt(np.diag(covariance))
    free = errors > 1e-12 * max(1.0, float(errors.max()))
    quantile = Z95
    if free.any():
        correlation = covariance[np.ix_(free, free)] / np.outer(errors[free], errors[free])
        root = np.linalg.cholesky(correlation + 1e-9 * np.eye(len(correlation)))
        normal = np.random.default_rng(0).standard_normal((DRAWS, len(root)))
        quantile = float(np.quantile((normal @ root.T).max(axis=1), 0.975))
    low, high = float((gaps - quantile * errors).max()), float((gaps + Z95 * errors).max())
    return Estimate(float(gaps.max()), low, high, n)


@dataclass(frozen=True, kw_only=True)
class BarrierDetector:
    """Judges how far the path rises above the chord between zero-shot and fine-tuned, at the scanned alphas.

    Parameters
    ----------
    max
        The limit: nats of loss, or points of error.
    split
        Name of a data set, ``id``, or ``mean OOD``.
    of
        ``loss`` or ``error`` (1 - accuracy).
    chord
        See :func:`barrier`.
    """

    max: float
    split: str = "id"
    of: Literal["loss", "error"] = "loss"
    chord: Chord = "linear"

    def __post_init__(self) -> None:
        limits("barrier", None, self.max)

    def __call__(self, result: ScanResult) -> Finding:
        """Return the finding; ``MeasurementError`` if both ends and an alpha between were not evaluated."""
        alphas = np.array(sorted(float(alpha) for alpha in result.meta["alphas"]))
        if len(alphas) < 3 or alphas[0] != 0 or alphas[-1] != 1:
            raise MeasurementError(
                "a barrier needs both ends and an alpha between", "scan again with --alphas 3 or more"
            )
        splits = splits_of(result, self.split)
        found = [self._heights(result, split, alphas) for split in splits]
        parts = [barrier(heights, alphas, self.chord) for heights in found]
        gaps = np.mean([gap for gap, _ in parts], axis=0)
        counts = [heights.shape[1] for heights in found]
        sure = [c if self.of == "loss" else _unsure(c, n) for (_, c), n in zip(parts, counts, strict=True)]
        covariance = np.sum(sure, axis=0) / len(parts) ** 2
        estimate = highest(gaps, covariance, sum(counts))
        top = alphas[gaps.argmax()]
        what = f"barrier of the {self.of} on {self.split!r} above the {self.chord} chord, highest at alpha {top:g}"
        scale = PLAIN if self.of == "loss" else PERCENT
        return judged("barrier", what, estimate, limits("barrier", None, self.max), scale=scale)

    def _heights(self, result: ScanResult, split: str, alphas: Array) -> Array:
        found = [examples(result, alpha, split) for alpha in alphas]
        heights = [e["loss"] if self.of == "loss" else 1.0 - e["correct"] for e in found]
        if len(heights[0]) < 2:
            raise MeasurementError(f"{split!r} has one image; a barrier has no interval there", "more images")
        return np.array(heights, dtype=np.float64)
