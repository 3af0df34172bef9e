"""Spectral density of a layer's block or of the whole matrix, by stochastic Lanczos quadrature."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sharpscope.curvature.lanczos import Krylov, block_of
from sharpscope.curvature.point import Matrix, Point
from sharpscope.errors import UsageError
from sharpscope.partition import Partition
from sharpscope.table import MODEL, Array
from sharpscope.tree import rademacher, select


@dataclass(frozen=True)
class Density:
    """Gauss quadrature of the spectrum: eigenvalue ``nodes`` with ``weights`` that sum to 1, both ``(draws, steps)``.

    A draw that exhausts its Krylov space early is padded with nodes of weight zero.
    """

    nodes: Array
    weights: Array
    size: int

    def moment(self, power: int) -> tuple[float, float]:
        """Return the estimate of ``tr(H^power)`` and its standard error over draws (infinite for one draw).

        Draws are skewed: of 8, Student's interval covers the truth in 93 % (power 1) to 82 % (power 3) of cases.
        """
        values = self.size * np.sum(self.weights * self.nodes**power, axis=1)
        error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.inf
        return float(values.mean()), float(error)

    def curve(self, grid: Array, width: float) -> Array:
        """Return the density at the grid's eigenvalues, each node widened to a Gaussian of standard deviation width."""
        if width <= 0:
            raise UsageError(f"width={width}: a Gaussian needs a width above zero", "e.g. 1 % of the spectrum's range")
        bells = np.exp(-0.5 * ((grid[:, None, None] - self.nodes) / width) ** 2) / (width * np.sqrt(2 * np.pi))
        return np.asarray((bells * self.weights).sum(2).mean(1))


def density(
    point: Point,
    layers: Partition,
    layer: str = MODEL,
    *,
    draws: int = 8,
    steps: int = 40,
    seed: int = 0,
    matrix: Matrix = "hessian",
) -> Density:
    """Return the spectral density of a layer's block, by default of the whole matrix.

    Cost: ``draws * steps`` products. Moments up to ``2 * steps - 1`` are those of the start vectors exactly; the
    error is that of the draws, as for the trace. Source: Golub and Welsch; Ghorbani et al., arXiv 1901.10159.

    Raises
    ------
    UsageError
        If the layer is unknown or a count is below 1.
    """
    if layer != MODEL and layer not in layers.layers:
        raise UsageError(f"layer {layer!r} is unknown", f"one of {', '.join(layers.layers)}, or 'model'")
    if draws < 1 or steps < 1:
        raise UsageError(f"draws={draws}, steps={steps}: both must be 1 or more")
    names = layers.names if layer == MODEL else layers.layers[layer]
    like = select(point.gradient, names)
    size = sum(tensor.numel() for tensor in like.values())
    product = block_of(point, matrix, layer, names)
    nodes, weights = np.zeros((draws, steps)), np.zeros((draws, steps))
    for draw in range(draws):
        krylov = Krylov(rademacher(like, seed, "density", layer, draw))
        while krylov.steps < min(steps, size) and not krylov.exhausted:
            krylov.add(product(krylov.next))
        nodes[draw, : len(krylov.values)] = krylov.values
        weights[draw, : len(krylov.values)] = krylov.vectors[0] ** 2
    return Density(nodes, weights, size)
