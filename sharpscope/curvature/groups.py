"""Groups of a batch's examples that have weights of their own in one graph: in one product, a probe for each of them.

The graph is that of ``torch.func.vmap`` over the groups, every group with a view of the weights. Differentiated by
these views, it gives a gradient, and a product, of each group; their sum is the batch's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sharpscope.capacity import total_bytes
from sharpscope.objective import Batch, Objective
from sharpscope.precision import matmul_precision
from sharpscope.tree import Tree, norm

# Groups of all batches together: with more, two draws, the fewest that say how far they scatter, are better than asked
# for, and each group is a probe as large as the weights. Of 32 groups a draw of ViT-B/32's blocks is 7 to 14 % off.
ENOUGH = 64
LEAST = 8  # examples of a group: smaller ones hardly lower the variance of a trace further
# Operations of a group's forward for each of its weights, about twice the rows that a weight is used on. A probe of a
# group costs as much as its weights are many: below this, in wide networks of few rows, that is most of a product.
BUSY = 128
ROOM = 1 / 24  # share of the memory that one probe of all groups may take; five or six such are there at once
# As a share: more work means that something is computed once a group and not once an example, such as texts.
DEARER = 0.02
GAP = {torch.float64: 1e-9}  # between gradients in two ways, as a share
GAP_IN_FLOAT32 = 1e-4
GAP_AS_RUN = 0.02  # in TF32 or float16


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
    least: int = LEAST  # examples of a group

    def of(self, batch: Batch) -> int:
        """Return the number of groups, all of one size."""
        count = len(batch.targets)
        return max(g for g in range(1, max(min(self.most, count // self.least), 1) + 1) if count % g == 0)

    def cut(self, objective: Objective) -> list[list[Piece]]:
        """Return the pieces of each of this rank's batches."""
        return [pieces_of(batch, self.of(batch), objective.pieces) for batch in objective.own_batches]


def grouping(
    objective: Objective,
    weights: Tree,
    names: Sequence[str],
    gradient: Callable[[Piece, bool], Tree],
    memory: int | None = None,
) -> Grouping:
    """Return the grouping that the objective allows, none where its examples cannot be computed in groups.

    They can where the loss is a sum over examples, ``vmap`` takes the model, groups have the gradient that they have
    together, and it is no more work. Groups are as small as is worth their probes.

    Parameters
    ----------
    objective, weights, names
        The mean loss, all tensors, and those that are differentiated.
    gradient
        Returns that of a piece's groups together, as graphs are made if wanted, else as torch alone does. Tried on two
        groups of every batch of another size or shape.
    memory
        Limit in bytes, of which :data:`ROOM` is a share; None: all that the device has.
    """
    if objective.coupled or objective.again is not None:
        return Grouping()
    entries = sum(weights[name].numel() for name in names)
    bytes_each = sum(weights[name].nbytes for name in names)
    most = int(_memory(weights[names[0]].device, memory) * ROOM / max(bytes_each, 1))
    most = min(most, -(-ENOUGH // len(objective.batches)))
    large = max(objective.batches, key=lambda batch: len(batch.targets))
    if min(most, len(large.targets) // LEAST) < 2:
        return Grouping()
    try:
        work = _operations(objective, weights, names, Piece(large.split([LEAST])[0]))
        found = Grouping(most, max(LEAST, -(-BUSY * entries * LEAST // max(work, 1))))
        different = {_shapes(batch): batch for batch in objective.batches if found.of(batch) > 1}
        sound = all(_alike(objective, weights, names, gradient, _two(batch, found)) for batch in different.values())
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a model does that vmap cannot follow: control flow, numbers read from tensors
        return Grouping()
    return found if sound else Grouping()


def _shapes(batch: Batch) -> tuple[object, ...]:
    inputs = batch.inputs.values() if isinstance(batch.inputs, Mapping) else (batch.inputs,)
    return tuple(tensor.shape for tensor in (*inputs, batch.targets))


def _two(batch: Batch, found: Grouping) -> Piece:
    return Piece(batch.split([2 * (len(batch.targets) // found.of(batch))])[0], range(2))


def _memory(device: torch.device, limit: int | None) -> int:
    """Return all memory of the device, or the limit: what is free differs from run to run, and with it probes would."""
    total = total_bytes(device)
    return total if limit is None else min(total, limit)


@torch.no_grad()
def _operations(objective: Objective, weights: Tree, names: Sequence[str], piece: Piece) -> int:
    """Return the operations of matrix products in the loss of a piece."""
    own = Views.of({name: weights[name] for name in names}, piece)

    def part(own: Tree, batch: Batch) -> Tensor:
        return objective.part({**weights, **own}, batch)

    counting = _Counting()
    with _Refusing(), counting:
        mapped(part, own.tensors, piece) if own.several else part(own.tensors, piece.batch)
    return counting.operations


def _alike(
    objective: Objective, weights: Tree, names: Sequence[str], gradient: Callable[[Piece, bool], Tree], two: Piece
) -> bool:
    """Return whether two groups have the gradient that they have together, without further work."""
    together = Piece(two.batch)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="There is a performance drop")  # a loop over the groups
        with matmul_precision("highest"):  # TF32 would hide small gaps
            once, work = (_operations(objective, weights, names, piece) for piece in (together, two))
            one, other = gradient(together, False), gradient(two, False)
        as_run = gradient(two, True)  # what is compiled now serves the graphs
    most = max((float(tensor.abs().max()) for tensor in one.values() if tensor.numel()), default=0.0)

    def near(a: Tensor, b: Tensor) -> bool:
        gap = GAP.get(a.dtype, GAP_IN_FLOAT32)
        return float((a - b).abs().max()) <= gap * max(float(a.abs().max()), 1e-3 * most)

    same = one.keys() == other.keys() == as_run.keys() and all(near(one[n], other[n]) for n in one if one[n].numel())
    same = same and norm({n: as_run[n] - one[n] for n in one}) <= GAP_AS_RUN * norm(one)
    return same and work <= (1 + DEARER) * once


class _Counting(TorchDispatchMode):
    """Counts the operations of matrix products, as torch's own counter does in three times as long."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: int = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        if (count := flop_registry.get(function.overloadpacket)) is not None:
            self.operations += int(count(*args, **(kwargs or {}), out_val=found))
        return found


class _Refusing(TorchFunctionMode):
    """Refuses embeddings with a padding index or gradients scaled by frequency, which ``vmap`` leaves out silently."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") == "embedding":
            freely = 5 if function is functional.embedding else 3  # the place of scale_grad_by_freq
            padding = args[2] if len(args) > 2 else kwargs.get("padding_idx")
            scaled = args[freely] if len(args) > freely else kwargs.get("scale_grad_by_freq", False)
            if padding not in (None, -1) or scaled:
                raise NotImplementedError("vmap of an embedding with more than a table")
        return function(*args, **kwargs)


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
