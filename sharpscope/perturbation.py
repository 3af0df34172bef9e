"""m-sharpness: how much the loss of groups of m examples rises under a perturbation of a layer's weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from sharpscope.apgd import ascend
from sharpscope.ball import Ball, Norm, check
from sharpscope.capacity import free_bytes
from sharpscope.curvature.estimate import Estimate, Estimates, mean_and_error
from sharpscope.curvature.point import Point
from sharpscope.errors import UsageError
from sharpscope.losses import logit_normalised
from sharpscope.objective import Batch, Objective
from sharpscope.partition import Partition
from sharpscope.ranks import ALONE
from sharpscope.sharding import is_shard
from sharpscope.table import MODEL
from sharpscope.tree import Tree, gaussian, select, uniform

ROOM = 0.25  # share of free memory for the gradients of groups that are done together


def groups(objective: Objective, size: int) -> list[Objective]:
    """Return the examples in fixed groups of ``size`` (the last may be smaller), an objective each, for one rank.

    A loss that couples the examples of a batch has its batches as groups.

    Raises
    ------
    UsageError
        If batches of another size are such groups already, or the inputs are no plain tensors.
    """
    if objective.coupled:
        if (there := len(objective.batches[0].targets)) != size:
            raise UsageError(
                f"m-sharpness of groups of {size}, a contrastive loss has batches of {there}", f"m={there}"
            )
        return [replace(objective, batches=(batch,), ranks=ALONE) for batch in objective.batches]
    if not all(isinstance(batch.inputs, torch.Tensor) for batch in objective.batches):
        raise UsageError("m-sharpness regroups examples, and these inputs are no plain tensors", "trace or lambda_max")
    inputs = torch.cat([batch.inputs for batch in objective.batches])
    targets = torch.cat([batch.targets for batch in objective.batches])
    pairs = zip(torch.split(inputs, size), torch.split(targets, size), strict=True)
    return [replace(objective, batches=(Batch(x, y),), ranks=ALONE) for x, y in pairs]


def moved(weights: Tree, step: Tree) -> Tree:
    """Return the weights with the step added where it has entries."""
    return {name: tensor + step[name] if name in step else tensor for name, tensor in weights.items()}


def _objective(point: Point, normalised: bool) -> Objective:
    return replace(point.objective, loss=logit_normalised(point.objective.loss)) if normalised else point.objective


@dataclass(frozen=True)
class MSharpness:
    """Worst-case m-sharpness: mean over groups S of ``max L_S(w + d) - L_S(w)``, d in a layer, ``||d / c||_p <= rho``.

    The maximum is sought by one ascent step (SAM, arXiv 2010.01412) or by ``steps`` of APGD with restarts
    (arXiv 2302.07011), so the value is a lower bound of the true one. The maximum is taken per group, then averaged,
    groups weighing by their size. The standard error is over groups and so holds the sampling of the images.
    Cost: one gradient and one forward per layer; APGD: ``steps * (restarts + 1)`` gradients per layer.

    Parameters
    ----------
    rho
        Radius of the ball.
    m
        Examples per group.
    norm
        ``"2"`` or ``"inf"``.
    adaptive
        c = ``max(|w|, 1e-8)`` instead of 1: free of the scale of weights.
    logits
        ``"raw"``, or ``"normalised"``: loss of logits centred and divided by their norm.
    steps, restarts
        1: a single ascent step. More: APGD from zero, then from ``restarts`` random points.
    relative
        Relative standard error up to which a row counts as converged.
    label
        Name in the rows; default from the settings.
    """

    rho: float = 0.05
    m: int = 32
    norm: Norm = "2"
    adaptive: bool = False
    logits: str = "raw"
    steps: int = 1
    restarts: int = 0
    relative: float = 0.3
    label: str = ""

    def __post_init__(self) -> None:
        check(self.rho, self.norm)
        if min(self.m, self.steps) < 1 or self.restarts < 0 or self.logits not in ("raw", "normalised"):
            raise UsageError(f"{self} cannot be meant", "m, steps >= 1, restarts >= 0, logits 'raw' or 'normalised'")

    @property
    def name(self) -> str:
        """``m_sharpness`` with what departs from the default."""
        return self.label or _named("m_sharpness", {"apgd": self.steps > 1, "inf": self.norm == "inf"}, self)

    def __call__(self, point: Point, layers: Partition, seed: int) -> Estimates:
        """Yield an estimate per layer, then of the model."""
        wanted = {**layers.layers, MODEL: layers.names}
        balls = {
            layer: Ball.around(select(point.weights, names), self.rho, self.norm, self.adaptive)
            for layer, names in wanted.items()
        }
        ranks, every = point.objective.ranks, groups(_objective(point, self.logits == "normalised"), self.m)
        share = ranks.share(len(every))
        rises: dict[str, list[float]] = {layer: [] for layer in wanted}
        number = share.start
        for chunk in self._chunks(every[share.start : share.stop], point):
            if len(chunk) > 1:
                found = self._together(point, chunk, balls)
            else:
                found = {
                    layer: [rise] for layer, rise in self._rises(point, chunk[0], balls, (seed, self.name, number))
                }
            for layer, more in found.items():
                rises[layer] += more
            number += len(chunk)
        parts, sizes = ranks.gathered([rises]), np.array([group.examples for group in every])
        for layer in wanted:
            yield layer, self._estimate(np.array([rise for part in parts for rise in part[layer]]), sizes)

    def _chunks(self, all_groups: list[Objective], point: Point) -> Iterator[list[Objective]]:
        """Yield groups that are done at once: on a GPU, for single steps, as many as have room for their gradients."""
        device = next(iter(point.leaves.values())).device
        bytes_each = 4 * sum(leaf.nbytes for leaf in point.leaves.values())
        most = 1
        shards = any(map(is_shard, point.leaves.values()))
        if device.type == "cuda" and self.steps == 1 and not point.objective.coupled and not shards:
            most = max(1, int(free_bytes(device) * ROOM / bytes_each))
        whole = [group for group in all_groups if group.examples == self.m]
        yield from (whole[start : start + most] for start in range(0, len(whole), most))
        yield from ([group] for group in all_groups[len(whole) :])

    @torch.no_grad()
    def _together(self, point: Point, chunk: list[Objective], balls: dict[str, Ball]) -> dict[str, list[float]]:
        """Return the rises of groups of equal size, all groups in each call: small groups leave a GPU idle."""
        inputs = torch.stack([group.batches[0].inputs for group in chunk])
        targets = torch.stack([group.batches[0].targets for group in chunk])
        one, weights = chunk[0], point.weights

        def loss(some: Tree, x: Tensor, y: Tensor) -> Tensor:
            return one.part({**weights, **some}, Batch(x, y))

        own = {name: tensor.detach() for name, tensor in select(weights, balls[MODEL].scales).items()}
        gradients, base = vmap(grad_and_value(loss), (None, 0, 0))(own, inputs, targets)
        rises = {}
        for layer, ball in balls.items():

            def best(slope: Tree, x: Tensor, y: Tensor, ball: Ball = ball) -> Tensor:
                return loss(moved(select(own, slope), ball.steepest(slope)), x, y)

            found = vmap(best)(select(gradients, ball.scales), inputs, targets)
            rises[layer] = (found.double() - base.double()).tolist()
        return rises

    def _rises(
        self, point: Point, group: Objective, balls: dict[str, Ball], key: tuple[object, ...]
    ) -> Iterator[tuple[str, float]]:
        base, gradient = group.gradient(point.weights, balls[MODEL].scales)
        for layer, ball in balls.items():
            own = select(gradient, ball.scales)
            if self.steps == 1:
                best = group(moved(point.weights, ball.steepest(own)))
            else:
                best = ascend(group, point.weights, ball, (base, own), self.steps, self.restarts, (*key, layer))
            yield layer, best - base

    def _estimate(self, rises: np.ndarray, sizes: np.ndarray) -> Estimate:
        """Return the mean weighted by size; the groups of m tell how far one scatters, a smaller one does so more."""
        whole, weights = rises[sizes == self.m], sizes / sizes.sum()
        value = float(np.average(rises, weights=sizes))
        deviation = float(np.std(whole, ddof=1)) if len(whole) > 1 else math.inf
        error = deviation * math.sqrt(float(weights**2 @ (self.m / sizes)))
        samples = whole if len(whole) > 1 else rises
        return Estimate(value, error, len(rises), error <= self.relative * abs(value), samples)


@dataclass(frozen=True)
class AverageMSharpness:
    """Average-case m-sharpness: mean of ``L(w + d) - L(w)``, d random in one layer, ``rho c N(0, 1)`` or uniform.

    The mean over groups is linear, so m does not matter and all examples form one group. Draws come as pairs
    (d, -d), which removes the gradient term: for small rho the value is ``rho^2 / 2 * tr(c H c)`` of the layer
    (uniform noise: a third of it). Cost: two forwards per layer and draw.

    Parameters
    ----------
    rho
        Standard deviation of the Gaussian (``norm="2"``), half width of the uniform noise (``"inf"``), per weight.
    draws
        Pairs.
    norm, adaptive, logits, relative, label
        As in :class:`MSharpness`.
    """

    rho: float = 0.01
    draws: int = 8
    norm: Norm = "2"
    adaptive: bool = False
    logits: str = "raw"
    relative: float = 0.3
    label: str = ""

    def __post_init__(self) -> None:
        check(self.rho, self.norm)
        if self.draws < 1 or self.logits not in ("raw", "normalised"):
            raise UsageError(f"{self} cannot be meant", "draws >= 1 and logits 'raw' or 'normalised'")

    @property
    def name(self) -> str:
        """``m_sharpness_average`` with what departs from the default."""
        return self.label or _named("m_sharpness_average", {"inf": self.norm == "inf"}, self)

    def __call__(self, point: Point, layers: Partition, seed: int) -> Estimates:
        """Yield an estimate per layer, then of the model."""
        objective = _objective(point, self.logits == "normalised")
        base = objective(point.weights)
        for layer, names in {**layers.layers, MODEL: layers.names}.items():
            ball = Ball.around(select(point.weights, names), self.rho, self.norm, self.adaptive)
            keys = ((seed, self.name, layer, draw) for draw in range(self.draws))
            rises = [self._mean_loss(objective, point.weights, ball, key) - base for key in keys]
            value, error = mean_and_error(rises)
            yield layer, Estimate(value, error, len(rises), error <= self.relative * abs(value), np.array(rises))

    def _mean_loss(self, objective: Objective, weights: Tree, ball: Ball, key: tuple[object, ...]) -> float:
        noise = gaussian(ball.scales, *key) if self.norm == "2" else uniform(ball.scales, *key)
        step = {name: ball.rho * ball.scales[name] * tensor for name, tensor in noise.items()}
        back = {name: -tensor for name, tensor in step.items()}
        return (objective(moved(weights, step)) + objective(moved(weights, back))) / 2


def _named(base: str, parts: dict[str, bool], measure: MSharpness | AverageMSharpness) -> str:
    parts = {**parts, "adaptive": measure.adaptive, "logit_normalised": measure.logits == "normalised"}
    return "_".join([base, *(part for part, present in parts.items() if present)])
