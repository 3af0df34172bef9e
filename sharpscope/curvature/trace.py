"""Trace of every layer's Hessian block: joint probes for all layers, own probes where joint ones are too noisy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sharpscope.curvature.estimate import Estimate, Estimates
from sharpscope.curvature.lanczos import block_of
from sharpscope.curvature.point import Matrix, Point
from sharpscope.errors import UsageError
from sharpscope.partition import Partition
from sharpscope.table import MODEL
from sharpscope.tree import Tree, axpy, dot, rademacher, select


class Tally:
    """Probes of one block and what they tell of its trace.

    The sample variance of the few numbers v'Hv is a poor guide: they are skewed like a chi-square where one eigenvalue
    rules, and stopping when they happen to agree makes it worse. But each probe also gives the estimate v * (Hv) of the
    diagonal, weight by weight, and the variance of a sum over a block follows from those of its entries: with
    E = sum of entry variances = sum over i in the block, j != i of H_ij^2,

    * own probes (zero outside the block): ``Var v'Hv = 2 E`` exactly;
    * joint probes: between E (all of it from the cross blocks) and 2 E (none).

    E averages over all weights of the block, so it is good with two or three probes.
    """

    def __init__(self, joint: bool) -> None:
        self.samples: list[float] = []
        self.joint = joint
        self._sum: Tree = {}
        self._squares = 0.0

    def add(self, probe: Tree, image: Tree) -> None:
        """Count a probe and the part of its product that lies in the block."""
        diagonal = {name: sign * image[name] for name, sign in probe.items()}
        self.samples.append(dot(probe, image))
        self._squares += dot(image, image)
        self._sum = axpy(1.0, diagonal, self._sum) if self._sum else diagonal

    @property
    def spread(self) -> float:
        """E of the class docstring, estimated from two probes or more."""
        count = len(self.samples)
        return max(self._squares - dot(self._sum, self._sum) / count, 0.0) / (count - 1)

    @property
    def value(self) -> float:
        """The mean over probes."""
        return math.fsum(self.samples) / len(self.samples)

    @property
    def error(self) -> float:
        """The standard error of the value."""
        spread = self.spread
        observed = float(np.var(self.samples, ddof=1))
        variance = min(max(observed, spread), 2 * spread) if self.joint else 2 * spread
        return math.sqrt(variance / len(self.samples))


@dataclass(frozen=True)
class Trace:
    """Hutchinson estimate of tr H_ll for all layers at once, and of tr H.

    One Rademacher probe v over all tensors gives every layer: v_l . (H v)_l is unbiased for tr H_ll, with variance
    2 * (off-diagonal squares of H_ll) + sum over other layers m of ||H_lm||_F^2. The second term drowns a small layer
    beside large ones; such layers get probes of their own, which have the first term only and cost a layer's
    product. After each round the number of joint probes that minimises the predicted cost is chosen; the cost of a
    layer's product is taken to be the share of the weights that lie in the layer and above it, as autograd walks no
    further. The trace of the model is the sum of its layers'. The standard error is that of :class:`Tally`; it is about
    the probes, on the given images.

    Parameters
    ----------
    relative, absolute
        Target of each layer: standard error at most ``relative * |trace|`` or ``absolute * sum of |traces|``.
    first
        Draws before the first look at the spread, joint and own.
    most
        Largest number of draws, joint and own each; a layer still short of its target is not converged.
    own_cost
        Cost of the first layer's product over that of a whole one; measured .52, falling to .002 for the head.
    matrix
        The Hessian or the Gauss-Newton matrix (for cross-entropy the Fisher).
    """

    relative: float = 0.05
    absolute: float = 0.005
    first: int = 3
    most: int = 64
    own_cost: float = 0.5
    matrix: Matrix = "hessian"

    def __post_init__(self) -> None:
        if not 2 <= self.first <= self.most or min(self.relative, self.absolute) < 0:
            raise UsageError(f"{self} cannot be meant", "2 <= first <= most, and targets of zero or more")

    @property
    def name(self) -> str:
        """``trace`` or ``gauss_newton_trace``."""
        return "trace" if self.matrix == "hessian" else "gauss_newton_trace"

    def __call__(self, point: Point, layers: Partition, seed: int) -> Estimates:
        """Yield an estimate per layer, then of the model."""
        final = self._joint(point, layers, seed)
        draws, floor = len(next(iter(final.values())).samples), self._floor(final)
        for layer, names in layers.layers.items():
            if not self._met(final[layer], floor):
                final[layer] = self._own(point, layer, names, seed, floor)
            yield layer, self._estimate(final[layer], floor)
        yield MODEL, self._whole(list(final.values()), draws)

    def _joint(self, point: Point, layers: Partition, seed: int) -> dict[str, Tally]:
        tallies = {layer: Tally(joint=True) for layer in layers.layers}
        operator, own_costs = point.operator(self.matrix), self._own_costs(point, layers)
        done, wanted = 0, self.first
        while done < wanted:
            probe = rademacher(point.gradient, seed, self.name, done)
            image = operator.product(probe)
            for layer, names in layers.layers.items():
                tallies[layer].add(select(probe, names), select(image, names))
            done += 1
            if done == wanted:
                wanted = self._joint_draws(tallies, done, own_costs)
        return tallies

    def _own_costs(self, point: Point, layers: Partition) -> dict[str, float]:
        """Return the predicted cost of each layer's product; by counting weights, so that no clock decides anything."""
        sizes = {layer: sum(point.leaves[n].numel() for n in names) for layer, names in layers.layers.items()}
        total, below, costs = sum(sizes.values()), 0, {}
        for layer, size in sizes.items():
            costs[layer] = self.own_cost * (total - below) / total
            below += size
        return costs

    def _joint_draws(self, tallies: dict[str, Tally], done: int, own_costs: dict[str, float]) -> int:
        """Return the number of joint draws of least predicted cost; own draws are taken to need half as many."""
        floor = self._floor(tallies)
        needed = {layer: self._needed(tally, floor) for layer, tally in tallies.items()}

        def cost(draws: int) -> float:
            own = (own_costs[layer] * max(n / 2, self.first) for layer, n in needed.items() if n > draws)
            return draws + sum(own)

        return min((max(done, min(count, self.most)) for count in (done, *needed.values())), key=cost)

    def _needed(self, tally: Tally, floor: float) -> int:
        """Return the number of draws at which the target is predicted to be met."""
        error = tally.error
        goal = max(self.relative * abs(tally.value), floor, error / 100)  # beyond 10,000-fold the count is no matter
        return len(tally.samples) if error <= goal else math.ceil(len(tally.samples) * (error / goal) ** 2)

    def _own(self, point: Point, layer: str, names: tuple[str, ...], seed: int, floor: float) -> Tally:
        like, tally = select(point.gradient, names), Tally(joint=False)
        product = block_of(point, self.matrix, layer, names)
        while len(tally.samples) < self.first or (len(tally.samples) < self.most and not self._met(tally, floor)):
            probe = rademacher(like, seed, self.name, layer, len(tally.samples))
            tally.add(probe, product(probe))
        return tally

    def _floor(self, tallies: dict[str, Tally]) -> float:
        return self.absolute * math.fsum(abs(tally.value) for tally in tallies.values())

    def _met(self, tally: Tally, floor: float) -> bool:
        return tally.error <= max(self.relative * abs(tally.value), floor)

    def _estimate(self, tally: Tally, floor: float) -> Estimate:
        samples = np.array(tally.samples)
        return Estimate(tally.value, tally.error, len(samples), self._met(tally, floor), samples)

    def _whole(self, tallies: list[Tally], draws: int) -> Estimate:
        """Return the sum over layers: own estimates are independent, joint ones share their probes."""
        value = math.fsum(tally.value for tally in tallies)
        joint = 2 * math.fsum(tally.spread for tally in tallies if tally.joint) / draws
        error = math.sqrt(joint + math.fsum(tally.error**2 for tally in tallies if not tally.joint))
        shared = [tally.samples for tally in tallies] if all(tally.joint for tally in tallies) else []
        sums = np.array([math.fsum(parts) for parts in zip(*shared, strict=True)])
        return Estimate(value, error, draws, error <= self.relative * abs(value), sums)
