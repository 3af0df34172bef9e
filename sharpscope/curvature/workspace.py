"""Weights and gradient graphs of a point; on a GPU they stay in place and serve the next point as well."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sharpscope.capacity import free_bytes
from sharpscope.curvature.gradient import TRIES, GradientGraph, RenewedGraph, differentiated, graph
from sharpscope.curvature.graphs import HEADROOM, Graphs
from sharpscope.curvature.groups import Grouping, Piece, grouping
from sharpscope.curvature.half import Half
from sharpscope.curvature.recorded import Products, Recorder, shortened
from sharpscope.curvature.route import Route, route
from sharpscope.objective import Batch, Objective, restored
from sharpscope.tree import Tree, select

How = tuple[Grouping, Route]  # in which groups, and in which way


class Kept(NamedTuple):
    """Graphs that are kept, and the bytes that they take."""

    graphs: int
    nbytes: int


NONE = Kept(0, 0)


@dataclass(frozen=True)
class Place:
    """Weights with graphs over them; ``leaves`` are those of the weights that are differentiated."""

    objective: Objective
    weights: Tree
    leaves: Tree
    graphs: Graphs[Any]
    grouping: Grouping
    route: Route
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
        make = partial(graph, self.objective, weights, leaves, fused=self.route.fused)
        return Graphs(make, batches, weights.values(), room)


class Workspace:
    """Gives each point its place.

    On a GPU where the device waits for the host the second point's (the first's, where there are several batches) stays
    for the next ones: the gradient graph of every batch is recorded, with the products through it, and at another point
    all is replayed on the same memory with new weights. A point is of no use any more once its workspace has served the
    next one. Elsewhere each point has a place of its own.

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
        self._points = 0
        self._recorder: Recorder | None = None
        self._tried: tuple[Objective, Grouping, Route] | None = None
        self._graphs: Callable[[], Graphs[Any] | None] = lambda: None  # the last, while a point has them

    @property
    def kept(self) -> Kept:
        """What the point that was made last keeps, if it is still there."""
        graphs = self._graphs()
        return NONE if graphs is None else Kept(len(graphs.kept), graphs.kept_bytes)

    def clear(self) -> None:
        """Let go of the memory."""
        self._held = None

    def place(self, objective: Objective, weights: Tree, names: Sequence[str], graph_bytes: int | None) -> Place:
        """Return the place for the objective at these weights."""
        found = self._place(objective, weights, names, graph_bytes)
        self._graphs = weakref.ref(found.graphs)
        return found

    def _place(self, objective: Objective, weights: Tree, names: Sequence[str], graph_bytes: int | None) -> Place:
        device = weights[names[0]].device
        if self._recorder is None:
            self._recorder = Recorder(device if self._recording else torch.device("cpu"))
        if self._held is not None and self._held.serves(objective, names, graph_bytes):
            if self._moved(self._held, weights):
                return self._held
            self._recorder.on = False
            warnings.warn("a recorded gradient went astray: from here on none is recorded", stacklevel=2)
        self.clear()
        how = self._how(objective, weights, names)
        budget = int(free_bytes(device) * HEADROOM) if graph_bytes is None else graph_bytes
        place = self._plain(objective, how, weights, names, budget)
        self._points += 1
        # Recording takes as long as some twenty gradients of one batch, more than it saves at a single point with all
        # examples in one; of eight small batches it saves three times that. What processes gather meanwhile cannot be
        # recorded.
        pays = self._points > 1 or len(objective.own_batches) > 1
        if pays and self._recorder.on and objective.pieces == 1 and objective.again is None:
            if not self._waits(place):
                self._recorder.on = False
                return place
            del place
            try:
                recorded = self._recorded(objective, how, weights, names, budget)
                self._held = replace(recorded, asked=graph_bytes)
                return self._held
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as refusal:  # an operation of the model that waits for the device
                self._recorder.on = False
                warnings.warn(f"gradients run unrecorded: {shortened(refusal)}", stacklevel=2)
            place = self._plain(objective, how, weights, names, budget)
        return place

    @staticmethod
    def _plain(objective: Objective, how: How, weights: Tree, names: Sequence[str], budget: int) -> Place:
        leaves = {name: weights[name].detach().requires_grad_() for name in names}
        make = how[1].of(partial(graph, objective, {**weights, **leaves}, leaves))
        graphs = Graphs(make, how[0].cut(objective), weights.values(), budget, objective.again)
        return Place(objective, {**weights, **leaves}, leaves, graphs, *how, budget)

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

    def _how(self, objective: Objective, weights: Tree, names: Sequence[str]) -> How:
        """Return the objective's grouping, and the way of its graphs; found once."""
        if self._tried is None or self._tried[0] is not objective:
            leaves = {name: weights[name].detach().requires_grad_() for name in names}
            make = partial(graph, objective, {**weights, **leaves}, leaves)
            with saved_tensors_hooks(_with_storage, restored):
                way = route(make, objective, leaves)

            def gradient(piece: Piece, as_run: bool) -> Tree:
                with saved_tensors_hooks(_with_storage, restored):
                    return (way if as_run else Route(fused=False)).of(make)(piece).gradient

            self._tried = objective, grouping(objective, weights, names, gradient, self._memory), way
        return self._tried[1:]

    def _recorded(
        self,
        objective: Objective,
        how: How,
        weights: Tree,
        names: Sequence[str],
        budget: int,
    ) -> Place:
        assert self._recorder is not None
        own = {name: tensor.detach().clone() for name, tensor in weights.items()}
        leaves = {name: own[name].requires_grad_() for name in names}
        grouping, way = how
        batches = grouping.cut(objective)
        with self._recorder.stream():
            for (piece,) in {len(pieces[0].batch.targets): pieces for pieces in batches}.values():
                _warm_up(way.of(partial(graph, objective, own, leaves)), piece)
        # A recording takes memory that is free, not memory that is kept for reuse; where the two are all of a device,
        # products are not recorded for want of it, and every tensor after that is asked of the driver.
        torch.cuda.empty_cache()
        graphs = _InPlace(partial(_recorded_graph, objective, own, leaves, self._recorder, way), batches, own, budget)
        next(iter(graphs), None)  # what cannot be recorded shows here
        return Place(objective, own, leaves, graphs, *how, budget)

    @staticmethod
    def _moved(place: Place, weights: Tree) -> bool:
        """Bring the place to other weights; return whether the first batch's loss is the one that is had unrecorded."""
        for name, tensor in place.weights.items():
            tensor.data.copy_(weights[name])  # .data: autograd takes no notice, as the graphs are renewed
        if not place.graphs.renew():
            return False
        for kept, batch in zip(place.graphs.kept[:1], place.objective.own_batches, strict=False):
            with torch.no_grad():
                return bool(torch.isclose(kept.loss, place.objective.part(weights, batch), rtol=2e-2, equal_nan=True))
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

    def renew(self) -> bool:
        return all(kept.renew(piece.batch) for kept, (piece,) in zip(self.kept, self._batches, strict=False))

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


def _warm_up(make: Callable[[Piece], GradientGraph], piece: Piece) -> None:
    """Compile kernels and set up libraries, which none may record."""
    graph = make(piece)
    names = list(graph.views.tensors)
    for some in (names, names[:1]):  # what a layer's product needs of those above is less
        graph.product(some, select(graph.gradient, [name for name in some if name in graph.gradient]))


def _recorded_graph(
    objective: Objective, weights: Tree, leaves: Tree, recorder: Recorder, way: Route, piece: Piece
) -> RenewedGraph:
    examples, fused = replace(piece, batch=piece.batch.copy()), way.fused
    # Where losses fall along a path cotangents leave float16's range: what is recorded reads its scale from memory.
    half = None if way.half is None else Half(way.half.scale)
    scale = None if half is None else torch.tensor(half.scale, device=piece.batch.targets.device)

    def renew(batch: Batch) -> bool:
        with recorder.stream():
            examples.batch.take(batch)
            for _ in range(TRIES):
                replay()
                if half is None or scale is None or found.peak is None or half.holds(float(found.peak)):
                    return True
                scale.data.fill_(half.scale)  # .data: autograd takes no notice
        return False

    with recorder.stream():
        replay, found = recorder.record(
            lambda: differentiated(objective, weights, leaves, examples, fused=fused, scale=scale)
        )
    renew(piece.batch)
    products = Products(recorder, len(piece.batch.targets))
    if scale is None:
        return RenewedGraph(*found[:3], products, renew)
    exact = partial(graph, objective, weights, leaves, examples, fused=fused)
    return RenewedGraph(*found[:3], products, renew, scale=scale, exact=exact)
