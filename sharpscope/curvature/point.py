"""One place on the path: loss, gradient and Hessian products of the whole network or of single layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

from sharpscope.curvature.gradient import GradientGraph
from sharpscope.curvature.graphs import Graphs, Part, block_diagonal
from sharpscope.curvature.groups import Grouping
from sharpscope.curvature.workspace import Workspace
from sharpscope.objective import Objective, check_finite_gradient
from sharpscope.tree import Tree, rademacher, select

if TYPE_CHECKING:
    from sharpscope.curvature.gauss_newton import GaussNewton

Matrix = Literal["hessian", "gauss_newton"]
FREE = (
    0.02  # share of the weights in and above a layer below which its products cost next to nothing: it is measured well
)


class Operator(Protocol):
    """A symmetric matrix over the weights, known by its products; a sum over the batches of the data."""

    def parts(self) -> Iterator[Part[Any]]:
        """Yield the share in the matrix of each of this rank's batches."""

    def product(self, v: Tree) -> Tree:
        """Return the matrix times v over all differentiated tensors."""

    def block_product(self, names: Sequence[str], v: Tree) -> Tree:
        """Return the diagonal block of the named tensors times v."""

    def block_products(self, vectors: Mapping[str, Tree]) -> dict[str, Tree]:
        """Return the diagonal blocks of the tensors that each vector has, times it."""


class Point:
    """An objective at fixed weights, differentiable twice; as an operator, its Hessian.

    Gradient graphs are kept, one per batch, while memory allows, so that a product costs a backward pass only;
    batches beyond that are recomputed in each product. Both ways give the same numbers.
    Measured in gradients over the same examples (one H200, ViT-B/32, ``high`` precision): whole product .94, a layer's
    block .2 on average, as autograd walks only what lies above the layer; a graph that is not kept costs one more each
    time.

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
    workspace
        What points before this one were made with: on a GPU this point takes over the memory of the last, and
        products are recorded. That pays from some ten products on.
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
        workspace: Workspace | None = None,
    ) -> None:
        self.objective = objective
        self.memory = memory or {}
        self.found: dict[str, Tree] = {}
        self.delta = delta
        self.counts: Counter[str] = Counter()
        self._place = (workspace or Workspace(recording=False)).place(objective, weights, names, graph_bytes)
        self.weights, self.leaves, self._graphs = self._place.weights, self._place.leaves, self._place.graphs
        self._visit()

    def _visit(self) -> None:
        """Sum loss and gradient over the batches; see which tensors the loss touches."""
        losses, touched = list[float](), set[str]()

        def parts() -> Iterator[Tree]:
            for graphs in self._graphs.by_batch():
                total: Tree = {}
                for graph in graphs:
                    losses.append(float(graph.loss))
                    for name, tensor in graph.gradient.items():
                        total[name] = total[name] + tensor if name in total else tensor.clone()
                    del graph  # before the next is made
                touched.update(total)
                yield total

        self.gradient = self.objective.summed(parts(), self.leaves)
        self.counts["gradients"] += 1
        self.loss = sum(self.objective.ranks.gathered(losses))
        self.unused = frozenset(self.leaves.keys() - set(self.objective.ranks.gathered(sorted(touched))))

    def check_finite(self, place: str) -> None:
        """Raise if the gradient or a Hessian product is not finite: for measures that failed, as it costs a product.

        Raises
        ------
        MeasurementError
            Naming a tensor, and the place as it was given.
        """
        check_finite_gradient(self.gradient, place)
        check_finite_gradient(self.product(rademacher(self.gradient, "finite")), place, "second derivative")

    @property
    def grouping(self) -> Grouping:
        """How batches are grouped, for probes of their own."""
        return self._place.grouping

    @property
    def graph_bytes(self) -> tuple[int, ...]:
        """What the graphs of the first batches keep, of those that were measured: all kept ones, and one more."""
        return tuple(self._graphs.measured)

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

        return GaussNewton(self, self._place.budget - self._graphs.kept_bytes)

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

    def parts(self) -> Iterator[Part[GradientGraph]]:
        """Yield the share in the Hessian of each of this rank's batches; not counted as products."""
        exact = GradientGraph.exactly if self._place.route.half else None
        for number, graphs in enumerate(self._graphs.by_batch()):
            walked = partial(self._walked, number, graphs)
            yield Part(GradientGraph.product, walked, self._graphs.groups(number), exact)

    def _walked(self, number: int, graphs: Iterable[GradientGraph], names: Sequence[str]) -> Iterable[GradientGraph]:
        beyond = number - len(self._graphs.kept)
        return self._late.of(beyond) if beyond >= 0 and self._free.issuperset(names) else graphs

    @cached_property
    def _free(self) -> frozenset[str]:
        """Tensors of late layers, where they may have graphs of their own: a search left to them walks no others."""
        if self.objective.pieces > 1 or self.objective.again is not None:
            return frozenset()
        return frozenset(name for name, share in self._above.items() if share < FREE)

    @cached_property
    def _late(self) -> Graphs[GradientGraph]:
        return self._place.late([name for name in self.leaves if name in self._free], len(self._graphs.kept))
