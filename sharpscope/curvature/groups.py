"""Groups of a batch's examples that have weights of their own in one graph: in one product, a probe for each of them.

The graph is that of ``torch.func.vmap`` over the groups, every group with a view of the weights. Differentiated by
these views, it gives a gradient, and a product, of each group; their sum is the batch's.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils.flop_counter import FlopCounterMode

from sharpscope.objective import Batch, Objective
from sharpscope.precision import matmul_precision
from sharpscope.tree import Tree

LEAST = 8  # examples of a group: smaller ones hardly lower the variance of a trace further
ROOM = 1 / 24  # share of the memory that one probe of all groups may take; four or five such are there at once
# As a share: more work means that something is computed once a group and not once an example, such as texts.
DEARER = 0.02
GAP = 1e-3  # as a share of the loss


@dataclass(frozen=True)
class Piece:
    """Examples that have a graph: a batch, or where memory is short a part of it."""

    batch: Batch
    groups: range = range(1)  # those of the batch that it holds, or holds a part of

    @property
    def count(self) -> int:
        """Number of its groups."""
        return len(self.groups)


def pieces_of(batch: Batch, groups: int, pieces: int) -> list[Piece]:
    """Return the batch in about so many pieces: of whole groups, or where they are more than the groups, of each."""
    if pieces <= groups:
        bounds = [groups * piece // pieces for piece in range(pieces + 1)]
        each = len(batch.targets) // groups
        parts = batch.split([each * bound for bound in bounds[1:-1]])
        return [Piece(p, range(*pair)) for p, pair in zip(parts, pairwise(bounds), strict=True)]
    cut = -(-pieces // groups)
    return [Piece(p, range(g, g + 1)) for g, group in enumerate(batch.split(groups)) for p in group.split(cut)]


@dataclass(frozen=True)
class Grouping:
    """How batches are grouped."""

    most: int = 1  # groups of a batch

    def of(self, batch: Batch) -> int:
        """Return the number of groups, all of one size."""
        count = len(batch.targets)
        return max(g for g in range(1, max(min(self.most, count // LEAST), 1) + 1) if count % g == 0)

    def cut(self, objective: Objective) -> list[list[Piece]]:
        """Return the pieces of each of this rank's batches."""
        return [pieces_of(batch, self.of(batch), objective.pieces) for batch in objective.own_batches]


def grouping(objective: Objective, weights: Tree, names: Sequence[str], memory: int | None = None) -> Grouping:
    """Return the grouping that the objective allows, none where its examples cannot be computed in groups.

    They can where the loss is a sum over examples, ``vmap`` takes the model, groups give the loss that they give
    together, and it is no more work. Tried on two groups. ``memory`` is a limit in bytes. Cost: two forwards of them.
    """
    bytes_each = sum(weights[name].nbytes for name in names)
    most = Grouping(int(_memory(weights[names[0]].device, memory) * ROOM / max(bytes_each, 1)))
    batch = max(objective.batches, key=most.of)
    if objective.coupled or objective.again is not None or (groups := most.of(batch)) == 1:
        return Grouping()
    two = Piece(batch.split([2 * (len(batch.targets) // groups)])[0], range(2))
    return most if _alike(objective, weights, names, two) else Grouping()


def _memory(device: torch.device, limit: int | None) -> int:
    """Return all memory of the device, or the limit: what is free differs from run to run, and with it probes would."""
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
    else:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total if limit is None else min(total, limit)


def _alike(objective: Objective, weights: Tree, names: Sequence[str], two: Piece) -> bool:
    """Return whether two groups have the loss that they have together, without further work."""
    with torch.no_grad(), warnings.catch_warnings(), matmul_precision("highest"):  # TF32 would blur a small loss
        warnings.filterwarnings("error", message="There is a performance drop")  # a loop over the groups
        with FlopCounterMode(display=False) as together:
            whole = float(objective.part(weights, two.batch))
        try:
            with FlopCounterMode(display=False) as apart:
                own = Views.of({name: weights[name] for name in names}, two)
                parts = mapped(lambda own, batch: objective.part({**weights, **own}, batch), own.tensors, two)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a model does that vmap cannot follow: control flow, numbers read from tensors
            return False
    work, once = apart.get_total_flops(), together.get_total_flops()
    return bool(work <= (1 + DEARER) * once) and abs(float(parts.sum()) - whole) <= GAP * abs(whole)


@dataclass(frozen=True)
class Views:
    """Weights that a piece's graph is differentiated by: where it has several groups, a view of them for each.

    Vectors and products have the weights' shapes, the same vector for all groups and the sum of their products; or,
    with ``each``, a first axis over the groups.
    """

    tensors: Tree
    groups: range

    @classmethod
    def of(cls, leaves: Tree, piece: Piece) -> Views:
        """Return views of the leaves; nothing is copied."""
        if piece.count == 1:
            return cls(leaves, piece.groups)
        return cls({name: leaf.expand(piece.count, *leaf.shape) for name, leaf in leaves.items()}, piece.groups)

    @property
    def several(self) -> bool:
        """Whether there are several groups."""
        return len(self.groups) > 1

    def directions(self, v: Tree, names: Iterable[str], each: bool) -> list[Tensor]:
        """Return the vector's entries as the views have them."""
        return [v[n][0] if each and not self.several else v[n].expand_as(self.tensors[n]) for n in names]

    def shaped(self, names: Iterable[str], found: Iterable[Tensor | None], each: bool) -> Tree:
        """Return derivatives by the views as a product, without the tensors that have none."""
        tensors = {name: tensor for name, tensor in zip(names, found, strict=True) if tensor is not None}
        if each == self.several:
            return tensors
        return {name: tensor[None] if each else tensor.sum(0) for name, tensor in tensors.items()}


def mapped(function: Callable[[Tree, Batch], Tensor], own: Tree, piece: Piece) -> Tensor:
    """Return the function of each group's weights and examples, along a first axis."""

    def one(own: Tree, inputs: Any, targets: Tensor) -> Tensor:
        return function(own, Batch(inputs, targets))

    batch, count = piece.batch, piece.count
    found: Tensor = vmap(one)(own, _grouped(batch.inputs, count), _grouped(batch.targets, count))
    return found


class _AtOnce(torch.autograd.Function):
    @staticmethod
    def forward(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        return function(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, places: tuple[int | None, ...], function: Callable[..., Tensor], *arguments: Any
    ) -> tuple[Tensor, int]:
        moved = (
            argument if not isinstance(argument, Tensor)
            else argument.expand(info.batch_size, *argument.shape) if place is None
            else argument.movedim(place, 0)
            for argument, place in zip(arguments, places[1:], strict=True)
        )  # fmt: skip
        return function(*moved), 0


def at_once(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Return a function of tensors of ``vmap``, called once with all groups along first axes.

    It is differentiated as it is written: ``vmap`` has no other way to say that.
    """
    found: Tensor = _AtOnce.apply(function, *arguments)  # type: ignore[no-untyped-call]
    return found


def _grouped(examples: Any, groups: int) -> Any:
    if isinstance(examples, Mapping):
        return {name: _grouped(tensor, groups) for name, tensor in examples.items()}
    return examples.unflatten(0, (groups, -1))
