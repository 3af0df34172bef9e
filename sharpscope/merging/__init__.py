"""Merged checkpoints: a recipe carried out on two checkpoints on disk."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from sharpscope.errors import UsageError
from sharpscope.merging.output import check_output, write_merge
from sharpscope.merging.plan import MergePlan, merge_plan
from sharpscope.merging.scanned import scanned_plan
from sharpscope.models.weights import read_weights
from sharpscope.partition import Granularity
from sharpscope.recipe import Recipe
from sharpscope.recipe_file import RecipeFile

__all__ = [
    "MergePlan",
    "check_output",
    "merge",
    "merge_plan",
    "read_weights",
    "scanned_plan",
    "write_merge",
    "write_plan",
]


def merge(
    zero_shot: str | Path,
    fine_tuned: str | Path,
    recipe: Recipe | float,
    out: str | Path,
    *,
    granularity: Granularity = "block",
    overwrite: bool = False,
) -> Path:
    """Write the checkpoint between two others that a recipe says; return ``out``.

    Each tensor is ``zero_shot + alpha * (fine_tuned - zero_shot)`` with the alpha of its layer, computed in float32
    (float64 for float64) and cast to the fine-tuned model's dtype; at alpha 0 and 1 its bytes are those of the
    source. The result has the keys, dtypes, files, shards, configuration, tokenizer and preprocessing of the
    fine-tuned checkpoint, the hashes of both sources in its metadata and the recipe beside it. It appears whole or
    not at all. Source: arXiv 2109.01903.

    Parameters
    ----------
    zero_shot, fine_tuned
        Directories, ``.safetensors`` files, or state dicts written by ``torch.save``.
    recipe
        Layer patterns and alphas, or one alpha for all.
    out
        Directory or file that is written.
    granularity
        What the recipe's layer ids are ids of.
    overwrite
        Replace a merge that is there already.

    Raises
    ------
    MismatchError
        If the two do not belong to one path; the first tensor or setting that differs is named.
    ModelError
        If a file is missing, damaged or pickled code.
    UsageError
        If the recipe is neither of the two, a rule matches no layer, or something is at ``out``.

    Notes
    -----
    One pair of tensors is held at a time. Cost: both checkpoints are read twice, once for their hashes. A merge that is
    killed leaves its scratch, ``OUT.PID.part``, beside ``out``; it may be deleted.
    """
    if isinstance(recipe, Mapping | list | tuple):
        pairs = tuple(recipe.items() if isinstance(recipe, Mapping) else recipe)
        raise UsageError(
            f"the recipe is a {type(recipe).__name__}", f"sharpscope.Recipe({pairs!r}), the first match wins"
        )
    rules = recipe if isinstance(recipe, Recipe) else Recipe.uniform(recipe)
    plan = merge_plan(read_weights(zero_shot), read_weights(fine_tuned), rules, granularity=granularity)
    return write_plan(plan, out, overwrite=overwrite)


def write_plan(
    plan: MergePlan,
    out: str | Path,
    *,
    predicted: Mapping[str, tuple[float, float]] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write what a plan says, with the accuracies that are predicted (name -> interval in %); return ``out``.

    The plan's notes are given as warnings.
    """
    for note in plan.notes:
        warnings.warn(note, stacklevel=3)
    sources = {
        role: str(source.root) for role, source in (("zero_shot", plan.zero_shot), ("fine_tuned", plan.fine_tuned))
    }
    stored = RecipeFile(plan.recipe, plan.granularity, predicted or {}, {**sources, **plan.hashes})
    return write_merge(plan, out, stored, overwrite=overwrite)
