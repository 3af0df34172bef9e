"""Accuracy, loss and confidence of a network on a data set, example by example."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sharpscope.calibration import calibration_error
from sharpscope.curvature.estimate import mean_and_error
from sharpscope.errors import ModelError
from sharpscope.objective import Batch, Forward, Objective
from sharpscope.ranks import ALONE, Ranks
from sharpscope.table import MODEL, Array, Cell, Row, cell_key
from sharpscope.tree import Tree

BOOTSTRAPS = 100


@torch.no_grad()
def class_count(
    objective: Objective, weights: Tree, inputs: Tensor, role: str, name: str, examples: int | None = 1
) -> int:
    """Return how many classes the model tells apart. Cost: a forward of so many examples; None: of all.

    Raises
    ------
    ModelError
        If it cannot take the data.
    """
    example = inputs[:examples].to(next(iter(weights.values())).device)
    try:
        return objective.outputs(weights, example).shape[1]
    except (RuntimeError, ValueError, IndexError) as refusal:
        raise ModelError(
            f"{role} fails on inputs of {name!r} of shape {tuple(example.shape)} {example.dtype}: {refusal}",
            "give the loader the size, channels and dtype that the model was made for",
        ) from refusal


@torch.no_grad()
def per_example(
    forward: Forward, weights: Tree, batches: Iterable[Batch], columns: Tensor | None = None, ranks: Ranks = ALONE
) -> dict[str, Array]:
    """Return ``correct`` (bool), ``confidence`` and ``loss`` (float32), each of shape ``(n,)``.

    Parameters
    ----------
    forward, weights
        ``forward(weights, inputs)`` gives logits ``(n, classes)``.
    batches
        Labelled data in its fixed order.
    columns
        Classes that occur in this data set, when it knows fewer than the model; the logits of the others are left
        out, targets stay in the numbering of all classes.
    ranks
        Processes that share the data; ``batches`` are then those of this one. All return everything.
    """
    found = [judged(forward(weights, inputs), targets, columns) for inputs, targets in batches]
    return joined(ranks.gathered(found))


def judged(logits: Tensor, targets: Tensor, columns: Tensor | None = None) -> dict[str, Tensor]:
    """Return ``correct``, ``confidence`` and ``loss`` of one batch, see :func:`per_example`."""
    logits = logits.float()
    if columns is not None:
        logits = torch.full_like(logits, -torch.inf).index_copy(1, columns, logits[:, columns])
    probability, predicted = logits.softmax(1).max(1)
    loss = cross_entropy(logits, targets, reduction="none")
    # To the host at once: a GPU has no need to keep it, and ranks exchange it there.
    return {"correct": (predicted == targets).cpu(), "confidence": probability.cpu(), "loss": loss.cpu()}


def joined(batches: Sequence[dict[str, Tensor]]) -> dict[str, Array]:
    """Return what was judged in batches as arrays over all examples."""
    return {name: torch.cat([batch[name] for batch in batches]).numpy() for name in batches[0]}


def _calibration(examples: dict[str, Array]) -> tuple[float, float]:
    """Return the calibration error and its bootstrap standard error over examples."""
    confidence, correct = examples["confidence"], examples["correct"]
    random = np.random.default_rng(0)
    draws = (random.integers(0, len(correct), len(correct)) for _ in range(BOOTSTRAPS))
    spread = np.std([calibration_error(confidence[i], correct[i]) for i in draws], ddof=1)
    return calibration_error(confidence, correct), float(spread)


def evaluation_cell(alpha: float, split: str, examples: dict[str, Array]) -> Cell:
    """Return accuracy, loss, confidence and calibration error as rows with standard errors over examples."""
    found = {
        "accuracy": mean_and_error(examples["correct"].tolist()),
        "loss": mean_and_error(examples["loss"].tolist()),
        "confidence": mean_and_error(examples["confidence"].tolist()),
        "calibration_error": _calibration(examples),
    }
    count = len(examples["correct"])
    rows = tuple(Row(alpha, MODEL, split, name, value, error, count, True) for name, (value, error) in found.items())
    return Cell(cell_key(alpha, split, "evaluation"), rows, examples)
