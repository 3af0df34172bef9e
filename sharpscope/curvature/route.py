"""How gradient graphs are made: by closed forms of second derivatives, in float16, or as torch alone makes them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property, partial
from typing import NamedTuple

import torch

from sharpscope.curvature.gradient import GradientGraph
from sharpscope.curvature.groups import LEAST, Piece
from sharpscope.curvature.half import Half
from sharpscope.objective import Objective
from sharpscope.precision import matmul_precision
from sharpscope.tree import Tree, norm

FEW = 2  # examples that closed forms are tried on
GAP, GAP_IN_FLOAT16, FAINT = 1e-3, 0.01, 0.03
Make = Callable[..., GradientGraph]  # of a piece, with ``fused`` and ``half`` as `graph` has them


class Route(NamedTuple):
    """Whether calls of a model go by closed forms, and what float16 there is between them."""

    fused: bool = True
    half: Half | None = None

    def of(self, make: Make) -> Make:
        """Return the function with graphs made this way."""
        return partial(make, fused=self.fused, half=self.half)


def route(make: Make, objective: Objective, leaves: Tree) -> Route:
    """Return the quickest way that is allowed and right.

    Right is a way in which gradient and product of a few examples are those of torch alone. Closed forms are not where
    a forward has transforms of ``torch.func``, checkpoints or compiled parts; they are then had by none of its calls.
    """
    first = next(iter(leaves.values()))
    if objective.again is not None:  # weights in shards: no graph more than is needed
        return Route(first.is_cuda)
    ways = [Route()]
    if _allows_half(leaves):
        ways.insert(0, Route(half=Half()))
    batch = objective.batches[0]
    room = -(-len(batch.targets) // objective.pieces)  # where memory is short
    few = batch.split([min(LEAST if len(ways) > 1 else FEW, room)])[0]
    return next(filter(_Trial(make, Piece(few), tuple(leaves)).passes, ways), Route(fused=False))


def _allows_half(leaves: Tree) -> bool:
    """Return whether TF32 is allowed, which rounds as float16 does."""
    allowed = torch.get_float32_matmul_precision() != "highest"
    return allowed and all(leaf.is_cuda and leaf.dtype == torch.float32 for leaf in leaves.values())


class _Trial:
    def __init__(self, make: Make, piece: Piece, names: tuple[str, ...]) -> None:
        self._make, self._piece, self._names = make, piece, names

    @cached_property
    def _true(self) -> tuple[Tree, Tree]:
        """Gradient, and product with it, as torch alone has them."""
        with matmul_precision("highest"):
            graph = self._make(self._piece, fused=False)
            return graph.gradient, graph.product(self._names, graph.gradient)

    def passes(self, way: Route) -> bool:
        """Return whether the way has them but for a gap."""
        try:
            gap, precision = (GAP, matmul_precision("highest")) if way.half is None else (GAP_IN_FLOAT16, nullcontext())
            true = self._true
            with precision:
                graph = way.of(self._make)(self._piece)
                if way.half is not None and graph.exact is None:
                    return False
                found = graph.gradient, graph.product(self._names, true[0])
            return all(near(*pair, gap) for pair in zip(found, true, strict=True))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a model does that a way does not go with
            return False


def near(found: Tree, true: Tree, gap: float) -> bool:
    """Return whether every tensor is the true one but for a share of its length, or of the whole's if that is small."""
    if found.keys() != true.keys():
        return False
    least = FAINT * norm(true)
    return all(float((found[n] - t).norm()) <= gap * max(float(t.norm()), least) for n, t in true.items())
