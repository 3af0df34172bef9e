"""Autograd graphs of batches, kept while memory allows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sharpscope.curvature.groups import Piece
from sharpscope.curvature.recorded import shortened
from sharpscope.errors import ModelError
from sharpscope.objective import Again, Objective, restored, saving
from sharpscope.sharding import local
from sharpscope.tree import Tree, select

Graph = TypeVar("Graph", bound="Grouped")

Names = Sequence[str]
Block = Callable[[Graph, Names, Tree, bool], Tree]  # see `Part`
Exact = Callable[[Graph], Graph]
HEADROOM = 0.5  # share of free memory that kept graphs may take; products need room of their own


class _SavedBytes:
    """Counts the bytes that autograd saves, each storage once, but for what can be made again."""

    def __init__(self, besides: Iterable[Tensor], again: Again | None) -> None:
        self._seen = {local(tensor).untyped_storage().data_ptr() for tensor in besides}
        self._unsaved = again
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        if self._unsaved and (again := self._unsaved(tensor)):
            return again
        storage = local(tensor).untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        # Detached: a node that holds its own output, and so itself, is never freed. Autograd puts the history back.
        return tensor.detach()


class Graphs(Generic[Graph]):
    """The graph of each batch: made at its first use, kept while the budget lasts, else made anew each time.

    Parameters
    ----------
    make
        Returns the graph of a piece.
    batches
        The pieces of each, in their order; of a batch in several pieces no graph is kept.
    constants
        Tensors that are there anyway and count for nothing.
    budget
        Bytes that kept graphs may take, measured as autograd saves them.
    again
        Which tensors graphs need not hold.
    """

    def __init__(
        self,
        make: Callable[[Piece], Graph],
        batches: Sequence[Sequence[Piece]],
        constants: Iterable[Tensor],
        budget: int,
        again: Again | None = None,
    ) -> None:
        self._graph = make
        self._unsaved = again
        self._batches = batches
        self._constants = tuple(constants)
        self._budget = budget
        self.kept: list[Graph] = []
        self.kept_bytes = 0
        self.measured: list[int] = []  # bytes of the first batches' graphs, as far as they were looked at
        self._full = False

    def __iter__(self) -> Iterator[Graph]:
        """Yield each batch's graph, or those of its pieces; it must be retained when it is differentiated."""
        return chain.from_iterable(self.by_batch())

    def by_batch(self) -> Iterator[Iterable[Graph]]:
        """Yield the graphs of each batch."""
        return map(self.of, range(len(self._batches)))

    def of(self, index: int) -> Iterable[Graph]:
        """Return a batch's graph, made when it is asked for; at first the batches come in their order."""
        if index < len(self.kept):
            return (self.kept[index],)
        pieces = self._batches[index]
        if len(pieces) > 1:
            return _Anew(self._make, pieces)
        return _Later(partial(self._again, pieces[0])) if self._full else (self._first(pieces[0]),)

    def groups(self, index: int) -> int:
        """Return the number of groups of a batch."""
        return self._batches[index][-1].groups.stop

    def _again(self, piece: Piece) -> Graph:
        return self._make(piece)

    def renew(self) -> bool:
        """Compute the kept graphs anew where they lie, and return whether they can be; see the workspace."""
        raise NotImplementedError

    def _make(self, piece: Piece) -> Graph:
        with saving(self._unsaved):
            return self._graph(piece)

    def _first(self, piece: Piece) -> Graph:
        counter = _SavedBytes(self._constants, self._unsaved)
        try:
            with saved_tensors_hooks(counter.pack, restored):
                graph = self._graph(piece)
        except RuntimeError as refusal:  # a forward with torch.func in it: what is saved cannot be counted
            if not re.search("support saved tensor hooks|invalid python storage", str(refusal)):
                raise
            self._full = True
            return self._make(piece)
        size = counter.bytes + graph.nbytes
        self.measured.append(size)
        self._full = self.kept_bytes + size > self._budget
        if not self._full:
            self.kept_bytes += size
            self.kept.append(graph)
        return graph


@dataclass
class _Later(Generic[Graph]):
    """A graph that is made at its first use: where only late layers are asked for, it is none."""

    make: Callable[[], Graph]

    def __iter__(self) -> Iterator[Graph]:
        return iter((self._made,))

    @cached_property
    def _made(self) -> Graph:
        return self.make()


@dataclass(frozen=True)
class _Anew(Generic[Graph]):
    """The graphs of the pieces of a batch, made anew whenever they are walked through, one at a time."""

    make: Callable[[Piece], Graph]
    pieces: Sequence[Piece]

    def __iter__(self) -> Iterator[Graph]:
        return map(self.make, self.pieces)


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Say in a sentence that an operation has no second derivative.

    Raises
    ------
    ModelError
        If torch says so.
    """
    try:
        yield
    except RuntimeError as refusal:
        if not re.search(r"derivative .*not implemented|differentiate twice", str(refusal)):
            raise
        raise ModelError(
            f"an operation of the model or its loss has no second derivative in torch: {shortened(refusal)}",
            "the same by other operations, as nn.Embedding and a sum for nn.EmbeddingBag; "
            "or m_sharpness, which needs first derivatives only",
        ) from refusal


class Grouped(Protocol):
    """A graph of some groups of a batch."""

    @property
    def groups(self) -> range:
        """Which of the batch's groups."""

    @property
    def nbytes(self) -> int:
        """What it holds beside what autograd saved."""


@dataclass(frozen=True)
class Part(Generic[Graph]):
    """What one batch adds to the blocks of a matrix.

    Parameters
    ----------
    product
        Of a graph, the names of a layer's tensors and a vector over them, absent where nothing; the last argument says
        whether vector and product have an entry for each of the graph's groups, along a first axis.
    graphs
        The graphs to walk through for these names; layers that have the same ones are walked through together.
    groups
        Of the batch.
    exact
        Returns a graph in numbers of more range, for products that are not finite in its own; None: there is none.
    """

    product: Block[Graph]
    graphs: Callable[[Names], Iterable[Graph]]
    groups: int = 1
    exact: Exact[Graph] | None = None

    def block(self, names: Names, v: Tree) -> Tree:
        """Return the block times v; tensors without a part are absent."""
        return self.blocks({names: v})

    def blocks(self, vectors: Mapping[Names, Tree]) -> Tree:
        """Return the products of several blocks, of tensors that no two share."""
        return self._sure(lambda exact: self._blocks(vectors, exact))

    def each(self, names: Names, v: Tree) -> Tree:
        """Return each group's block times a vector of its own; a first axis counts the groups if there are several."""
        if self.groups == 1:
            return self.block(names, v)
        return self._sure(lambda exact: self._each(names, v, exact))

    def _sure(self, image: Callable[[Exact[Graph]], Tree]) -> Tree:
        found = image(_itself)
        return found if self.exact is None or _finite(found) else image(self.exact)

    def _blocks(self, vectors: Mapping[Names, Tree], exact: Exact[Graph]) -> Tree:
        total: Tree = {}
        for graphs, layers in self._together(vectors):
            for made in graphs:
                graph = exact(made)
                for names in layers:
                    for name, tensor in self.product(graph, names, vectors[names], False).items():
                        total[name] = total[name] + tensor if name in total else tensor
                del made, graph  # before the next is made
        return total

    def _together(self, vectors: Iterable[Names]) -> Iterable[tuple[Iterable[Graph], list[Names]]]:
        """Return graphs with all that is asked of them: what is made anew for each walk is made once."""
        found: dict[int, tuple[Iterable[Graph], list[Names]]] = {}
        for names in vectors:
            graphs = self.graphs(names)
            found.setdefault(id(graphs), (graphs, []))[1].append(names)
        return found.values()

    def _each(self, names: Names, v: Tree, exact: Exact[Graph]) -> Tree:
        total: Tree = {}
        for made in self.graphs(names):
            graph = exact(made)
            some = slice(graph.groups.start, graph.groups.stop)
            mine = {name: v[name][some] for name in names}
            for name, tensor in self.product(graph, names, mine, True).items():
                if len(tensor) == self.groups:  # of the whole batch: nothing to add to
                    total[name] = tensor
                else:
                    total.setdefault(name, torch.zeros_like(v[name]))[some] += tensor
            del made, graph
        return total


def _itself(graph: Graph) -> Graph:
    return graph


def _finite(tree: Tree) -> bool:
    """Return whether all entries are: a sum is, unless one of them is not."""
    sums = [tensor.sum() for tensor in tree.values()]
    return not sums or bool(torch.stack(sums).isfinite().all())


def block_diagonal(objective: Objective, parts: Iterator[Part[Graph]], vectors: Mapping[str, Tree]) -> dict[str, Tree]:
    """Return the products of a matrix's blocks with vectors over tensors of their own, in one walk through the data."""

    def share(part: Part[Graph]) -> Tree:
        return part.blocks({tuple(v): v for v in vectors.values()})

    like = {name: tensor for v in vectors.values() for name, tensor in v.items()}
    image = objective.summed((share(part) for part in parts), like)
    return {layer: select(image, v) for layer, v in vectors.items()}
