"""What accuracy on OOD images looks like without their labels, and which alpha one would pick by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from sharpscope.stragglers.effects import MEAN_OOD
from sharpscope.table import Array

COLUMNS = ("alpha", "split", "estimator", "estimate", "truth", "error", "stderr", "chosen")


class Answers(NamedTuple):
    """A model on a set: whether it is right, and how confident (largest probability), each of shape ``(n,)``."""

    correct: Array
    confidence: Array


class Estimate(NamedTuple):
    """An estimated accuracy, a fraction, with its sampling errors: of the labelled images, and of the unlabelled."""

    value: float
    labelled: float
    unlabelled: float

    @property
    def stderr(self) -> float:
        """Of both, which are independent."""
        return math.hypot(self.labelled, self.unlabelled)


def average_confidence(_: Answers, confidence: Array) -> Estimate:
    """Return the mean confidence on the unlabelled images (AC)."""
    return Estimate(float(confidence.mean()), 0.0, _error(confidence))


def difference_of_confidences(labelled: Answers, confidence: Array) -> Estimate:
    """Return the labelled accuracy plus the change in mean confidence (DoC, arXiv 2107.03315)."""
    offset = labelled.correct - labelled.confidence.astype(np.float64)
    value = float(offset.mean() + confidence.mean(dtype=np.float64))
    return Estimate(value, _error(offset), _error(confidence))


def average_thresholded_confidence(labelled: Answers, confidence: Array) -> Estimate:
    """Return the share of unlabelled images above the confidence that as many labelled ones fall below as are wrong.

    ATC with the largest probability as its score (arXiv 2201.04234). Its standard error takes the density of
    both sets at the threshold to be the same.
    """
    wrong = int((~labelled.correct).sum())
    ordered = np.sort(labelled.confidence)
    threshold = ordered[wrong] if wrong < len(ordered) else math.inf
    above = confidence >= threshold
    calibration = labelled.correct.astype(np.float64) - (labelled.confidence >= threshold)
    return Estimate(float(above.mean()), _error(calibration), _error(above))


def mean_estimate(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean over sets of unlabelled images, judged by the same labelled ones.

    The error of the labelled images is in every estimate and does not average out; that of the unlabelled ones does.
    Taken as independent, the errors of eight sets state a third of the true one for DoC.
    """
    k = len(estimates)
    value, labelled = float(np.mean([e.value for e in estimates])), float(np.mean([e.labelled for e in estimates]))
    return Estimate(value, labelled, math.hypot(*(e.unlabelled for e in estimates)) / k)


def _error(values: Array) -> float:
    return float(values.std(ddof=1, dtype=np.float64) / math.sqrt(len(values))) if len(values) > 1 else math.inf


ESTIMATORS: Mapping[str, Callable[[Answers, Array], Estimate]] = {
    "ATC": average_thresholded_confidence,
    "DoC": difference_of_confidences,
    "AC": average_confidence,
}


def label_free(answers: Mapping[tuple[float, str], Answers], id_split: str, ood: Sequence[str]) -> pd.DataFrame:
    """Return estimated OOD accuracies beside the true ones, in percent.

    One row per alpha, OOD set and estimator: ``alpha split estimator estimate truth error stderr chosen``; ``error``
    is estimate minus truth, ``stderr`` the sampling error of the estimate, not its bias. Set ``"ood mean"`` weighs the
    sets the same, see :func:`mean_estimate`; there ``chosen`` marks the alpha with the largest estimate, which a user
    without labels ships.

    Parameters
    ----------
    answers
        (alpha, split) -> correctness and confidence of each image.
    id_split, ood
        The labelled set, and those whose labels only score the estimates.
    """
    rows: list[dict[str, object]] = []
    for alpha in sorted({alpha for alpha, _ in answers}) if ood else ():
        for name, estimator in ESTIMATORS.items():
            found = [estimator(answers[alpha, id_split], answers[alpha, split].confidence) for split in ood]
            truth = [float(answers[alpha, split].correct.mean()) for split in ood]
            mean = MEAN_OOD, mean_estimate(found), float(np.mean(truth))
            scored = [*zip(ood, found, truth, strict=True), mean]
            rows += [{"alpha": alpha, "estimator": name, **_row(split, e, true)} for split, e, true in scored]
    frame = pd.DataFrame(rows, columns=list(COLUMNS)).assign(chosen=False)
    means = frame[frame["split"] == MEAN_OOD]
    # Rounded so that means of the same estimates in another order tie; the first of equals.
    best = means["estimate"].round(9).groupby(means["estimator"], sort=False).idxmax()
    frame.loc[best, "chosen"] = True
    return frame


def _row(split: str, found: Estimate, truth: float) -> dict[str, object]:
    estimate = 100 * found.value
    facts = {"estimate": estimate, "truth": 100 * truth, "error": estimate - 100 * truth}
    return {"split": split, **facts, "stderr": 100 * found.stderr}
