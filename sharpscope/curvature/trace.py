"""Trace of every layer's Hessian block: joint probes for all layers, own probes where joint ones are too noisy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpscope.curvature.estimate import Estimate, Estimates
from sharpscope.curvature.graphs import Part
from sharpscope.curvature.point import FREE, Matrix, Point
from sharpscope.errors import UsageError
from sharpscope.partition import Partition
from sharpscope.sharding import mesh_of, over_ranks
from sharpscope.table import MODEL
from sharpscope.tree import Tree, flat, rademacher, select

OWN_GAIN = (
    4  # a layer's own draws do the work of so many joint ones; measured 3 to 7 for blocks, far more for small layers
)
_Draws = Iterator[tuple[Tree, Tree]]  # a probe of every group, and its image, absent where there is none
_Answer = tuple[list[list[float]], float]  # of a layer: each group's sums of the draws, squared deviations of entries
_Answers = tuple[dict[str, _Answer], dict[str, _Answer]]  # of a batch: by layer, of joint and of own draws


class Tally:
    """Probes of one block and what they tell of its trace.

    The matrix is a sum over groups b of examples (see `groups.py`; a batch where it has none), and each has probes of
    its own, ``v_b' H_b v_b``: for the same products that has a fraction of the variance of one probe through all
    examples, as the terms between groups are gone.

    The sample variance of a few numbers is a poor guide: they are skewed like a chi-square where one eigenvalue
    rules, and stopping when they happen to agree makes it worse. But each probe also gives the estimate v * (H_b v) of
    the diagonal, weight by weight, and the variance of a sum over a block follows from those of its entries: with
    E = sum of entry variances = sum over b, i in the block, j != i of H_b,ij^2,

    * own probes (zero outside the block): the variance of a draw (a probe of every batch) is ``2 E`` exactly;
    * joint probes: between E (all of it from the cross blocks) and 2 E (none).

    E averages over all weights of the block, so it is good with two draws. It is taken within groups: what differs
    between groups is data, not error.
    """

    def __init__(self, joint: bool) -> None:
        self.joint = joint
        self.samples: list[float] = []  # a draw each
        self.groups = 0
        self._squares = 0.0  # within groups: of the entries
        self._scatter = 0.0  # and of their sums
        self._freedom = 0

    def add(self, batches: list[_Answer], draws: int) -> None:
        """Count a pass over all batches."""
        groups = [sums for mine, _ in batches for sums in mine]
        self.samples += [math.fsum(sums[draw] for sums in groups) for draw in range(draws)]
        self.groups = len(groups)
        self._freedom += draws - 1
        self._squares += math.fsum(squares for _, squares in batches)
        self._scatter += math.fsum(draws * float(np.var(sums)) for sums in groups)

    @property
    def probes(self) -> int:
        """How many probes there were, over draws and groups."""
        return len(self.samples) * self.groups

    @property
    def spread(self) -> float:
        """E of the class docstring."""
        return self._squares / self._freedom

    @property
    def value(self) -> float:
        """The mean over draws."""
        return math.fsum(self.samples) / len(self.samples)

    @property
    def error(self) -> float:
        """The standard error of the value."""
        observed = self._scatter / self._freedom
        variance = min(max(observed, self.spread), 2 * self.spread) if self.joint else 2 * self.spread
        return math.sqrt(variance / len(self.samples))

    def needed(self, goal: float) -> int:
        """Return the number of draws at which the error is predicted to be down to the goal."""
        goal = max(goal, self.error / 100)  # beyond 10,000-fold the count is no matter
        return math.ceil(len(self.samples) * (self.error / goal) ** 2 * 0.999)


@dataclass(frozen=True)
class Trace:
    """Hutchinson estimate of tr H_ll for all layers at once, and of tr H.

    One Rademacher probe v over all tensors gives every layer: v_l . (H v)_l is unbiased for tr H_ll, with variance
    2 * (off-diagonal squares of H_ll) + sum over other layers m of ||H_lm||_F^2. The second term drowns a small layer
    beside large ones; such layers get probes of their own, which have the first term only and cost a layer's
    product. Every group of examples is probed afresh, see :class:`Tally`: many groups make few draws do.

    After a first pass the number of joint draws that minimises the predicted cost is chosen, and own draws where they
    are cheaper; the cost of a layer's product is taken to be the share of the weights that lie in the layer and above
    it, as autograd walks no further. Layers whose product costs next to nothing have own probes from the start. The
    trace of the model is the sum of its layers'. The standard error is about the probes, on the given images.

    Parameters
    ----------
    relative, absolute
        Target of each layer: standard error at most ``relative * |trace|`` or ``absolute * sum of |traces|``.
    first
        Draws before the first look at the spread.
    most
        Largest number of draws, joint and own each; a layer still short of its target is not converged.
    own_cost
        Cost of the first layer's product over that of a whole one; measured .52, falling to .002 for the head.
    matrix
        The Hessian or the Gauss-Newton matrix (for cross-entropy the Fisher).
    """

    relative: float = 0.05
    absolute: float = 0.005
    first: int = 2
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
        joint = {layer: Tally(joint=True) for layer in layers.layers}
        own = {layer: Tally(joint=False) for layer in layers.layers}
        # A list: ranks that gather weights need the order too.
        free = [layer for layer, names in layers.layers.items() if point.share_above(names) < FREE]
        order: _Order | None = _Order(self.first, dict.fromkeys(free, min(4 * self.first, self.most)))
        while order:
            self._pass(point, layers, seed, order, joint, own)
            order = self._next(point, layers, joint, own)
        final = {layer: own[layer] if own[layer].samples else joint[layer] for layer in joint}
        floor = self._floor(final)
        for layer, tally in final.items():
            yield layer, self._estimate(tally, floor)
        yield MODEL, self._whole(list(final.values()))

    def _pass(
        self,
        point: Point,
        layers: Partition,
        seed: int,
        order: _Order,
        joint: dict[str, Tally],
        own: dict[str, Tally],
    ) -> None:
        """Draw what is ordered, batch by batch, so that a batch whose graph is not kept needs it once."""
        done = {"": len(next(iter(joint.values())).samples), **{layer: len(own[layer].samples) for layer in order.own}}
        names = {"": tuple(chain.from_iterable(layers.layers.values())), **layers.layers}
        found, mesh = list[_Answers](), mesh_of(point.gradient.values())
        for number, part in enumerate(point.operator(self.matrix).parts(), point.objective.share.start):

            def draws(of: str, count: int, number: int = number, part: Part[Any] = part) -> _Draws:
                like = _of_groups(select(point.gradient, names[of]), part.groups)
                for draw in range(done[of], done[of] + count):
                    probe = rademacher(like, seed, self.name, of, draw, number)
                    yield probe, part.each(names[of], probe)

            shared = _entries(draws("", order.joint), layers.layers, part.groups, mesh)
            alone: dict[str, _Answer] = {}
            for layer, count in order.own.items():
                alone |= _entries(draws(layer, count), {layer: names[layer]}, part.groups, mesh)
            found.append((shared, alone))
        batches = point.objective.ranks.gathered(found)
        for layer in joint if order.joint else ():
            joint[layer].add([shared[layer] for shared, _ in batches], order.joint)
        for layer, count in order.own.items():
            own[layer].add([alone[layer] for _, alone in batches], count)
        self._count(point, order)

    def _count(self, point: Point, order: _Order) -> None:
        blocks = sum(order.own.values())
        if self.matrix == "hessian":
            point.counts.update({"whole_products": order.joint, "block_products": blocks})
        else:
            point.counts["gauss_newton_products"] += order.joint + blocks

    def _next(self, point: Point, layers: Partition, joint: dict[str, Tally], own: dict[str, Tally]) -> _Order | None:
        """Return what to draw now; None if all targets are met or cannot be."""
        current = {layer: own[layer] if own[layer].samples else joint[layer] for layer in joint}
        floor = self._floor(current)
        short = {layer: t.needed(self._goal(t, floor)) for layer, t in current.items() if not self._met(t, floor)}
        mine = {layer: need for layer, need in short.items() if own[layer].samples}
        shared = {layer: need for layer, need in short.items() if layer not in mine}
        done = len(next(iter(joint.values())).samples)
        wanted = self._joint_draws(point, layers, shared, done)
        mine |= {layer: max(self.first, math.ceil(need / OWN_GAIN)) for layer, need in shared.items() if need > wanted}
        more = {layer: min(need, self.most) - len(own[layer].samples) for layer, need in mine.items()}
        more = {layer: count for layer, count in more.items() if count > 0}
        return _Order(wanted - done, more) if more or wanted > done else None

    def _joint_draws(self, point: Point, layers: Partition, needed: dict[str, int], done: int) -> int:
        """Return the number of joint draws of least predicted cost."""
        costs = {layer: self.own_cost * point.share_above(layers.layers[layer]) for layer in needed}

        def cost(draws: int) -> float:
            return draws + sum(costs[layer] * max(n / OWN_GAIN, self.first) for layer, n in needed.items() if n > draws)

        return min((max(done, min(count, self.most)) for count in (done, *needed.values())), key=cost)

    def _floor(self, tallies: dict[str, Tally]) -> float:
        return self.absolute * math.fsum(abs(tally.value) for tally in tallies.values())

    def _goal(self, tally: Tally, floor: float) -> float:
        return max(self.relative * abs(tally.value), floor)

    def _met(self, tally: Tally, floor: float) -> bool:
        return tally.error <= self._goal(tally, floor)

    def _estimate(self, tally: Tally, floor: float) -> Estimate:
        return Estimate(tally.value, tally.error, tally.probes, self._met(tally, floor), np.array(tally.samples))

    def _whole(self, tallies: list[Tally]) -> Estimate:
        """Return the sum over layers: own estimates are independent, joint ones share their probes."""
        value = math.fsum(tally.value for tally in tallies)
        shared = [tally for tally in tallies if tally.joint]
        joint = 2 * math.fsum(tally.spread / len(tally.samples) for tally in shared)
        error = math.sqrt(joint + math.fsum(tally.error**2 for tally in tallies if not tally.joint))
        # Draws of the whole: the joint layers' together, on top of what the others came to.
        rest = math.fsum(tally.value for tally in tallies if not tally.joint)
        sums = [rest + math.fsum(parts) for parts in zip(*(tally.samples for tally in shared), strict=True)]
        probes = min(tally.probes for tally in tallies)
        return Estimate(value, error, probes, error <= self.relative * abs(value), np.array(sums or [value]))


@dataclass(frozen=True)
class _Order:
    """Draws to make: joint ones, and own ones by layer."""

    joint: int
    own: dict[str, int]


def _of_groups(like: Tree, groups: int) -> Tree:
    """Return the tensors, once for every group along a first axis if there are several; nothing is copied."""
    return like if groups == 1 else {name: tensor.expand(groups, *tensor.shape) for name, tensor in like.items()}


def _entries(draws: _Draws, layers: Mapping[str, Sequence[str]], groups: int, mesh: Any) -> dict[str, _Answer]:
    """Return for each layer each group's sums of the draws, and the squared deviations of their entries from the mean.

    Entries are those of this process where there is a mesh.
    """
    sums: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    squares: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    total: dict[str, Tensor] = {}
    for probe, image in draws:
        for layer, names in layers.items():
            rows = _entrywise(probe, image, names, groups)
            sums[layer].append(rows.sum(1).double())  # torch sums in pairs: as good, in a fifth of the time
            squares[layer].append(_square(rows))
            total[layer] = total[layer].add_(rows) if layer in total else rows
    if not total:
        return {}
    count = len(next(iter(sums.values())))
    off = [torch.stack(squares[layer]).sum() - _square(total[layer]) / count for layer in layers]
    # A column for each draw of each group, and one more.
    columns = torch.stack([torch.stack(sums[layer], 1).flatten() for layer in layers])
    found = over_ranks(torch.cat([columns, torch.stack(off).clamp(min=0)[:, None]], 1), mesh)
    return {
        layer: ([row[start : start + count] for start in range(0, len(row) - 1, count)], row[-1])
        for layer, row in zip(layers, found.tolist(), strict=True)  # the only place that waits for the device
    }


def _entrywise(probe: Tree, image: Tree, names: Sequence[str], groups: int) -> Tensor:
    """Return probe times image, a row for each group. The image is used up: one of all groups is large."""
    mine = select(probe, names)
    images = {name: image.pop(name) if name in image else torch.zeros_like(tensor) for name, tensor in mine.items()}
    if groups == 1:
        return (flat(mine) * flat(images))[None]
    found = torch._foreach_mul(list(images.values()), list(mine.values()))  # one call, not one a tensor
    return torch.cat([tensor.reshape(groups, -1) for tensor in found], 1)


def _square(rows: Tensor) -> Tensor:
    return (rows * rows).sum(1).sum(dtype=torch.float64)
