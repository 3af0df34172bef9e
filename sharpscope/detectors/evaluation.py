"""Accuracy, loss, confidence and calibration of a model on the path: absolute, or as a change on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sharpscope.detectors.calibration import calibration, calibration_change
from sharpscope.detectors.findings import Finding, Limits, check_percent, limits
from sharpscope.detectors.images import (
    CHOSEN,
    MEAN_OOD,
    Examples,
    alpha_of,
    check_apart,
    check_keep_id,
    examples,
    model_named,
    splits_of,
)
from sharpscope.detectors.intervals import (
    Estimate,
    average,
    mean,
    paired_average,
    paired_proportion,
    proportion,
)
from sharpscope.detectors.judgement import CHANGE, PERCENT, PLAIN, POINTS, Scale, judged
from sharpscope.errors import UsageError, nearest
from sharpscope.table import EVALUATIONS

if TYPE_CHECKING:
    from sharpscope.result import ScanResult

Pair = tuple[Examples, Examples]


def _single(measure: str, sets: Sequence[Examples]) -> Estimate:
    if measure == "calibration_error":
        return calibration(sets)
    if measure == "accuracy":
        return mean([proportion(model["correct"]) for model in sets])
    return mean([average(model[measure]) for model in sets])


def _paired(measure: str, sets: Sequence[Pair]) -> Estimate:
    if measure == "calibration_error":
        return calibration_change(sets)
    if measure == "accuracy":
        return mean([paired_proportion(model["correct"], other["correct"]) for model, other in sets])
    return mean([paired_average(model[measure], other[measure]) for model, other in sets])


@dataclass(frozen=True, kw_only=True)
class EvaluationDetector:
    """Judges a number of the whole model on one data set.

    Parameters
    ----------
    measure
        ``accuracy``, ``confidence`` or ``calibration_error``, in percent, changes in points; or ``loss``, in nats.
    split
        Name of a data set, or ``mean OOD``: every OOD set with the same weight.
    model
        ``candidate`` (the recommended alpha), ``fine-tuned``, ``zero-shot``, ``uniform best`` or e.g. ``alpha 0.3``.
    versus
        The model compared with, on the same images; then the limits are ``min_change`` and ``max_change``.
    min, max, min_change, max_change
        The limits, both ends included.
    keep_id
        Points of ID accuracy, zero or negative, that the candidate may give up against the fine-tuned model.

    Notes
    -----
    Intervals (95 %): accuracy by Wilson's, its paired change by Tango's score interval (at a change of 0 McNemar's
    test), means by Student's over images. A model that was picked by half of the images is judged on the other half.

    ``calibration_error`` is raised by sampling; its interval is corrected for that, so the number may lie near the high
    end. In simulations a true error lies below the interval in 0 to 7 %, above it in 0 to 4 % (100 to 2,000 images;
    very sure models, mean confidence .95 and more, with 200 images or fewer: up to 9 and 7 %). A true change lies
    beyond the end that is nearer to none in 0 to 4 %, beyond the other in 0 to 9 % (300 to 3,000 images; most where one
    of the two models is calibrated); with both calibrated, in under 1 %.
    """

    measure: str = "accuracy"
    split: str
    model: str = "candidate"
    versus: str | None = None
    min: float | None = None
    max: float | None = None
    min_change: float | None = None
    max_change: float | None = None
    keep_id: float | None = None

    def __post_init__(self) -> None:
        if self.measure not in EVALUATIONS:
            raise UsageError(f"{self.measure!r} is no measure of a data set", nearest(self.measure, EVALUATIONS))
        model_named(self.model)
        if self.versus is not None:
            check_apart(self.model, model_named(self.versus))
        check_keep_id(self.keep_id, self.model, self.versus)
        self._check_kind()
        for limit in (self.min, self.max) if self.measure != "loss" else ():
            check_percent(self.measure, limit)

    def _check_kind(self) -> None:
        absolute, change = (self.min, self.max), (self.min_change, self.max_change)
        if self.versus is None and change != (None, None):
            raise UsageError("min_change and max_change need a model to compare with", "versus = 'zero-shot'")
        if self.versus is not None and absolute != (None, None):
            raise UsageError("min and max are no limits of a change versus another model", "min_change, max_change")
        self._limits()

    def _limits(self) -> Limits:
        if self.versus is None:
            return limits(self.measure, self.min, self.max)
        return limits(self.measure, self.min_change, self.max_change, ("min_change", "max_change"))

    def _scale(self) -> Scale:
        if self.measure == "loss":
            return PLAIN if self.versus is None else CHANGE
        return PERCENT if self.versus is None else POINTS

    def __call__(self, result: ScanResult) -> Finding:
        """Return the finding; see :func:`sharpscope.detectors.images.examples` for what cannot be measured."""
        splits = splits_of(result, self.split)
        alpha = alpha_of(result, self.model, self.keep_id)
        other = None if self.versus is None else alpha_of(result, self.versus, self.keep_id)
        found = self._estimate(result, splits, alpha, other)
        what = f"{self.measure} of {_who(self.model, alpha)} on {self.split!r}"
        what += "" if other is None else f" versus {_who(self.versus or '', other)}"
        return judged(self.measure, what, found, self._limits(), scale=self._scale(), of=1 + self._chosen)

    @property
    def _chosen(self) -> bool:
        """Whether images chose one of the models."""
        return self.model in CHOSEN or self.versus in CHOSEN

    def _estimate(self, result: ScanResult, splits: Sequence[str], alpha: float, other: float | None) -> Estimate:
        models = [examples(result, alpha, split, self._chosen) for split in splits]
        if other is None:
            return _single(self.measure, models)
        references = [examples(result, other, split, self._chosen) for split in splits]
        if alpha == other:  # the same weights
            return Estimate(0.0, 0.0, 0.0, sum(len(model["correct"]) for model in models))
        return _paired(self.measure, list(zip(models, references, strict=True)))


def _who(name: str, alpha: float) -> str:
    return f"the {name} (alpha {alpha:g})" if name in CHOSEN else name


def OODRegression(
    min_change: float = -0.5, *, split: str = MEAN_OOD, model: str = "candidate", versus: str = "zero-shot"
) -> EvaluationDetector:
    """Return the detector of a loss of OOD accuracy, in points, against the zero-shot model."""
    return EvaluationDetector(split=split, model=model, versus=versus, min_change=min_change)
