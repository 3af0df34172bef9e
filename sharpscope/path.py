"""The straight path from the zero-shot to the fine-tuned weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sharpscope.tree import Tree, check_same_structure


def mix(start: Tensor, end: Tensor, alpha: float) -> Tensor:
    """Return ``start + alpha * (end - start)``, computed in float32 or better; exact at both ends."""
    if alpha in (0.0, 1.0) or torch.equal(start, end):
        return start if alpha == 0.0 else end
    wide = torch.promote_types(start.dtype, torch.float32)
    return torch.lerp(start.to(wide), end.to(wide), alpha).to(start.dtype)


@dataclass(frozen=True)
class Path:
    """Two ends with the same tensors; calling it with alpha gives the weights there.

    Raises
    ------
    MismatchError
        If the ends differ in names, shapes or dtypes.
    """

    start: Tree
    end: Tree

    def __post_init__(self) -> None:
        check_same_structure(self.start, self.end, ("the zero-shot model", "the fine-tuned model"))

    def __call__(self, alpha: float) -> Tree:
        """Return the weights at alpha; alpha outside [0, 1] extrapolates."""
        return {name: mix(tensor, self.end[name], alpha) for name, tensor in self.start.items()}

    @property
    def delta(self) -> Tree:
        """End minus start."""
        return {name: self.end[name] - tensor for name, tensor in self.start.items()}
