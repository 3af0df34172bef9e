"""The checkpoints that a scan was of: found again, and known to be the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sharpscope.errors import ModelError, SharpscopeError, UsageError
from sharpscope.merging.plan import MergePlan, merge_plan
from sharpscope.models.weights import Weights, read_weights
from sharpscope.recipe import Recipe
from sharpscope.tree import fingerprint

_HEADS = (
    "the text towers are mixed, where the scan mixed the two heads that they make: not quite the same function between "
    "the ends; a scan with --objective both (objective='both') is of what is written here"
)
_ROLES = {"zero_shot": "zero-shot", "fine_tuned": "fine-tuned"}


def on_disk(model: Any) -> dict[str, str]:
    """Return ``path`` and ``sha256`` of the weights that a model was read from.

    Nothing for a module in memory, or where a model came from somewhere that no merge can read.
    """
    place = getattr(model, "where", None) or getattr(model, "name", None)  # a hub id is a name
    if isinstance(model, nn.Module) or place is None:
        return {}
    if str(getattr(model, "name", "")).startswith("oc:") and Path(place).is_dir():
        place = f"oc:{place}"  # which may hold a model of transformers, too
    try:
        weights = read_weights(place)
    except SharpscopeError:
        return {}
    return {"path": str(place) if str(place).startswith("oc:") else str(weights.root), "sha256": weights.sha256}


def scanned_plan(
    meta: Mapping[str, Any],
    recipe: Recipe,
    *,
    zero_shot: str | Path | None = None,
    fine_tuned: str | Path | None = None,
) -> MergePlan:
    """Return the merge of the two models of a scan, layers as in the scan.

    Parameters
    ----------
    meta
        ``ScanResult.meta``.
    recipe
        Layer patterns and alphas.
    zero_shot, fine_tuned
        Where the checkpoints are, if not where the scan read them; of modules in memory, files of their state dicts.

    Raises
    ------
    UsageError
        If the scan does not say where a checkpoint is.
    ModelError
        If a checkpoint is not the one that was scanned, by its hash.
    """
    start = _verified("zero_shot", meta["models"]["zero_shot"], zero_shot)
    end = _verified("fine_tuned", meta["models"]["fine_tuned"], fine_tuned)
    plan = merge_plan(start, end, recipe, granularity=meta["granularity"], scanned=meta.get("partition"))
    return replace(plan, remarks=(_HEADS,)) if _scan_mixed_heads(meta, plan) else plan


def _scan_mixed_heads(meta: Mapping[str, Any], plan: MergePlan) -> bool:
    """Return whether the scan mixed the heads of two text towers, which the merge mixes themselves."""
    moves = meta["layers"].get("head", {}).get("delta_norm", 0.0) > 0
    return moves and plan.mixes_text and "head" not in plan.alphas


def _verified(role: str, facts: Mapping[str, Any], given: str | Path | None) -> Weights:
    place = given or facts.get("path")
    if place is None:
        raise UsageError(
            f"the scan does not say where the weights of its {_ROLES[role]} model ({facts['name']}) are",
            f"--{role.replace('_', '-')} FILE ({role}=FILE): the checkpoint it was loaded from; of a module in memory "
            "a file of its state dict, torch.save(model.state_dict(), FILE)",
        )
    weights = read_weights(place)
    if "sha256" in facts:
        known, now = facts["sha256"], weights.sha256
    else:  # of a module's tensors, not of a file
        known, now = facts["hash"], fingerprint(_Lazy(weights))
    if known != now:
        raise ModelError(
            f"{weights.root} is not the {_ROLES[role]} model that was scanned: its hash is {now[:12]}, "
            f"that of the scan {known[:12]}",
            "scan it again, name the checkpoint that was scanned, or merge without a scan: "
            "sharpscope.merge(zero_shot, fine_tuned, recipe, out)",
        )
    return weights


class _Lazy(Mapping[str, Tensor]):
    """The tensors of weights on disk, each read when it is asked for."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def __getitem__(self, key: str) -> Tensor:
        return self._weights.tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights.keys)

    def __len__(self) -> int:
        return len(self._weights.keys)
