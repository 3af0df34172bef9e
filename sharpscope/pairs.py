"""What is differentiated: examples with classes, or images with texts in batches of one size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from sharpscope.data import Split, stratified
from sharpscope.errors import DataError, UsageError
from sharpscope.losses import Loss, Towers, contrastive, sigmoid_contrastive
from sharpscope.models.two_towers import IMAGE, TwoTowers
from sharpscope.objective import Batch
from sharpscope.perturbation import AverageMSharpness, MSharpness
from sharpscope.tree import fingerprint

if TYPE_CHECKING:
    from sharpscope.plan import Plan

_OBJECTIVES = ("image", "both", "contrastive")


class Differentiated(NamedTuple):
    """A loss and its batches, what a result must say of them, and a hash of their texts, "" without."""

    loss: Loss
    batches: tuple[Batch, ...]
    notes: list[str]
    texts: str


def differentiated(module: nn.Module, split: Split, plan: Plan, device: torch.device) -> Differentiated:
    """Return the loss of the plan's objective, and batches of the data on the device."""
    loss, notes, texts = plan.loss, list[str](), ""
    if isinstance(module, TwoTowers) and plan.objective == "contrastive":
        loss = paired_loss(module)
        batches, notes = pair_batches(split, module, plan.limit, plan.seed, plan.batch_size)
        texts = fingerprint({f"{i} {k}": t for i, b in enumerate(batches) for k, t in b.inputs.items() if k != IMAGE})
    else:
        batches = split.sample(plan.limit, plan.seed, plan.batch_size)
    return Differentiated(loss, tuple(batch.to(device) for batch in batches), notes, texts)


def check_objective(objective: Towers, loss: str, smoothing: float, measures: Sequence[Any], batch_size: int) -> None:
    """Raise ``UsageError`` if there is no such objective, or loss or measures cannot be meant with it."""
    if objective not in _OBJECTIVES:
        raise UsageError(f"objective {objective!r} is unknown", f"one of {', '.join(_OBJECTIVES)}")
    if objective != "contrastive":
        return
    if loss != "cross_entropy" or smoothing:
        raise UsageError(
            f"loss={loss!r}, label_smoothing={smoothing:g} with objective='contrastive', which is a loss itself",
            "leave both out, or objective='both'",
        )
    if other := next((x for x in measures if isinstance(x, MSharpness) and x.m != batch_size), None):
        raise UsageError(
            f"{other.name} with m={other.m}: the groups of a contrastive loss are its batches, of {batch_size}",
            f"m={batch_size}, or the measure by its name",
        )
    kinds = (MSharpness, AverageMSharpness)
    if scaleless := next((x for x in measures if isinstance(x, kinds) and x.logits != "raw"), None):
        raise UsageError(f"{scaleless.name}: a contrastive loss has no logits of classes", "logits='raw'")


def pair_batches(
    split: Split, towers: TwoTowers, limit: int | None, seed: int, batch_size: int
) -> tuple[tuple[Batch, ...], list[str]]:
    """Return batches of exactly ``batch_size`` pairs, and what a result must say about them.

    The images are those of :meth:`sharpscope.data.Split.sample`, as many as fill whole batches. Their texts are the
    split's captions, or else a prompt of each image's class, the template drawn with the seed (FLYP, arXiv 2212.00638).
    As there, other images of the same class in a batch count as negatives.

    Raises
    ------
    DataError
        If the images do not fill a batch, or have neither captions nor classes that are the model's.
    """
    chosen = stratified(split.targets.numpy(), limit, seed)
    whole = len(chosen) // batch_size * batch_size
    if not whole:
        raise DataError(
            f"{split.name!r} gives {len(chosen)} images, a contrastive batch has {batch_size}; its size is part of "
            "what is measured",
            f"--batch-size {len(chosen)} (batch_size={len(chosen)}) or smaller, or more images (--limit)",
        )
    texts = split.captions or _prompts(split, towers, seed)
    chosen = chosen[:whole]
    # All at once, for batches of one shape; long captions are cut, as they are in training.
    tokens = towers.tokens([texts[place] for place in chosen], cut=split.captions is not None)
    pieces = {name: torch.split(some, batch_size) for name, some in tokens.items()}
    batches = tuple(
        Batch({IMAGE: images, **{name: parts[number] for name, parts in pieces.items()}}, targets)
        for number, (images, targets) in enumerate(split.batches_of(chosen, batch_size))
    )
    kind = "their captions" if split.captions else f"prompts of their classes, {len(towers.prompts[0])} templates"
    spare = min(len(split), limit or len(split)) - whole
    left = f"; {spare} images that fill no batch are left out" if spare else ""
    return batches, [
        f"sharpness is that of {paired_loss(towers).__name__.replace('_', ' ')} loss over {len(batches)} batches of "
        f"{batch_size} pairs, images with {kind}; the batch size is part of this loss{left}"
    ]


def paired_loss(towers: TwoTowers) -> Loss:
    """Return the loss that CLIPs of this kind are trained with: SigLIP's where there is a logit bias, else CLIP's."""
    return contrastive if towers.logit_bias is None else sigmoid_contrastive


def _prompts(split: Split, towers: TwoTowers, seed: int) -> Sequence[str]:
    split.check_labels(len(towers.prompts))
    drawn = np.random.default_rng((seed, 1)).integers(len(towers.prompts[0]), size=len(split))
    return [towers.prompts[label][number] for label, number in zip(split.targets.tolist(), drawn, strict=True)]
