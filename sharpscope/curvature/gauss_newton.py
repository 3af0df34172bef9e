"""Products with the Gauss-Newton matrix G = J' H_out J, positive semi-definite; for cross-entropy the Fisher matrix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sharpscope.curvature.graphs import Graphs, Part, block_diagonal, twice_differentiable
from sharpscope.curvature.groups import Piece, Views, mapped
from sharpscope.objective import Batch, Objective
from sharpscope.tree import Tree, select

if TYPE_CHECKING:
    from sharpscope.curvature.point import Point


@dataclass(frozen=True)
class _Graph:
    """Outputs z of one batch, and J'u as a function of u, so that differentiating it by u gives J v."""

    outputs: Tensor
    slope: Tensor  # of the loss by a detached copy of z, differentiable once more: H_out u
    copy: Tensor
    u: Tensor
    pulled: Tree  # J'u for the tensors that z depends on
    views: Views

    @property
    def groups(self) -> range:
        """Those of the batch that it holds, or holds a part of."""
        return self.views.groups

    @property
    def nbytes(self) -> int:
        """Of J'u of several groups; one is no more than the weights are."""
        return sum(tensor.nbytes for tensor in self.pulled.values()) if self.views.several else 0

    def moved(self, live: Sequence[str], v: Tree, each: bool) -> Tensor:
        """Return J v."""
        pulled, directions = [self.pulled[name] for name in live], self.views.directions(v, live, each)
        (moved,) = torch.autograd.grad(pulled, self.u, directions, retain_graph=True)
        return moved


class GaussNewton:
    """The Gauss-Newton matrix of the mean loss at a point.

    J v is had by differentiating J'u with respect to u (two reverse passes; forward mode through LayerNorm is not
    trusted), H_out by differentiating the loss twice in logit space only, so nothing larger than the logits and no
    classes x classes matrix arises.
    """

    def __init__(self, point: Point, budget: int) -> None:
        self._leaves, self._counts, self._objective = point.leaves, point.counts, point.objective
        make, objective = partial(_graph, point.objective, point.weights, point.leaves), point.objective
        batches = point.grouping.cut(objective)
        self._graphs = Graphs(make, batches, point.weights.values(), budget, objective.again)

    def product(self, v: Tree) -> Tree:
        """Return ``G v`` over all differentiated tensors."""
        return self.block_product(tuple(self._leaves), v)

    def block_product(self, names: Sequence[str], v: Tree) -> Tree:
        """Return ``G_ll v`` for the layer l made of the named tensors."""
        return self.block_products({"": select(v, names)})[""]

    def block_products(self, vectors: Mapping[str, Tree]) -> dict[str, Tree]:
        """Return ``G_ll v_l`` for several layers l, each made of the tensors that its vector has."""
        self._counts["gauss_newton_products"] += len(vectors)
        return block_diagonal(self._objective, self.parts(), vectors)

    def parts(self) -> Iterator[Part[_Graph]]:
        """Yield the share in the matrix of each of this rank's batches; not counted as products."""
        for number, graphs in enumerate(self._graphs.by_batch()):
            yield Part(self._part, partial(_all, graphs), self._graphs.groups(number))

    @staticmethod
    def _part(graph: _Graph, names: Sequence[str], v: Tree, each: bool) -> Tree:
        live = [name for name in names if name in graph.pulled]
        if not live or not graph.slope.requires_grad:  # a loss linear in z has H_out = 0
            return {}
        views = [graph.views.tensors[name] for name in names]
        with twice_differentiable():
            bent = torch.autograd.grad(graph.slope, graph.copy, graph.moved(live, v, each), retain_graph=True)
        found = torch.autograd.grad(graph.outputs, views, bent, retain_graph=True, allow_unused=True)
        return graph.views.shaped(names, found, each)


def _all(graphs: Iterable[_Graph], _names: Sequence[str]) -> Iterable[_Graph]:
    return graphs


def _graph(objective: Objective, weights: Tree, leaves: Tree, piece: Piece) -> _Graph:
    views, batch = Views.of(leaves, piece), piece.batch

    def forward(own: Tree, batch: Batch) -> Tensor:
        return objective.outputs({**weights, **own}, batch.inputs)

    with torch.enable_grad():
        outputs = mapped(forward, views.tensors, piece).flatten(0, 1) if views.several else forward(leaves, batch)
        copy = outputs.detach().requires_grad_()
        loss = objective.loss(copy, batch.targets) / objective.examples
        (slope,) = torch.autograd.grad(loss, copy, create_graph=True)
        u = torch.zeros_like(outputs, requires_grad=True)
        found = torch.autograd.grad(outputs, list(views.tensors.values()), u, create_graph=True, allow_unused=True)
    pairs = zip(leaves, found, strict=True)
    return _Graph(outputs, slope, copy, u, {name: tensor for name, tensor in pairs if tensor is not None}, views)
