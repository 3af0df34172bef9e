"""Which alpha to ship: chosen on one half of the images, quoted on the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sharpscope.errors import UsageError
from sharpscope.recipe import Recipe
from sharpscope.stragglers.paired import Difference, difference, mean_difference
from sharpscope.table import Array

Correct = Mapping[tuple[float, str], Array]  # (alpha, split) -> bool (n,)


@dataclass(frozen=True)
class Recommendation:
    """The uniform alpha to ship and what is known of it; differences are fractions, quoted on unseen images.

    Attributes
    ----------
    alpha
        Chosen on one half of the images.
    chosen_by
        ``"ood"``, or ``"id"`` when no OOD set was given.
    target
        Key of ``versus`` that the choice was made by: ``"mean OOD"`` or the name of the ID split.
    versus
        Paired difference of the chosen alpha per reference (``"zero-shot"``, ``"fine-tuned"``) and split;
        split ``"mean OOD"`` weighs each OOD set the same.
    ties
        Alphas whose paired interval against the chosen one covers zero.
    scan
        The ``meta`` of the scan that it is of, which says where the models are.
    """

    alpha: float
    chosen_by: str
    target: str
    versus: dict[str, dict[str, Difference]]
    ties: tuple[float, ...]
    scan: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    @property
    def beats_both_ends(self) -> bool:
        """Whether the chosen alpha is better than both ends by more than the paired interval, on mean OOD or ID."""
        return 0 < self.alpha < 1 and all(found[self.target].sign > 0 for found in self.versus.values())

    @property
    def recipe(self) -> Recipe:
        """The alpha of every layer."""
        return Recipe.uniform(self.alpha)

    def merge(
        self,
        out: str | Path,
        *,
        zero_shot: str | Path | None = None,
        fine_tuned: str | Path | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write the recommended checkpoint in the layout of the fine-tuned one; return ``out``.

        Parameters
        ----------
        out
            Directory or file that is written, see :func:`sharpscope.merge`.
        zero_shot, fine_tuned
            Where the checkpoints are, if not where the scan read them; of a scan of modules in memory, their state
            dicts. They must be what was scanned: their hashes are compared.
        overwrite
            Replace a merge that is there already.

        Raises
        ------
        UsageError, ModelError, MismatchError
            See :func:`sharpscope.merging.scanned_plan` and :func:`sharpscope.merge`.
        """
        from sharpscope.merging import scanned_plan, write_plan  # torch, only where weights are written

        if self.scan is None:
            raise UsageError("this recommendation is not of a saved scan", "result.recommend().merge(out)")
        plan = scanned_plan(self.scan, self.recipe, zero_shot=zero_shot, fine_tuned=fine_tuned)
        return write_plan(plan, out, overwrite=overwrite)


def _halves(count: int, seed: int) -> tuple[Array, Array]:
    order = np.random.default_rng(seed).permutation(count)
    return order[: count // 2], order[count // 2 :]


def _compare(
    correct: Correct, pair: tuple[float, float], splits: Sequence[str], half: Mapping[str, Array]
) -> Difference:
    gaps = [difference(correct[pair[0], s][half[s]], correct[pair[1], s][half[s]]) for s in splits]
    return mean_difference(gaps)


def recommend(
    correct: Correct, id_split: str, ood: Sequence[str], *, keep_id: float | None = None, seed: int = 0
) -> Recommendation:
    """Return the alpha with the best mean OOD accuracy (ID if there is no OOD set) on half of the images.

    Parameters
    ----------
    correct
        Per-example correctness for every alpha and split.
    id_split, ood
        Names of the ID split and the OOD splits.
    keep_id
        Points of ID accuracy, zero or negative, that may be given up against the fine-tuned model; None: any.
    seed
        Of the split into halves.

    Raises
    ------
    UsageError
        If alpha 0 or 1 was not evaluated, or keep_id is positive.
    """
    alphas = sorted({alpha for alpha, _ in correct})
    if not {0.0, 1.0} <= set(alphas):
        raise UsageError(f"alphas {alphas} lack an end point; the verdict compares with 0 and 1", "scan both ends")
    if keep_id is not None and keep_id > 0:
        raise UsageError(f"keep_id is {keep_id}: points of ID accuracy to give up, so 0 or less", "e.g. keep_id=-0.5")
    target = list(ood) or [id_split]
    if small := next((s for s in {*target, id_split} if len(correct[0.0, s]) < 2), None):
        raise UsageError(f"{small!r} has one image; choosing and quoting take one half each", "more images")
    halves = {s: _halves(len(correct[0.0, s]), seed) for s in {*target, id_split}}
    first = {s: h[0] for s, h in halves.items()}
    second = {s: h[1] for s, h in halves.items()}

    def score(alpha: float) -> float:
        return float(np.mean([correct[alpha, s][first[s]].mean() for s in target]))

    def keeps(alpha: float) -> bool:
        gap = correct[alpha, id_split][first[id_split]].mean() - correct[1.0, id_split][first[id_split]].mean()
        return keep_id is None or gap >= keep_id / 100 - 1e-12

    best = max(filter(keeps, alphas), key=score)
    versus = {}
    for name, end in (("zero-shot", 0.0), ("fine-tuned", 1.0)):
        found = {s: _compare(correct, (best, end), [s], second) for s in [id_split, *ood]}
        if ood:
            found["mean OOD"] = _compare(correct, (best, end), list(ood), second)
        versus[name] = found
    ties = tuple(a for a in alphas if a == best or _compare(correct, (a, best), target, second).sign == 0)
    return Recommendation(best, "ood" if ood else "id", "mean OOD" if ood else id_split, versus, ties)
