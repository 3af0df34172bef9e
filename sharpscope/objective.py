"""The function whose curvature is measured: mean loss over fixed batches, as a function of the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sharpscope.errors import MeasurementError
from sharpscope.tree import Tree


class Batch(NamedTuple):
    """Inputs, first axis examples, and integer targets of shape ``(n,)``."""

    inputs: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on the device."""
        return Batch(self.inputs.to(device), self.targets.to(device))


Forward = Callable[[Tree, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the summed cross-entropy of logits ``(n, classes)`` and targets ``(n,)``."""
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


@dataclass(frozen=True)
class Objective:
    """Mean loss over fixed batches.

    Summed losses are divided once by the number of examples, so unequal batches weigh right by construction.

    Parameters
    ----------
    forward
        ``(weights, inputs) -> outputs``.
    loss
        ``(outputs, targets) -> sum over examples``.
    batches
        Fixed; the same at every point of a path.
    """

    forward: Forward
    loss: Loss
    batches: tuple[Batch, ...]

    @property
    def examples(self) -> int:
        """Number of examples over all batches."""
        return sum(len(batch.targets) for batch in self.batches)

    def outputs(self, weights: Tree, inputs: Tensor) -> Tensor:
        """Return the outputs; attention runs unfused, as the fused kernels have no second derivative."""
        with sdpa_kernel(SDPBackend.MATH):
            return self.forward(weights, inputs)

    def part(self, weights: Tree, batch: Batch) -> Tensor:
        """Return what the batch adds to the mean loss: its summed loss over the number of all examples."""
        return self.loss(self.outputs(weights, batch.inputs), batch.targets) / self.examples

    @torch.no_grad()
    def __call__(self, weights: Tree) -> float:
        """Return the mean loss. Cost: one forward."""
        total = sum(self.part(weights, batch).double() for batch in self.batches)
        return float(total)


def check_finite(loss: float, place: str) -> None:
    """Raise if the loss is not a finite number."""
    if not torch.isfinite(torch.tensor(loss)):
        raise MeasurementError(
            f"the loss at {place} is {loss}",
            "check the inputs for NaN or infinities, and the two checkpoints for weights that overflow",
        )


def check_deterministic(objective: Objective, weights: Tree) -> None:
    """Raise unless two evaluations of the first batch give the same loss, bit for bit. Cost: two forwards of a batch.

    Raises
    ------
    MeasurementError
        If the loss of the same batch differs: dropout that ignores ``eval()``, a random augmentation in ``forward``.
    """
    with torch.no_grad():
        first, second = (float(objective.part(weights, objective.batches[0])) for _ in range(2))
    # NaN is reported as NaN, not as non-determinism.
    if first != second and first == first:
        raise MeasurementError(
            f"the loss of one batch is {first!r}, then {second!r}: the model is random in evaluation mode",
            "switch off dropout or random augmentation inside forward",
        )
