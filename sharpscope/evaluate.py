"""Accuracy, loss and confidence of a network on a data set, example by example."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sharpscope.curvature.estimate import mean_and_error
from sharpscope.objective import Batch, Forward
from sharpscope.table import MODEL, Array, Cell, Row, cell_key
from sharpscope.tree import Tree


@torch.no_grad()
def per_example(
    forward: Forward, weights: Tree, batches: Iterable[Batch], columns: Tensor | None = None
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
    """
    found: dict[str, list[Tensor]] = {"correct": [], "confidence": [], "loss": []}
    for inputs, targets in batches:
        logits = forward(weights, inputs).float()
        if columns is not None:
            logits = torch.full_like(logits, -torch.inf).index_copy(1, columns, logits[:, columns])
        probability, predicted = logits.softmax(1).max(1)
        found["correct"].append(predicted == targets)
        found["confidence"].append(probability)
        found["loss"].append(cross_entropy(logits, targets, reduction="none"))
    return {name: torch.cat(parts).cpu().numpy() for name, parts in found.items()}


def evaluation_cell(alpha: float, split: str, examples: dict[str, Array]) -> Cell:
    """Return accuracy, loss and confidence as rows with standard errors over examples."""
    measures = {"accuracy": "correct", "loss": "loss", "confidence": "confidence"}
    rows = []
    for measure, source in measures.items():
        values = examples[source].astype(np.float64)
        mean, error = mean_and_error(values.tolist())
        rows.append(Row(alpha, MODEL, split, measure, mean, error, len(values), True))
    return Cell(cell_key(alpha, split, "evaluation"), tuple(rows), examples)
