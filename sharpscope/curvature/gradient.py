"""The gradient of a piece of the data with its graph, to be differentiated again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sharpscope.curvature.graphs import twice_differentiable
from sharpscope.curvature.groups import Piece, Views, mapped
from sharpscope.curvature.half import Half, small
from sharpscope.curvature.recorded import Products
from sharpscope.curvature.smooth import smooth
from sharpscope.objective import Batch, Objective
from sharpscope.tree import Tree, scaled

Scale = float | Tensor
TRIES = 4  # scales of the loss


@dataclass(frozen=True)
class GradientGraph:
    """The gradient of a piece with the graph to differentiate it again."""

    loss: Tensor
    slopes: Tree  # the gradient by each view; tensors the loss does not touch are absent
    views: Views
    products: Products
    scale: Scale = field(default=1.0, kw_only=True)  # of the loss in the graph, and of the slopes
    # The same in float32, where this is in float16.
    exact: Callable[[], GradientGraph] | None = field(default=None, kw_only=True)

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
        found = self.views.shaped(self.slopes, [slope.detach() for slope in self.slopes.values()], False)
        return found if self.exact is None else scaled(found, 1 / self.scale)

    def product(self, names: Sequence[str], v: Tree, each: bool = False) -> Tree:
        """Return what the piece adds to the block of the named tensors times v; tensors without a part are absent.

        In float16 an entry may come out infinite or NaN; see :meth:`exactly`.

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

        if self.exact is not None:
            product = partial(_in_range, product, self.scale)
        directed = {n: v[n] for n in live}
        return self.products.unrecorded(directed, product) if each else self.products(tuple(names), directed, product)

    def exactly(self) -> GradientGraph:
        """Return the graph in float32."""
        return self.exact() if self.exact else self


@dataclass(frozen=True)
class RenewedGraph(GradientGraph):
    """A gradient graph that was recorded, and can be computed anew where it lies."""

    # For these examples and the weights as they are now; False if its cotangents do not fit into float16.
    renew: Callable[[Batch], bool]


def plain_graph(objective: Objective, weights: Tree, names: Sequence[str]) -> GradientGraph:
    """Return the gradient graph of the first batch as torch alone makes it: no kernel is fused, none compiled."""
    leaves = {name: weights[name].detach().requires_grad_() for name in names}
    return graph(objective, {**weights, **leaves}, leaves, Piece(objective.batches[0]), fused=False)


def _in_range(product: Callable[[Tree], Tree], scale: Scale, v: Tree) -> Tree:
    """Return a product with a graph in float16, with vectors and images of a size that it has numbers for."""
    shrunk = small(list(v.values()))
    found = product({name: tensor * shrunk for name, tensor in v.items()})
    return {name: tensor / (scale * shrunk) for name, tensor in found.items()}


class Differentiated(NamedTuple):
    """Loss and gradient of a piece, the gradient with its graph and scaled, and what it is by."""

    loss: Tensor
    slopes: Tree
    views: Views
    peak: Tensor | None  # the largest cotangent in float16, None where there is none


def differentiated(
    objective: Objective, weights: Tree, leaves: Tree, piece: Piece, *, fused: bool = True, scale: Scale | None = None
) -> Differentiated:
    """Return the gradient of the piece by the leaves; with a scale of the loss in float16."""
    views = Views.of(leaves, piece)

    def part(own: Tree, batch: Batch) -> Tensor:
        return objective.part({**weights, **own}, batch)

    peaks: list[Tensor] = []
    with torch.enable_grad(), smooth(on=fused, batched=views.several, peaks=None if scale is None else peaks):
        loss = mapped(part, views.tensors, piece).sum() if views.several else part(leaves, piece.batch)
        target = loss if scale is None else loss * scale
        found = torch.autograd.grad(target, list(views.tensors.values()), create_graph=True, allow_unused=True)
    pairs = zip(leaves, found, strict=True)
    slopes = {name: tensor for name, tensor in pairs if tensor is not None}
    return Differentiated(loss.detach(), slopes, views, torch.stack(peaks).max() if peaks else None)


def graph(
    objective: Objective, weights: Tree, leaves: Tree, piece: Piece, *, fused: bool = True, half: Half | None = None
) -> GradientGraph:
    """Return the gradient graph of the piece; in float32 where its cotangents do not fit into float16, or none is."""
    exact = partial(graph, objective, weights, leaves, piece, fused=fused)
    for _ in range(TRIES if half else 0):
        assert half is not None
        scale = half.scale
        found = differentiated(objective, weights, leaves, piece, fused=fused, scale=scale)
        if found.peak is None:
            break
        if half.holds(float(found.peak)):
            return GradientGraph(*found[:3], Products(), scale=scale, exact=exact)
        del found
    return GradientGraph(*differentiated(objective, weights, leaves, piece, fused=fused)[:3], Products())
