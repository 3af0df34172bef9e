"""The whole matrix of a small layer, column by column."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sharpscope.curvature.point import Matrix, Point
from sharpscope.errors import UsageError
from sharpscope.tree import Tree, zeros

MOST = 20_000  # weights; 3.2 GB in float64


def _columns(like: Tree) -> list[tuple[str, int]]:
    return [(name, index) for name, tensor in like.items() for index in range(tensor.numel())]


def dense(point: Point, names: Sequence[str], *, matrix: Matrix = "hessian") -> Tensor:
    """Return the block of the named tensors, shape ``(n, n)``, rows in their order, each tensor flattened.

    Cost: n block products. Not symmetrised: the asymmetry shows the rounding.

    Raises
    ------
    UsageError
        If the layer has more than 20,000 weights.
    """
    like = {name: point.leaves[name].detach() for name in names}
    size = sum(tensor.numel() for tensor in like.values())
    if size > MOST:
        problem = f"a dense matrix of {size} weights is too large (at most {MOST})"
        raise UsageError(problem, "a smaller layer, or sharpscope.curvature.density")
    operator, rows = point.operator(matrix), []
    for name, index in _columns(like):
        unit = zeros(like)
        unit[name].view(-1)[index] = 1
        image = operator.block_product(names, unit)
        rows.append(torch.cat([image[n].reshape(-1) for n in names]))
    return torch.stack(rows, dim=1)
