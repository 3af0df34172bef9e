"""The set of perturbations of a layer, ``||d / c||_p <= rho``: steepest ascent, projection, random points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from sharpscope.errors import UsageError
from sharpscope.tree import Tree, gaussian, norm, scaled

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
        length = norm(bent)
        share = self.rho / length if length > 0 else 0.0
        return {name: share * self.scales[name] * g for name, g in bent.items()}

    def project(self, d: Tree) -> Tree:
        """Return the nearest point of the ball in the coordinates d / c."""
        if self.p == "inf":
            return {name: t.clamp(-self.rho * self.scales[name], self.rho * self.scales[name]) for name, t in d.items()}
        length = norm({name: tensor / self.scales[name] for name, tensor in d.items()})
        return scaled(d, self.rho / length) if length > self.rho else d

    def random(self, *key: object) -> Tree:
        """Return a point inside the ball, determined by the key: half way out in a Gaussian direction."""
        direction = {name: self.scales[name] * tensor for name, tensor in gaussian(self.scales, *key).items()}
        inner = Ball(self.rho / 2, self.p, self.scales)
        return inner.project(scaled(direction, 1e6 * self.rho / max(norm(direction), 1e-300)))


def check(rho: float, p: str) -> None:
    """Raise unless radius and norm can be meant."""
    if not rho > 0 or p not in ("2", "inf"):
        raise UsageError(f"rho={rho}, norm={p!r} cannot be meant", "rho > 0 and norm '2' or 'inf'")
