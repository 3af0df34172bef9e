"""The set of perturbations of a layer, ``||d / c||_p <= rho``: steepest ascent, projection, random points."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from sharpscope.errors import UsageError
from sharpscope.tree import Tree, gaussian, norm, scaled, uniform

Norm = Literal["2", "inf"]
SMALLEST = 1e-8  # adaptive scale of a weight that is zero; a plain |w| makes 0/0 in the projection


@dataclass(frozen=True)
class Ball:
    """All d with ``||d / c||_p <= rho``, c = 1 or, adaptive, ``max(|w|, 1e-8)`` of the layer's weights."""

    rho: float
    p: Norm
    scales: Tree

    @staticmethod
    def around(weights: Tree, rho: float, p: Norm, adaptive: bool) -> Ball:
        """Return the ball at the weights of a layer."""
        if adaptive:
            scales = {name: tensor.detach().abs().clamp_min(SMALLEST) for name, tensor in weights.items()}
        else:
            scales = {name: torch.ones_like(tensor) for name, tensor in weights.items()}
        return Ball(rho, p, scales)

    def steepest(self, gradient: Tree) -> Tree:
        """Return the d of the ball with the largest ``<gradient, d>``; zero where the gradient is zero.

        ``rho c^2 g / ||c g||`` for p = 2, ``rho c sign(g)`` for infinity.
        """
        if self.p == "inf":
            return {name: self.rho * self.scales[name] * g.sign() for name, g in gradient.items()}
        bent = {name: self.scales[name] * g for name, g in gradient.items()}
        # As a tensor, so that the directions of many groups can be had in one call (torch.func.vmap).
        length = torch.stack([tensor.double().square().sum() for tensor in bent.values()]).sum().sqrt()
        share = torch.where(length > 0, self.rho / length, 0.0)
        return {name: share.to(g.dtype) * self.scales[name] * g for name, g in bent.items()}

    def project(self, d: Tree) -> Tree:
        """Return the nearest point of the ball in the coordinates d / c."""
        if self.p == "inf":
            return {name: t.clamp(-self.rho * self.scales[name], self.rho * self.scales[name]) for name, t in d.items()}
        length = norm({name: tensor / self.scales[name] for name, tensor in d.items()})
        return scaled(d, self.rho / length) if length > self.rho else d

    def random(self, *key: object) -> Tree:
        """Return a uniformly distributed point of the ball (in the coordinates d / c), determined by the key."""
        if self.p == "inf":
            return {name: self.rho * self.scales[name] * t for name, t in uniform(self.scales, *key).items()}
        direction = gaussian(self.scales, *key)
        size = sum(tensor.numel() for tensor in direction.values())
        # |N(0, 1)| -> uniform through the normal distribution, so that one kind of draw serves for both parts.
        share = math.erf(abs(float(gaussian({"radius": torch.zeros(())}, *key)["radius"])) / math.sqrt(2))
        length = self.rho * share ** (1 / size) / norm(direction)
        return {name: length * self.scales[name] * tensor for name, tensor in direction.items()}


def check(rho: float, p: str) -> None:
    """Raise unless radius and norm can be meant."""
    if not rho > 0 or p not in ("2", "inf"):
        raise UsageError(f"rho={rho}, norm={p!r} cannot be meant", "rho > 0 and norm '2' or 'inf'")
