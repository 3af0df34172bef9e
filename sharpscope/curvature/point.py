"""One place on the path: loss, gradient and Hessian products of the whole network or of single layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from sharpscope.curvature.graphs import HEADROOM, Graph, Graphs, Part, block_diagonal, free_bytes, summed
from sharpscope.curvature.recorded import Products, Recorder
from sharpscope.curvature.smooth import smooth
from sharpscope.objective import Batch, Objective
from sharpscope.tree import Tree, select

if TYPE_CHECKING:
    from sharpscope.curvature.gauss_newton import GaussNewton

Matrix = Literal["hessian", "gauss_newton"]
FREE = (
    0.02  # share of the weights in and above a layer below which its products cost next to nothing: it is measured well
)


class Operator(Protocol):
    """A symmetric matrix over the weights, known by its products; a sum over the batches of the data."""

    def parts(self) -> Iterator[Part]:
        """Yield the share in the matrix of each of this rank's batches, as a function that gives block products."""

    def product(self, v: Tree) -> Tree:
        """Return the matrix times v over all differentiated tensors."""

    def block_product(self, names: Sequence[str], v: Tree) -> Tree:
        """Return the diagonal block of the named tensors times v."""

    def block_products(self, vectors: Mapping[str, Tree]) -> dict[str, Tree]:
        """Return the diagonal blocks of the tensors that each vector has, times it."""


@dataclass(frozen=True)
class _Graph:
    """The gradient of one batch with the graph to differentiate it again."""

    loss: Tensor
    gradient: Tree  # tensors the loss does not touch are absent
    products: Products


class Point:
    """An objective at fixed weights, differentiable twice; as an operator, its Hessian.

    Gradient graphs are kept, one per batch, while memory allows, so that a product costs a backward pass only;
    batches beyond that are recomputed in each product. Both ways give the same numbers.
    Measured in gradients over the same examples (one GPU, ViT-B/32, float32): whole product 2.3 kept and 3.3
    recomputed, a layer's block .61 and 1.16, as autograd walks only what lies above the layer.

    Parameters
    ----------
    objective
        The mean loss.
    weights
        All tensors that ``objective.forward`` takes. They are not modified.
    names
        The tensors to differentiate with respect to; the others are constants.
    graph_bytes
        Memory that kept graphs may take; None: half of what is free.
    memory
        Vectors that an earlier point on the path found, by measure and layer: starting guesses, never results.
        What this point finds goes to ``found``.
    delta
        The way that the path goes through this point: end minus start.
    """

    def __init__(
        self,
        objective: Objective,
        weights: Tree,
        names: Sequence[str],
        *,
        graph_bytes: int | None = None,
        memory: dict[str, Tree] | None = None,
        delta: Tree | None = None,
    ) -> None:
        self.objective = objective
        self.memory = memory or {}
        self.found: dict[str, Tree] = {}
        self.delta = delta
        self.counts: Counter[str] = Counter()
        self.leaves: Tree = {name: weights[name].detach().requires_grad_() for name in names}
        self.weights: Tree = {**weights, **self.leaves}
        device = self.leaves[names[0]].device
        self._budget = int(free_bytes(device) * HEADROOM) if graph_bytes is None else graph_bytes
        # Not a bound method: a cycle would keep the graphs until the collector runs, and leave the next point no room.
        self._graphs = self.graphs_of(
            partial(_graph, objective, self.weights, self.leaves, Recorder(device)), self._budget
        )
        self._visit()

    def graphs_of(self, make: Callable[[Batch], Graph], budget: int) -> Graphs[Graph]:
        """Return a graph per batch of this rank, kept within the budget."""
        return Graphs(make, self.objective.own_batches, self.weights.values(), budget, self.objective.pieces)

    def _visit(self) -> None:
        """Sum loss and gradient over the batches; see which tensors the loss touches."""
        losses, touched = list[float](), set[str]()

        def parts() -> Iterator[Tree]:
            for graphs in self._graphs.by_batch():
                total: Tree = {}
                for graph in graphs:
                    losses.append(float(graph.loss))
                    for name, tensor in graph.gradient.items():
                        total[name] = total[name] + tensor.detach() if name in total else tensor.detach()
                    del graph  # before the next is made
                touched.update(total)
                yield total

        self.gradient = self.objective.summed(parts(), self.leaves)
        self.counts["gradients"] += 1
        self.loss = sum(self.objective.ranks.gathered(losses))
        self.unused = frozenset(self.leaves.keys() - set(self.objective.ranks.gathered(sorted(touched))))

    @cached_property
    def _above(self) -> dict[str, float]:
        total = sum(leaf.numel() for leaf in self.leaves.values())
        below, shares = 0, {}
        for name, leaf in self.leaves.items():
            shares[name] = 1 - below / total
            below += leaf.numel()
        return shares

    def share_above(self, names: Sequence[str]) -> float:
        """Return the share of the weights that lie in the layer and above it: what its product walks."""
        return max(self._above[name] for name in names)

    @cached_property
    def gauss_newton(self) -> GaussNewton:
        """The Gauss-Newton matrix at this point; its graphs share the budget of the Hessian's."""
        from sharpscope.curvature.gauss_newton import GaussNewton

        return GaussNewton(self, self._budget - self._graphs.kept_bytes)

    def operator(self, matrix: Matrix) -> Operator:
        """Return the Hessian or the Gauss-Newton matrix."""
        return self if matrix == "hessian" else self.gauss_newton

    def product(self, v: Tree) -> Tree:
        """Return ``H v``, H the Hessian of the mean loss over all differentiated tensors."""
        return self.block_product(tuple(self.leaves), v)

    def block_product(self, names: Sequence[str], v: Tree) -> Tree:
        """Return ``H_ll v`` for the layer l made of the named tensors; v needs these names only.

        Exactly the restriction of :meth:`product` to a vector that is zero outside the layer.
        """
        return self.block_products({"": select(v, names)})[""]

    def block_products(self, vectors: Mapping[str, Tree]) -> dict[str, Tree]:
        """Return ``H_ll v_l`` for several layers l, each made of the tensors that its vector has."""
        for v in vectors.values():
            self.counts["whole_products" if len(v) == len(self.leaves) else "block_products"] += 1
        return block_diagonal(self.objective, self.parts(), vectors)

    def parts(self) -> Iterator[Part]:
        """Yield the share in the Hessian of each of this rank's batches; not counted as products."""
        for graphs in self._graphs.by_batch():
            yield partial(summed, self._part, graphs)

    def _part(self, graph: _Graph, names: Sequence[str], v: Tree) -> Tree:
        # A gradient without grad_fn is constant: its row of the Hessian is zero.
        live = [n for n in names if n in graph.gradient and graph.gradient[n].requires_grad]
        if not live:
            return {}
        leaves = [self.leaves[name] for name in names]
        outputs = [graph.gradient[n] for n in live]

        def product(v: Tree) -> Tree:
            directions = [v[n] for n in live]
            found = torch.autograd.grad(outputs, leaves, directions, retain_graph=True, allow_unused=True)
            return {name: tensor for name, tensor in zip(names, found, strict=True) if tensor is not None}

        return graph.products(tuple(names), {n: v[n] for n in live}, product)


def _graph(objective: Objective, weights: Tree, leaves: Tree, recorder: Recorder, batch: Batch) -> _Graph:
    with recorder.stream(), torch.enable_grad(), smooth(on=next(iter(leaves.values())).is_cuda):
        loss = objective.part(weights, batch)
        found = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, allow_unused=True)
    pairs = zip(leaves, found, strict=True)
    gradient = {name: tensor for name, tensor in pairs if tensor is not None}
    return _Graph(loss.detach(), gradient, Products(recorder))
