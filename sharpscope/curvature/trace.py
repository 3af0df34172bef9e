"""Trace of every layer's Hessian block: joint probes for all layers, own probes where joint ones are too noisy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sharpscope.curvature.estimate import Estimate, Estimates, mean_and_error
from sharpscope.curvature.point import Point
from sharpscope.partition import Partition
from sharpscope.table import MODEL
from sharpscope.tree import dot, rademacher, select

Samples = dict[str, list[float]]


@dataclass(frozen=True)
class Trace:
    """Hutchinson estimate of tr H_ll for all layers at once, and of tr H.

    One Rademacher probe v over all tensors gives every layer: v_l . (H v)_l is unbiased for tr H_ll, with variance
    2 * (off-diagonal squares of H_ll) + sum over other layers m of ||H_lm||_F^2. The second term drowns a small layer
    beside large ones; such layers get probes of their own, which have the first term only and cost a layer's
    product. After each round the number of joint probes that minimises the predicted cost is chosen.

    Parameters
    ----------
    relative, absolute
        Target of each layer: standard error at most ``relative * |trace|`` or ``absolute * sum of |traces|``.
    first
        Draws before the first look at the spread, joint and own.
    most
        Largest number of draws, joint and own each; a layer still short of its target is not converged.
    own_cost
        Cost of a layer's product over that of a whole one, measured .27 (.61 / 2.3 gradients).
    """

    name: ClassVar[str] = "trace"
    relative: float = 0.05
    absolute: float = 0.005
    first: int = 4
    most: int = 64
    own_cost: float = 0.27

    def __call__(self, point: Point, layers: Partition, seed: int) -> Estimates:
        """Yield an estimate per layer, then of the model."""
        joint = self._joint(point, layers, seed)
        floor = self._floor(joint)
        for layer, names in layers.layers.items():
            samples = joint[layer]
            if not self._met(samples, floor):
                samples = self._own(point, layer, names, seed, floor)
            yield layer, self._estimate(samples, floor)
        yield MODEL, self._estimate(joint[MODEL], floor)

    def _joint(self, point: Point, layers: Partition, seed: int) -> Samples:
        samples: Samples = {layer: [] for layer in (*layers.layers, MODEL)}
        wanted = self.first
        while len(samples[MODEL]) < wanted:
            probe = rademacher(point.gradient, seed, self.name, len(samples[MODEL]))
            image = point.product(probe)
            parts = {layer: dot(select(probe, names), image) for layer, names in layers.layers.items()}
            for layer, value in parts.items():
                samples[layer].append(value)
            samples[MODEL].append(math.fsum(parts.values()))
            if len(samples[MODEL]) == wanted:
                wanted = self._joint_draws(samples)
        return samples

    def _joint_draws(self, samples: Samples) -> int:
        """Return the number of joint draws of least predicted cost; own draws are taken to need half as many."""
        done, floor = len(samples[MODEL]), self._floor(samples)
        needed = {layer: self._needed(drawn, floor) for layer, drawn in samples.items()}
        whole = needed.pop(MODEL)  # has no product cheaper than the joint one

        def cost(draws: int) -> float:
            own = (self.own_cost * max(count / 2, self.first) for count in needed.values() if count > draws)
            return draws + sum(own)

        choices = {max(done, min(count, self.most)) for count in (whole, *needed.values())}
        return min((draws for draws in choices if draws >= min(whole, self.most)), key=cost)

    def _needed(self, drawn: list[float], floor: float) -> int:
        mean, error = mean_and_error(drawn)
        if self._met(drawn, floor):
            return len(drawn)
        goal = max(self.relative * abs(mean), floor, error / 100)  # beyond 10,000-fold the count is no matter
        return math.ceil(len(drawn) * (error / goal) ** 2)

    def _own(self, point: Point, layer: str, names: tuple[str, ...], seed: int, floor: float) -> list[float]:
        like, drawn = select(point.gradient, names), list[float]()
        while len(drawn) < self.first or (len(drawn) < self.most and not self._met(drawn, floor)):
            probe = rademacher(like, seed, self.name, layer, len(drawn))
            drawn.append(dot(probe, point.block_product(names, probe)))
        return drawn

    def _floor(self, joint: Samples) -> float:
        return self.absolute * math.fsum(
            abs(mean_and_error(drawn)[0]) for name, drawn in joint.items() if name != MODEL
        )

    def _met(self, drawn: list[float], floor: float) -> bool:
        mean, error = mean_and_error(drawn)
        return error <= max(self.relative * abs(mean), floor)

    def _estimate(self, drawn: list[float], floor: float) -> Estimate:
        value, error = mean_and_error(drawn)
        return Estimate(value, error, len(drawn), self._met(drawn, floor), np.array(drawn))
