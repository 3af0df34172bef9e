"""What accuracy a merged model should have, by the scan it came from; and whether it has. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sharpscope.detectors.intervals import Estimate, independent, proportion
from sharpscope.recipe import Recipe
from sharpscope.recipe_file import Interval
from sharpscope.result import ScanResult
from sharpscope.stragglers.paired import Difference, difference
from sharpscope.stragglers.recipes import candidates
from sharpscope.table import Array


def scanned_answers(result: ScanResult, recipe: Recipe) -> dict[str, Array]:
    """Return name of each data set -> whether the scan saw each image judged right at this recipe, bool ``(n,)``.

    Empty for a recipe that the scan did not evaluate: no point of the path, and none that its search tried.
    """
    alphas = {alpha for _, alpha in recipe.rules}
    wanted = Recipe.uniform(alphas.pop()) if len(alphas) == 1 else recipe
    tried = candidates(result.cells, result.meta.get("recipes"), result.correct)
    return next((dict(candidate.correct) for candidate in tried if candidate.recipe == wanted), {})


def predicted_accuracy(answers: Mapping[str, Array]) -> dict[str, Interval]:
    """Return name of each data set -> 95 % Wilson interval of the accuracy, in %."""
    found = {split: proportion(correct).scaled(100) for split, correct in answers.items()}
    return {split: estimate.interval for split, estimate in found.items()}


@dataclass(frozen=True)
class Check:
    """The accuracy of a merged model on one data set, in %, beside what was predicted.

    Attributes
    ----------
    split, n, accuracy
        Name, images, accuracy in %.
    predicted
        Interval in % that it should lie in, None if nothing was predicted.
    change
        Paired difference to the scan on the same images, as a fraction; None if they are not the same images.
    otherwise
        Number of images judged otherwise than in the scan.
    gap
        Difference to the prediction, as a fraction, where that is of other images or may be: both have errors. None
        where it is of the same images, or there is none.
    """

    split: str
    n: int
    accuracy: float
    predicted: Interval | None
    change: Difference | None
    otherwise: int
    gap: Difference | None = None

    @property
    def as_predicted(self) -> bool | None:
        """Whether the accuracy lies in the interval and does not differ on the same images; None if not predicted.

        A prediction of other images differs by chance as well: the interval of the difference has to hold zero.
        """
        if self.predicted is None:
            return None
        same = self.change is None or self.change.sign == 0
        return same and (self._inside if self.gap is None else self.gap.sign == 0)

    @property
    def _inside(self) -> bool:
        return self.predicted is not None and self.predicted[0] <= self.accuracy <= self.predicted[1]

    def __str__(self) -> str:
        text = f"{self.split}: {self.accuracy:.1f} % of {self.n}"
        if self.predicted is None:
            return f"{text}, not predicted"
        text += f", predicted {self.predicted[0]:.1f} to {self.predicted[1]:.1f}"
        if self.gap is not None and self.gap.sign == 0 and not self._inside:
            text += ", which is within chance if that was of other images"
        return text if self.change is None else f"{text}, {self.otherwise} images judged otherwise than in the scan"


def check_accuracy(
    split: str, correct: Array, predicted: Mapping[str, Interval], scanned: Array | None = None, *, same: bool = False
) -> Check:
    """Return the comparison of a merged model with what was predicted.

    Parameters
    ----------
    split
        Name of the data set.
    correct
        Whether the merged model is right, bool of shape ``(n,)``.
    predicted
        Intervals in % by name.
    scanned
        The same of the scan, if it was of the same images.
    same
        Whether the prediction, too, is known to be of these images.
    """
    change = None if scanned is None else difference(correct, scanned)
    otherwise = 0 if scanned is None else int((correct != scanned).sum())
    interval = predicted.get(split)
    gap = None if same or interval is None else independent(proportion(correct), wilson(interval))
    return Check(split, len(correct), 100 * float(correct.mean()), interval, change, otherwise, gap)


def wilson(interval: Interval) -> Estimate:
    """Return the proportion whose Wilson interval, in %, this is; the number of images, which it implies, is left out.

    Each end e lies ``sqrt(e (1 - e))`` standard errors of one image from the proportion, but for the same factor.
    """
    low, high = interval[0] / 100, interval[1] / 100
    below, above = math.sqrt(low * (1 - low)), math.sqrt(high * (1 - high))
    weight = below / (below + above) if below + above > 0 else 0.5
    return Estimate(low + weight * (high - low), low, high, 0)
