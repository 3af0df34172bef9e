"""Which alpha to ship: chosen on one half of the images, quoted on the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np

from sharpscope.errors import UsageError
from sharpscope.recipe import Recipe
from sharpscope.stragglers.paired import Difference, difference, mean_difference
from sharpscope.table import Array

Correct = Mapping[tuple[float, str], Array]  # (alpha, split) -> bool (n,)


@dataclass(frozen=True)
class Recommendation:
    """What to ship and what is known of it; differences are fractions, quoted on unseen images.

    Attributes
    ----------
    alpha
        The best uniform alpha, chosen on one half of the images.
    chosen_by
        ``"ood"``, or ``"id"`` when no OOD set was given.
    target
        Key of ``versus`` that the choice was made by: ``"mean OOD"`` or the name of the ID split.
    versus
        Paired difference of the recipe per reference (``"zero-shot"``, ``"fine-tuned"``) and split;
        split ``"mean OOD"`` weighs each OOD set the same.
    ties
        Alphas whose paired interval against the chosen one covers zero.
    recipe
        The alpha of each layer to ship: the uniform one, unless a per-layer recipe was asked for and beats it.
    per_layer
        The best recipe of a search on the choosing half, and its paired difference to the uniform alpha on the target,
        on the other half; None if it was not asked for.
    scan
        The ``meta`` of the scan that it is of, which says where the models are.
    """

    alpha: float
    chosen_by: str
    target: str
    versus: dict[str, dict[str, Difference]]
    ties: tuple[float, ...]
    recipe: Recipe
    per_layer: tuple[Recipe, Difference] | None = None
    scan: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    @property
    def beats_both_ends(self) -> bool:
        """Whether the chosen alpha is better than both ends by more than the paired interval, on mean OOD or ID."""
        return 0 < self.alpha < 1 and all(found[self.target].sign > 0 for found in self.versus.values())

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
            Where the checkpoints are, if not where the scan read them; of a scan of modules in memory, files of their
            state dicts: ``torch.save(model.state_dict(), "zs.pt")``. They must be what was scanned: their hashes are
            compared.
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

    def _repr_html_(self) -> str:
        from sharpscope.summary import recommendation_as_html

        return recommendation_as_html(self)


def halves(count: int, seed: int) -> tuple[Array, Array]:
    """Return the positions of the images that are chosen on, and of those that are quoted on."""
    order = np.random.default_rng(seed).permutation(count)
    return order[: count // 2], order[count // 2 :]


def compare(
    candidate: Mapping[str, Array], reference: Mapping[str, Array], splits: Sequence[str], half: Mapping[str, Array]
) -> Difference:
    """Return the paired difference in accuracy on half of the images, averaged over the sets."""
    return mean_difference([difference(candidate[s][half[s]], reference[s][half[s]]) for s in splits])


def score(correct: Mapping[str, Array], target: Sequence[str], half: Mapping[str, Array]) -> float:
    """Return the accuracy on a part of the images, averaged over the sets; the order of the sets changes no bit."""
    return round(float(np.mean([correct[split][half[split]].mean() for split in target])), 12)


def at(correct: Correct, alpha: float) -> dict[str, Array]:
    """Return the correctness at an alpha by split."""
    return {split: found for (a, split), found in correct.items() if a == alpha}


def versus_ends(
    candidate: Mapping[str, Array], correct: Correct, id_split: str, ood: Sequence[str], half: Mapping[str, Array]
) -> dict[str, dict[str, Difference]]:
    """Return the paired difference to both ends on every set and on the mean of the OOD sets."""
    versus = {}
    for name, end in (("zero-shot", at(correct, 0.0)), ("fine-tuned", at(correct, 1.0))):
        found = {s: compare(candidate, end, [s], half) for s in [id_split, *ood]}
        if ood:
            found["mean OOD"] = compare(candidate, end, list(ood), half)
        versus[name] = found
    return versus


def recommend(
    correct: Correct, id_split: str, ood: Sequence[str], *, keep_id: float | None = None, seed: int = 0
) -> Recommendation:
    """Return the alpha with the best mean OOD accuracy (ID if there is no OOD set) on half of the images.

    The smallest of alphas that are equally good.

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
        If alpha 0 or 1 was not evaluated, or keep_id is positive, nan or no number.
    """
    alphas = sorted({alpha for alpha, _ in correct})
    if not {0.0, 1.0} <= set(alphas):
        raise UsageError(f"alphas {alphas} lack an end point; the verdict compares with 0 and 1", "scan both ends")
    # Nor nan: no alpha would be left to choose from.
    if keep_id is not None and not (isinstance(keep_id, SupportsFloat) and keep_id <= 0):
        raise UsageError(f"keep_id is {keep_id!r}: points of ID accuracy to give up, so 0 or less", "e.g. keep_id=-0.5")
    target = list(ood) or [id_split]
    if small := next((s for s in {*target, id_split} if len(correct[0.0, s]) < 2), None):
        raise UsageError(f"{small!r} has one image; choosing and quoting take one half each", "more images")
    parts = {s: halves(len(correct[0.0, s]), seed) for s in {*target, id_split}}
    first = {s: h[0] for s, h in parts.items()}
    second = {s: h[1] for s, h in parts.items()}

    def keeps(alpha: float) -> bool:
        gap = correct[alpha, id_split][first[id_split]].mean() - correct[1.0, id_split][first[id_split]].mean()
        return keep_id is None or gap >= keep_id / 100 - 1e-12

    best = max(filter(keeps, alphas), key=lambda alpha: score(at(correct, alpha), target, first))
    shipped = at(correct, best)
    versus = versus_ends(shipped, correct, id_split, ood, second)
    ties = tuple(a for a in alphas if a == best or compare(at(correct, a), shipped, target, second).sign == 0)
    by, name = ("ood", "mean OOD") if ood else ("id", id_split)
    return Recommendation(best, by, name, versus, ties, Recipe.uniform(best))
