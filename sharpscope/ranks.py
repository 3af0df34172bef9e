"""Processes that share one measurement: who does what, and sums that do not depend on how many there are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain, islice
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sharpscope.device import own_device
from sharpscope.errors import MeasurementError, SharpscopeError, UsageError
from sharpscope.sharding import all_gather
from sharpscope.tree import Tree, unflat

T = TypeVar("T")
Parallel = Literal["data", "alphas", "weights"]
# A rank that dies is noticed at once; these are for one that hangs.
LOCKSTEP = timedelta(minutes=30)  # ranks add the same product
APART = timedelta(hours=12)  # one rank waits until another is through with an alpha


class _Node(NamedTuple):
    """The sum over the parts ``place * 2**level`` up to ``(place + 1) * 2**level``."""

    level: int
    place: int
    tree: Tree


@dataclass(frozen=True)
class Ranks:
    """The processes of a measurement and this one's place among them; by default it is alone.

    All methods but :meth:`share` and :meth:`mine` are collective: every rank calls them in the same order. A rank that
    runs out of memory between them says so by :meth:`give_up`, and the others' next call raises ``OutOfMemoryError``.

    Parameters
    ----------
    rank, size
        This process's number, from 0, and how many there are.
    objects
        Process group that Python objects go through; tensors take the default group.
    """

    rank: int = 0
    size: int = 1
    objects: Any = None

    @property
    def leads(self) -> bool:
        """Whether this is the rank that reads and writes files and talks."""
        return self.rank == 0

    def share(self, count: int, rank: int | None = None) -> range:
        """Return which of ``count`` things in a row a rank does, by default this one; even to one."""
        rank = self.rank if rank is None else rank
        return range(count * rank // self.size, count * (rank + 1) // self.size)

    def mine(self, things: Iterable[T], count: int) -> Iterator[T]:
        """Yield this rank's share of ``count`` things in a row."""
        share = self.share(count)
        return islice(things, share.start, share.stop)

    def gathered(self, values: Sequence[T]) -> list[T]:
        """Return the values of all ranks, in the order of the ranks. They are pickled: none on a GPU."""
        if self.size == 1:
            return list(values)
        found: list[Any] = [None] * self.size
        self._go_on()
        with self._in_touch():
            dist.all_gather_object(found, list(values), group=self.objects)
        return [value for part in found for value in part]

    def led(self, work: Callable[[], T]) -> T:
        """Return what the work gave on rank 0, the only one that does it; its error is raised on all ranks."""
        answers: list[tuple[T | None, SharpscopeError | OSError | None]] = []
        if self.leads:
            try:
                answers.append((work(), None))
            except (SharpscopeError, OSError) as failure:
                answers.append((None, failure))
        ((answer, error),) = self.gathered(answers)
        if error is not None:
            raise error
        return answer  # type: ignore[return-value]

    def check_equal(self, facts: dict[str, Any]) -> None:
        """Raise ``UsageError`` unless these are the same on all ranks."""
        for rank, theirs in enumerate(self.gathered([facts])):
            if differing := [name for name, fact in facts.items() if theirs.get(name) != fact]:
                raise UsageError(
                    f"the processes of this scan do not measure the same: {', '.join(differing)} differ between rank "
                    f"{self.rank} and rank {rank}",
                    "load the same weights and data in every process, in the same order, on GPUs of one kind",
                )

    def summed(self, parts: Iterable[Tree], like: Tree, count: int) -> Tree:
        """Return the sum of ``count`` trees, of which this rank gives its share; names that no tree has are zero.

        Added in pairs, pairs of pairs and so on: a fixed order, so that the bits do not depend on the number of ranks.
        Memory: ``log2(count)`` trees. Each rank sends and receives two trees, for any number of ranks.
        """
        nodes: list[_Node] = []
        for place, tree in enumerate(parts, self.share(count).start):
            _push(nodes, _Node(0, place, tree))
        if self.size == 1:
            total = _total(nodes)
        else:
            self._go_on()
            total = {}
            for dtype in {tensor.dtype: None for tensor in like.values()}:
                total |= self._exchanged(nodes, {n: t for n, t in like.items() if t.dtype == dtype}, count)
        return {name: total[name] if name in total else torch.zeros_like(tensor) for name, tensor in like.items()}

    def _exchanged(self, nodes: list[_Node], like: Tree, count: int) -> Tree:
        """Return the sum of all ranks' nodes, of entries of one dtype.

        Every rank gets a slice of each node, adds the slices and gives their sum to all.
        """
        blocks = [list(_blocks(self.share(count, rank))) for rank in range(self.size)]
        first, length = next(iter(like.values())), sum(tensor.numel() for tensor in like.values())
        width = -(-length // self.size)
        sent = first.new_zeros(self.size, len(nodes), width)
        for number, node in enumerate(nodes):
            sent[:, number] = _padded(_flat(node.tree, like), self.size * width).view(self.size, width)
        slices = first.new_empty(sum(map(len, blocks)), width)
        every = first.new_empty(self.size * width)
        with self._in_touch():
            own = [len(nodes)] * self.size
            dist.all_to_all_single(slices, sent.view(-1, width), list(map(len, blocks)), own)
            joined_nodes: list[_Node] = []
            for (level, place), piece in zip(chain.from_iterable(blocks), slices, strict=True):
                _push(joined_nodes, _Node(level, place, {"": piece}))
            all_gather(every, _total(joined_nodes).get("", torch.zeros_like(every[:width])))
        return unflat(every[:length], like)

    def _go_on(self) -> None:
        if self._given_up(False):
            raise torch.OutOfMemoryError("another process ran out of memory")

    def give_up(self, error: BaseException) -> None:
        """Tell the others that this rank ran out of memory, unless the error is that another did."""
        if self.size > 1 and "another process" not in str(error):
            self._given_up(True)

    def _given_up(self, here: bool) -> bool:
        count = torch.tensor([float(here)])
        with self._in_touch():
            dist.all_reduce(count, group=self.objects)
        return bool(count > 0)

    @contextmanager
    def _in_touch(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as failure:
            raise MeasurementError(
                f"rank {self.rank} of {self.size} has lost the others: {str(failure).splitlines()[0]}",
                "see what the rank that ended first says; the same command again goes on from the cells on disk",
            ) from failure


ALONE = Ranks()


def _push(nodes: list[_Node], node: _Node) -> None:
    """Append a node to those before it, joined with its left neighbour where the two make a larger node."""
    while node.place % 2 and nodes and nodes[-1].level == node.level:
        node = _Node(node.level + 1, node.place // 2, _plus(nodes.pop().tree, node.tree))
    nodes.append(node)


def _plus(a: Tree, b: Tree) -> Tree:
    both = [name for name in b if name in a]
    # One launch for all: on a GPU two hundred small additions take as long as a product.
    sums = torch._foreach_add([a[name] for name in both], [b[name] for name in both]) if both else ()
    return {**a, **b, **dict(zip(both, sums, strict=True))}


def _blocks(share: range) -> Iterator[tuple[int, int]]:
    """Yield level and place of the nodes that the numbers of a share make.

    >>> list(_blocks(range(3, 9)))
    [(0, 3), (2, 1), (0, 8)]
    """
    start = share.start
    while start < share.stop:
        level = (share.stop - start).bit_length() - 1
        while start % 2**level:
            level -= 1
        yield level, start // 2**level
        start += 2**level


def _total(nodes: Sequence[_Node]) -> Tree:
    total: Tree = {}
    for node in reversed(nodes):
        total = _plus(node.tree, total)
    return total


def _flat(tree: Tree, like: Tree) -> Tensor:
    """Return all entries in a row, zero where the tree has none."""
    pieces = (tree[name] if name in tree else torch.zeros_like(tensor) for name, tensor in like.items())
    return torch.cat([piece.detach().reshape(-1) for piece in pieces])


def _padded(entries: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(entries, (0, length - len(entries)))


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Give the processes of torch's default process group, or this one alone if there is no such group."""
    if not _initialised() or dist.get_world_size() == 1:
        yield ALONE
        return
    group = dist.new_group(backend="gloo", timeout=APART)
    yield Ranks(dist.get_rank(), dist.get_world_size(), group)
    dist.destroy_process_group(group)  # not after an error: that would wait for ranks that are gone


def parallel_from(chosen: Parallel | None, chains: int, ranks: Ranks, *, in_shards: bool = False) -> Parallel:
    """Return what the ranks share: by default the chains if there is one for each, else the data.

    Of models in shards always the weights, also where one process holds all of them: they are no plain tensors.

    Raises
    ------
    UsageError
        If chains are to be shared and there are fewer than ranks, or models in shards are to be shared otherwise.
    """
    if chosen not in (None, "data", "alphas", "weights"):
        raise UsageError(f"parallel={chosen!r}", "'data', 'alphas' or 'weights'")
    if in_shards:
        if chosen not in (None, "weights"):
            raise UsageError(
                f"parallel={chosen!r} of models in shards, which no process can compute with alone",
                "parallel='weights', which is their default, or the plain modules",
            )
        return "weights"
    if chosen == "weights" and ranks.size == 1:
        return "data"  # one process holds all of them
    if chosen == "alphas" and chains < ranks.size:
        raise UsageError(
            f"{ranks.size} processes are to share the alphas, which form {chains} chain(s)",
            f"chains={ranks.size} (it is part of the plan: chains do not know each other's eigenvectors), "
            "or parallel='data'",
        )
    return chosen or ("alphas" if ranks.size > 1 and chains >= ranks.size else "data")


@contextmanager
def launched(device: str | None) -> Iterator[bool]:
    """Be in the process group of the processes that ``torchrun`` started, where it started this one.

    NCCL between GPUs, gloo between CPUs. Gives whether this process is the one that writes and talks.

    Raises
    ------
    UsageError
        See :func:`sharpscope.device.own_device`.
    """
    place = own_device(device)  # refused before images are read
    begun = "TORCHELASTIC_RUN_ID" in os.environ and not _initialised()
    if begun:
        dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", timeout=LOCKSTEP)
    yield not _initialised() or dist.get_rank() == 0
    if begun:
        dist.destroy_process_group()


def mesh_over(device: torch.device) -> Any:
    """Return the mesh of all processes, one axis."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (dist.get_world_size(),))
