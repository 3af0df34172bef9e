"""Weights and gradient graphs of a point; on a GPU they stay in place and serve the next point as well."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sharpscope.curvature.graphs import HEADROOM, Graphs, free_bytes, twice_differentiable
from sharpscope.curvature.groups import Grouping, Piece, Views, grouping, mapped
from sharpscope.curvature.recorded import Products, Recorder, shortened
from sharpscope.curvature.smooth import smooth
from sharpscope.objective import Batch, Objective, restored
from sharpscope.tree import Tree, select


@dataclass(frozen=True)
class GradientGraph:
    """The gradient of a piece with the graph to differentiate it again."""

    loss: Tensor
    slopes: Tree  # the gradient by each view; tensors the loss does not touch are absent
    views: Views
    products: Products

    @property
    def groups(self) -> range:
        """Those of the batch that it holds, or holds a part of."""
        return self.views.groups

    @property
    def nbytes(self) -> int:
        """Of the gradients of several groups; one is no more than the weights are."""
        return sum(slope.nbytes for slope in self.slopes.values()) if self.views.several else 0

    @property
    def gradient(self) -> Tree:
        """The gradient by the weights, without its graph."""
        return self.views.shaped(self.slopes, [slope.detach() for slope in self.slopes.values()], False)

    def product(self, names: Sequence[str], v: Tree, each: bool = False) -> Tree:
        """Return what the piece adds to the block of the named tensors times v; tensors without a part are absent.

        With ``each``, v and the product have a first axis over the groups.
        """
        # A gradient without grad_fn is constant: its row of the Hessian is zero.
        live = [n for n in names if n in self.slopes and self.slopes[n].requires_grad]
        if not live:
            return {}
        slopes, by = [self.slopes[n] for n in live], [self.views.tensors[n] for n in names]

        def product(v: Tree) -> Tree:
            directions = self.views.directions(v, live, each)
            with twice_differentiable():
                found = torch.autograd.grad(slopes, by, directions, retain_graph=True, allow_unused=True)
            return self.views.shaped(names, found, each)

        directed = {n: v[n] for n in live}
        return self.products.unrecorded(directed, product) if each else self.products(tuple(names), directed, product)


@dataclass(frozen=True)
class RenewedGraph(GradientGraph):
    """A gradient graph that was recorded, and can be computed anew where it lies."""

    renew: Callable[[Batch], None]  # for these examples and the weights as they are now


@dataclass(frozen=True)
class Place:
    """Weights with graphs over them; ``leaves`` are those of the weights that are differentiated."""

    objective: Objective
    weights: Tree
    leaves: Tree
    graphs: Graphs[Any]
    grouping: Grouping
    budget: int  # bytes that kept graphs may take
    asked: int | None = None

    def serves(self, objective: Objective, names: Sequence[str], graph_bytes: int | None) -> bool:
        """Return whether it is one for just that."""
        return objective is self.objective and tuple(names) == tuple(self.leaves) and graph_bytes == self.asked

    def late(self, names: Sequence[str], first: int) -> Graphs[GradientGraph]:
        """Return graphs that reach down to the named tensors only, of the batches from the first one on.

        Where these are the last layers, such a graph is small, and making it costs a forward.
        """
        leaves = {name: self.leaves[name].detach().requires_grad_() for name in names}
        weights = {**{name: tensor.detach() for name, tensor in self.weights.items()}, **leaves}
        batches, room = self.grouping.cut(self.objective)[first:], self.budget - self.graphs.kept_bytes
        return Graphs(partial(_graph, self.objective, weights, leaves), batches, weights.values(), room)


class Workspace:
    """Gives each point its place.

    On a GPU the first point's stays for the next ones: the gradient graph of every batch is recorded, with the
    products through it, and at another point all is replayed on the same memory with new weights. A point is of no
    use any more once its workspace has served the next one. Elsewhere each point has a place of its own, as where the
    host starts kernels quickly enough.

    Parameters
    ----------
    recording
        Whether to record at all.
    memory
        Limit in bytes, by which probes of groups are counted out.
    """

    def __init__(self, *, recording: bool = True, memory: int | None = None) -> None:
        self._recording = recording
        self._memory = memory
        self._held: Place | None = None
        self._recorder: Recorder | None = None
        self._grouping: tuple[Objective, Grouping] | None = None

    def clear(self) -> None:
        """Let go of the memory."""
        self._held = None

    def place(self, objective: Objective, weights: Tree, names: Sequence[str], graph_bytes: int | None) -> Place:
        """Return the place for the objective at these weights."""
        device = weights[names[0]].device
        if self._recorder is None:
            self._recorder = Recorder(device if self._recording else torch.device("cpu"))
        if self._held is not None and self._held.serves(objective, names, graph_bytes):
            if self._moved(self._held, weights):
                return self._held
            self._recorder.on = False
            warnings.warn("a recorded gradient went astray: from here on none is recorded", stacklevel=2)
        self.clear()
        grouping = self._grouped(objective, weights, names)
        budget = int(free_bytes(device) * HEADROOM) if graph_bytes is None else graph_bytes
        place = self._plain(objective, grouping, weights, names, budget)
        # What processes gather meanwhile cannot be recorded.
        if self._recorder.on and objective.pieces == 1 and objective.again is None:
            if not self._waits(place):
                self._recorder.on = False
                return place
            del place
            try:
                self._held = self._recorded(objective, grouping, weights, names, budget, graph_bytes)
                return self._held
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as refusal:  # an operation of the model that waits for the device
                self._recorder.on = False
                warnings.warn(f"gradients run unrecorded: {shortened(refusal)}", stacklevel=2)
            place = self._plain(objective, grouping, weights, names, budget)
        return place

    @staticmethod
    def _plain(objective: Objective, grouping: Grouping, weights: Tree, names: Sequence[str], budget: int) -> Place:
        leaves = {name: weights[name].detach().requires_grad_() for name in names}
        make = partial(_graph, objective, {**weights, **leaves}, leaves)
        graphs = Graphs(make, grouping.cut(objective), weights.values(), budget, objective.again)
        return Place(objective, {**weights, **leaves}, leaves, graphs, grouping, budget)

    def _waits(self, place: Place) -> bool:
        """Return whether the device waits for the host: where it does not, recording saves nothing.

        Tried on the product of the lowest tensor, which walks through all layers; kernels are compiled before.
        """
        assert self._recorder is not None
        graph, name = next(iter(place.graphs)), next(iter(place.leaves))
        v = {name: graph.gradient.get(name, place.leaves[name]).detach()}
        graph.product((name,), v)
        self._recorder.first("gradient", lambda: graph.product((name,), v))
        return self._recorder.pays("gradient")

    def _grouped(self, objective: Objective, weights: Tree, names: Sequence[str]) -> Grouping:
        """Return the objective's grouping, found once."""
        if self._grouping is None or self._grouping[0] is not objective:
            leaves = {name: weights[name].detach().requires_grad_() for name in names}

            def gradient(piece: Piece, fused: bool) -> Tree:
                with saved_tensors_hooks(_with_storage, restored):
                    return _graph(objective, {**weights, **leaves}, leaves, piece, fused=fused).gradient

            self._grouping = objective, grouping(objective, weights, names, gradient, self._memory)
        return self._grouping[1]

    def _recorded(
        self,
        objective: Objective,
        grouping: Grouping,
        weights: Tree,
        names: Sequence[str],
        budget: int,
        asked: int | None,
    ) -> Place:
        assert self._recorder is not None
        own = {name: tensor.detach().clone() for name, tensor in weights.items()}
        leaves = {name: own[name].requires_grad_() for name in names}
        batches = grouping.cut(objective)
        with self._recorder.stream():
            for (piece,) in {len(pieces[0].batch.targets): pieces for pieces in batches}.values():
                _warm_up(objective, own, leaves, piece)
        torch.cuda.empty_cache()  # a recording takes memory that is free, not memory that is kept for reuse
        graphs = _InPlace(partial(_recorded_graph, objective, own, leaves, self._recorder), batches, own, budget)
        next(iter(graphs), None)  # what cannot be recorded shows here
        return Place(objective, own, leaves, graphs, grouping, budget, asked)

    @staticmethod
    def _moved(place: Place, weights: Tree) -> bool:
        """Bring the place to other weights; return whether the first batch's loss is the one that is had unrecorded."""
        for name, tensor in place.weights.items():
            tensor.data.copy_(weights[name])  # .data: autograd takes no notice, as the graphs are renewed
        place.graphs.renew()
        for graph, batch in zip(place.graphs.kept[:1], place.objective.own_batches, strict=False):
            with torch.no_grad():
                return bool(torch.isclose(graph.loss, place.objective.part(weights, batch), rtol=2e-2, equal_nan=True))
        return True


class _InPlace(Graphs[RenewedGraph]):
    """Graphs computed anew where they lie: the kept ones at each point, one of each size for all batches beyond."""

    def __init__(
        self,
        make: Callable[[Piece], RenewedGraph],
        batches: Sequence[Sequence[Piece]],
        weights: Tree,
        budget: int,
    ) -> None:
        super().__init__(make, batches, weights.values(), budget)
        self._spare: dict[int, RenewedGraph] = {}

    def renew(self) -> None:
        for graph, (piece,) in zip(self.kept, self._batches, strict=False):
            graph.renew(piece.batch)

    def _first(self, piece: Piece) -> RenewedGraph:
        graph = super()._first(piece)
        if self._full:
            self._spare[len(piece.batch.targets)] = graph
        return graph

    def _again(self, piece: Piece) -> RenewedGraph:
        size = len(piece.batch.targets)
        if size not in self._spare:
            self._spare[size] = self._make(piece)
        self._spare[size].renew(piece.batch)
        return self._spare[size]


def _with_storage(tensor: Tensor) -> Tensor:
    """Return what is saved, looked at as graphs that are kept look at it."""
    tensor.untyped_storage()
    return tensor.detach()


def plain_graph(objective: Objective, weights: Tree, names: Sequence[str]) -> GradientGraph:
    """Return the gradient graph of the first batch as torch alone makes it: no kernel is fused, none compiled."""
    leaves = {name: weights[name].detach().requires_grad_() for name in names}
    return _graph(objective, {**weights, **leaves}, leaves, Piece(objective.batches[0]), fused=False)


def _differentiated(
    objective: Objective, weights: Tree, leaves: Tree, piece: Piece, *, fused: bool = True
) -> tuple[Tensor, Tree, Views]:
    """Return loss and gradient of the piece, the gradient with its graph, and what it is by."""
    views = Views.of(leaves, piece)

    def part(own: Tree, batch: Batch) -> Tensor:
        return objective.part({**weights, **own}, batch)

    fused = fused and next(iter(leaves.values())).is_cuda
    with torch.enable_grad(), smooth(on=fused, batched=views.several):
        loss = mapped(part, views.tensors, piece).sum() if views.several else part(leaves, piece.batch)
        found = torch.autograd.grad(loss, list(views.tensors.values()), create_graph=True, allow_unused=True)
    pairs = zip(leaves, found, strict=True)
    return loss.detach(), {name: tensor for name, tensor in pairs if tensor is not None}, views


def _graph(objective: Objective, weights: Tree, leaves: Tree, piece: Piece, *, fused: bool = True) -> GradientGraph:
    return GradientGraph(*_differentiated(objective, weights, leaves, piece, fused=fused), Products())


def _warm_up(objective: Objective, weights: Tree, leaves: Tree, piece: Piece) -> None:
    """Compile kernels and set up libraries, which none may record."""
    graph = _graph(objective, weights, leaves, piece)
    for names in (list(leaves), list(leaves)[:1]):  # what a layer's product needs of those above is less
        graph.product(names, select(graph.gradient, [name for name in names if name in graph.gradient]))


def _recorded_graph(
    objective: Objective, weights: Tree, leaves: Tree, recorder: Recorder, piece: Piece
) -> RenewedGraph:
    examples = replace(piece, batch=piece.batch.copy())

    def renew(batch: Batch) -> None:
        with recorder.stream():
            examples.batch.take(batch)
            replay()

    with recorder.stream():
        replay, found = recorder.record(lambda: _differentiated(objective, weights, leaves, examples))
    renew(piece.batch)
    return RenewedGraph(*found, Products(recorder, len(piece.batch.targets)), renew)
