"""The barrier on the path: how far loss or error rises above the chord between both ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sharpscope.detectors.findings import Finding, limits
from sharpscope.detectors.images import examples, splits_of
from sharpscope.detectors.intervals import Estimate
from sharpscope.detectors.judgement import PERCENT, PLAIN, judged
from sharpscope.errors import MeasurementError
from sharpscope.stragglers.barrier import Chord, barrier
from sharpscope.table import Array

if TYPE_CHECKING:
    from sharpscope.result import ScanResult


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
        See :func:`sharpscope.stragglers.barrier.barrier`.
    """

    max: float
    split: str = "id"
    of: Literal["loss", "error"] = "loss"
    chord: Chord = "linear"

    def __post_init__(self) -> None:
        limits("barrier", None, self.max)

    def __call__(self, result: ScanResult) -> Finding:
        """Return the finding; ``MeasurementError`` if both ends and an alpha between were not evaluated."""
        alphas = sorted(float(alpha) for alpha in result.meta["alphas"])
        if not {0.0, 1.0} <= set(alphas) or not any(0 < alpha < 1 for alpha in alphas):
            raise MeasurementError(
                "a barrier needs both ends and an alpha between", "scan again with --alphas 3 or more"
            )
        splits = splits_of(result, self.split)
        found = {(alpha, split): self._height(result, alpha, split) for alpha in alphas for split in splits}
        best, top = barrier(found, splits, chord=self.chord)
        estimate = Estimate(best.value, best.low, best.high, sum(len(found[0.0, split]) for split in splits))
        what = f"barrier of the {self.of} on {self.split!r} above the {self.chord} chord, highest at alpha {top:g}"
        scale = PLAIN if self.of == "loss" else PERCENT
        return judged("barrier", what, estimate, limits("barrier", None, self.max), scale=scale)

    def _height(self, result: ScanResult, alpha: float, split: str) -> Array:
        found = examples(result, alpha, split)
        return found["loss"] if self.of == "loss" else ~found["correct"].astype(bool)
