"""m-sharpness: how much the loss of groups of m examples rises under a perturbation of a layer's weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch

from sharpscope.curvature.estimate import Estimate, Estimates, mean_and_error
from sharpscope.curvature.point import Point
from sharpscope.errors import UsageError
from sharpscope.objective import Batch, Objective
from sharpscope.partition import Partition
from sharpscope.table import MODEL
from sharpscope.tree import Tree, gaussian, norm, select

_SMALLEST = 1e-8  # adaptive scale of a weight that is zero; a plain |w| makes 0/0 in the projection


def groups(objective: Objective, size: int) -> list[Objective]:
    """Return the examples in fixed groups of ``size`` (the last may be smaller), an objective each."""
    inputs = torch.cat([batch.inputs for batch in objective.batches])
    targets = torch.cat([batch.targets for batch in objective.batches])
    pairs = zip(inputs.split(size), targets.split(size), strict=True)
    return [replace(objective, batches=(Batch(x, y),)) for x, y in pairs]


def _scales(weights: Tree, adaptive: bool) -> Tree:
    if adaptive:
        return {name: tensor.detach().abs().clamp_min(_SMALLEST) for name, tensor in weights.items()}
    return {name: torch.ones_like(tensor) for name, tensor in weights.items()}


def ascent(gradient: Tree, scales: Tree, rho: float, norm_order: float) -> Tree:
    """Return the d that maximises <gradient, d> subject to ``||d / c||_p <= rho``, c the scales, p 2 or infinity.

    For p = 2 it is ``rho c^2 g / ||c g||``, for infinity ``rho c sign(g)``; zero where the gradient is zero.
    """
    if norm_order == np.inf:
        return {name: rho * scales[name] * g.sign() for name, g in gradient.items()}
    length = norm({name: scales[name] * g for name, g in gradient.items()})
    if length == 0:
        return {name: torch.zeros_like(g) for name, g in gradient.items()}
    return {name: (rho / length) * scales[name] ** 2 * g for name, g in gradient.items()}


def moved(weights: Tree, step: Tree) -> Tree:
    """Return the weights with the step added where it has entries."""
    return {name: tensor + step[name] if name in step else tensor for name, tensor in weights.items()}


@dataclass(frozen=True)
class MSharpness:
    """Worst-case m-sharpness by one ascent step: mean over groups S of ``L_S(w + d) - L_S(w)``, d in one layer only.

    d is the maximiser of the linearised loss of the group within ``||d / c||_p <= rho`` (arXiv 2010.01412), with
    c = 1 or, adaptive, ``max(|w|, 1e-8)``. A lower bound of the true maximum. The standard error is over groups
    and so holds the sampling of the images. Cost: one gradient, and one forward per layer.
    """

    name: ClassVar[str] = "m_sharpness"
    rho: float = 0.05
    m: int = 32
    norm: Literal["2", "inf"] = "2"
    adaptive: bool = False
    relative: float = 0.3

    def __post_init__(self) -> None:
        if self.rho <= 0 or self.m < 1 or self.norm not in ("2", "inf"):
            raise UsageError(f"{self} cannot be meant", "rho > 0, m >= 1 and norm '2' or 'inf'")

    def __call__(self, point: Point, layers: Partition, seed: int) -> Estimates:  # noqa: ARG002
        """Yield an estimate per layer, then of the model."""
        wanted = {**layers.layers, MODEL: layers.names}
        rises: dict[str, list[float]] = {layer: [] for layer in wanted}
        sizes: list[int] = []
        for group in groups(point.objective, self.m):
            sizes.append(group.examples)
            for layer, rise in self._rises(point, group, wanted):
                rises[layer].append(rise)
        for layer, found in rises.items():
            yield layer, self._estimate(np.array(found), np.array(sizes))

    def _rises(self, point: Point, group: Objective, wanted: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, float]]:
        here = Point(group, point.weights, wanted[MODEL], graph_bytes=0)
        scales = _scales(select(point.weights, wanted[MODEL]), self.adaptive)
        for layer, names in wanted.items():
            step = ascent(select(here.gradient, names), scales, self.rho, float(self.norm))
            yield layer, group(moved(point.weights, step)) - here.loss

    def _estimate(self, rises: np.ndarray, sizes: np.ndarray) -> Estimate:
        value = float(np.average(rises, weights=sizes))
        _, error = mean_and_error(list(rises))
        return Estimate(value, error, len(rises), error <= self.relative * abs(value), rises)


@dataclass(frozen=True)
class AverageMSharpness:
    """Average-case m-sharpness: mean of ``L(w + d) - L(w)`` over Gaussian d = rho c N(0, 1) in one layer only.

    The mean over groups is linear, so m does not matter and all examples form one group. Draws come as pairs
    (d, -d), which removes the gradient term: for small rho the value is ``rho^2 / 2 * tr(c H c)`` of the layer.
    Cost: two forwards per layer and draw.
    """

    name: ClassVar[str] = "m_sharpness_average"
    rho: float = 0.01
    draws: int = 8
    adaptive: bool = False
    relative: float = 0.3

    def __post_init__(self) -> None:
        if self.rho <= 0 or self.draws < 1:
            raise UsageError(f"{self} cannot be meant", "rho > 0 and draws >= 1")

    def __call__(self, point: Point, layers: Partition, seed: int) -> Estimates:
        """Yield an estimate per layer, then of the model."""
        for layer, names in {**layers.layers, MODEL: layers.names}.items():
            own = select(point.weights, names)
            scales = _scales(own, self.adaptive)
            rises = [self._rise(point, own, scales, (seed, self.name, layer, draw)) for draw in range(self.draws)]
            value, error = mean_and_error(rises)
            yield layer, Estimate(value, error, len(rises), error <= self.relative * abs(value), np.array(rises))

    def _rise(self, point: Point, own: Tree, scales: Tree, key: tuple[object, ...]) -> float:
        noise = gaussian(own, *key)
        losses = []
        for sign in (1, -1):
            step = {name: sign * self.rho * scales[name] * tensor for name, tensor in noise.items()}
            losses.append(point.objective(moved(point.weights, step)))
        return (losses[0] + losses[1]) / 2 - point.loss
