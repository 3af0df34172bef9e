"""The straight path from the zero-shot to the fine-tuned weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpscope.errors import UsageError
from sharpscope.partition import Partition
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
    end: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        check_same_structure(self.start, self.end, ("the zero-shot model", "the fine-tuned model"))

    def __call__(self, alpha: float) -> Tree:
        """Return the weights at alpha; alpha outside [0, 1] extrapolates."""
        return {name: mix(tensor, self.end[name], alpha) for name, tensor in self.start.items()}

    def mixed(self, alphas: Mapping[str, float], layers: Partition) -> Tree:
        """Return the weights with an alpha for each layer: ``start_l + alpha_l * (end_l - start_l)``.

        The same arithmetic as one alpha for all: equal alphas give the tensors of ``self(alpha)`` bit for bit, a layer
        at 0 or 1 those of the end.

        Parameters
        ----------
        alphas
            Layer id -> alpha, for every layer that holds a tensor of the path.
        layers
            Every tensor of the path in one layer.

        Raises
        ------
        UsageError
            If a tensor of the path is in no layer, a layer has no alpha, or an alpha is given to no layer.
        """
        home = {name: layer for layer, names in layers.layers.items() for name in names}
        if homeless := next((name for name in self.start if name not in home), None):
            raise UsageError(f"tensor {homeless!r} of the path is in no layer", "a partition of every tensor")
        if missing := next((home[name] for name in self.start if home[name] not in alphas), None):
            raise UsageError(f"layer {missing!r} has no alpha", "Recipe(...).alphas(layers) gives every layer one")
        if unknown := next((layer for layer in alphas if layer not in layers.layers), None):
            raise UsageError(f"there is no layer {unknown!r} to give an alpha", f"layers: {', '.join(layers.layers)}")
        return {name: mix(tensor, self.end[name], alphas[home[name]]) for name, tensor in self.start.items()}

    @property
    def delta(self) -> Tree:
        """End minus start."""
        return {name: self.end[name] - tensor for name, tensor in self.start.items()}
