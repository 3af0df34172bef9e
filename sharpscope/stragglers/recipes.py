"""Recipes that were tried: chosen on one half of the images, quoted on the other, against the best uniform alpha."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from sharpscope.errors import UsageError
from sharpscope.recipe import Recipe
from sharpscope.stragglers.interval import accuracy_interval
from sharpscope.stragglers.recommendation import Correct, Recommendation, at, compare, halves, score, versus_ends
from sharpscope.table import Array, Cell

COLUMNS = (
    "recipe", "kind", "id", "ood", "id_low", "id_high", "ood_low", "ood_high", "versus_uniform", "low", "high",
    "score", "chosen",
)  # fmt: skip
_PREFIX = "recipe"


@dataclass(frozen=True)
class Candidate:
    """Weights that were tried: a name, how they were come by, their recipe (None if they are no mix), and answers."""

    name: str
    kind: str
    recipe: Recipe | None
    correct: Mapping[str, Array]  # split -> bool (n,)


def recipe_key(split: str, what: str) -> str:
    """Return the key of the cell that holds the answers of tried weights on a set."""
    return f"{_PREFIX}|{split}|{_PREFIX}/{what}"


def keys_of_trials(tried: Mapping[str, Any], splits: Sequence[str]) -> Iterator[str]:
    """Yield the keys of the cells that hold the answers of all trials; see :func:`candidates`.

    Raises
    ------
    KeyError, TypeError, ValueError, UsageError
        If a trial lacks what a candidate is made of.
    """
    for trial in tried["trials"]:
        _candidate(trial, {})
        yield from (recipe_key(split, trial["key"]) for split in splits)


def candidates(cells: Iterable[Cell], tried: Mapping[str, Any] | None, correct: Correct) -> list[Candidate]:
    """Return the uniform alphas and what a search tried, in its order.

    Parameters
    ----------
    cells
        Of a scan.
    tried
        ``trials`` as the search left them: ``name``, ``kind``, ``rules`` (None if no mix) and ``key``.
    correct
        (alpha, split) -> correctness of each image.
    """
    known = {cell.key: cell for cell in cells}
    splits = list(dict.fromkeys(split for _, split in correct))
    found = [
        Candidate(f"alpha {alpha:g}", "uniform", Recipe.uniform(alpha), at(correct, alpha))
        for alpha in sorted({alpha for alpha, _ in correct})
    ]
    for trial in tried["trials"] if tried else ():
        answers = {split: known[recipe_key(split, trial["key"])].arrays["correct"] for split in splits}
        found.append(_candidate(trial, answers))
    return found


def _candidate(trial: Mapping[str, Any], answers: Mapping[str, Array]) -> Candidate:
    rules = trial["rules"]
    recipe = None if rules is None else Recipe(tuple((str(pattern), float(alpha)) for pattern, alpha in rules))
    return Candidate(trial["name"], trial["kind"], recipe, answers)


class Contest:
    """Candidates on two halves of the images.

    Parameters
    ----------
    found
        Candidates, uniform ones among them.
    id_split, ood
        Names of the sets; without OOD sets the ID set is the target.
    seed
        Of the halves: those of :func:`~sharpscope.stragglers.recommendation.recommend` with the same seed.
    """

    def __init__(self, found: Sequence[Candidate], id_split: str, ood: Sequence[str], seed: int) -> None:
        self.found, self.id_split, self.ood = list(found), id_split, list(ood)
        self.target = self.ood or [id_split]
        parts = {split: halves(len(answers), seed) for split, answers in self.found[0].correct.items()}
        self.first = {split: part[0] for split, part in parts.items()}
        self.second = {split: part[1] for split, part in parts.items()}
        self.uniform = self.best([c for c in self.found if c.kind == "uniform"])

    def score(self, candidate: Candidate) -> float:
        """Return the mean accuracy on the target, on the choosing half."""
        return score(candidate.correct, self.target, self.first)

    def best(self, among: Sequence[Candidate], keep_id: float | None = None) -> Candidate:
        """Return the one with the best score; the first of equals."""
        tuned = next((c for c in self.found if c.recipe == Recipe.uniform(1.0)), None)

        def keeps(candidate: Candidate) -> bool:
            if keep_id is None or tuned is None:
                return True
            gap = score(candidate.correct, [self.id_split], self.first) - score(
                tuned.correct, [self.id_split], self.first
            )
            return gap >= keep_id / 100 - 1e-12

        return max(filter(keeps, among), key=self.score)

    def frame(self) -> pd.DataFrame:
        """Return one row per candidate, accuracies in percent on the half that nothing was chosen on.

        ``id_low``, ``id_high``, ``ood_low`` and ``ood_high`` are Wilson's ends, for the mean of several sets MOVER of
        them. ``versus_uniform`` with ``low`` and ``high`` is the paired difference of the target (mean OOD) to the best
        uniform alpha, in points; ``score`` the target on the choosing half, ``chosen`` the mix that is best there: its
        row alone is an honest quote, the best of the others is picked by what it is judged by.
        """
        mixes = [c for c in self.found if c.recipe is not None]
        chosen = self.best(mixes)
        rows = [{**self._row(c), "chosen": c is chosen} for c in self.found]
        return pd.DataFrame(rows, columns=list(COLUMNS))

    def _row(self, candidate: Candidate) -> dict[str, object]:
        answers = {split: found[self.second[split]] for split, found in candidate.correct.items()}
        facts = {"recipe": candidate.name, "kind": candidate.kind, "score": 100 * self.score(candidate)}
        for name, splits in (("id", [self.id_split]), ("ood", self.ood)):
            found = accuracy_interval([answers[s] for s in splits]) if splits else None
            ends = (found.value, found.low, found.high) if found else (np.nan,) * 3
            facts |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
        gap = compare(candidate.correct, self.uniform.correct, self.target, self.second)
        low, high = gap.interval if candidate is not self.uniform else (0.0, 0.0)
        return {**facts, "versus_uniform": 100 * gap.value, "low": 100 * low, "high": 100 * high}


def with_recipe(found: Recommendation, contest: Contest, correct: Correct, keep_id: float | None) -> Recommendation:
    """Return the recommendation of the best recipe tried, if it beats the best uniform alpha; else of that alpha.

    The recipe is the best on the choosing half; it beats the alpha if the paired interval of their difference on the
    target, on the other half, lies above zero. ``per_layer`` tells both in either case.

    Raises
    ------
    UsageError
        If no recipes were tried.
    """
    mixes = [c for c in contest.found if c.recipe is not None and c.kind != "uniform"]
    if not mixes:
        raise UsageError("no recipes were tried in this scan", "scan(..., recipes=True), report --recipes")
    uniform = at(correct, found.alpha)
    best = contest.best([c for c in contest.found if c.recipe == found.recipe] + mixes, keep_id)
    assert best.recipe is not None
    gap = compare(best.correct, uniform, contest.target, contest.second)
    if best.kind == "uniform" or gap.sign <= 0:
        return replace(found, per_layer=(best.recipe, gap))
    versus = versus_ends(best.correct, correct, contest.id_split, contest.ood, contest.second)
    return replace(found, per_layer=(best.recipe, gap), recipe=best.recipe, versus=versus)
