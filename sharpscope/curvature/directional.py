"""Curvature along the way that the path takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sharpscope.curvature.estimate import Estimate, Estimates
from sharpscope.curvature.lanczos import block_of
from sharpscope.curvature.point import Matrix, Point
from sharpscope.errors import UsageError
from sharpscope.partition import Partition
from sharpscope.table import MODEL
from sharpscope.tree import dot, select


@dataclass(frozen=True)
class Directional:
    """``d_l' H_ll d_l`` for the layer's own part d_l of fine-tuned minus zero-shot: exact, one product per layer.

    Divided by ``||d_l||^2`` (``delta_norm`` in the layer facts) it is the curvature per unit of way; as it stands it is
    defined for a layer that did not move too: 0.
    """

    matrix: Matrix = "hessian"

    @property
    def name(self) -> str:
        """``directional`` or ``gauss_newton_directional``."""
        return "directional" if self.matrix == "hessian" else "gauss_newton_directional"

    def __call__(self, point: Point, layers: Partition, seed: int) -> Estimates:  # noqa: ARG002 - nothing is drawn
        """Yield an exact value per layer, then of the model."""
        if point.delta is None:
            raise UsageError("this point lies on no path, so there is no direction", "Point(..., delta=...)")
        for layer, names in {**layers.layers, MODEL: layers.names}.items():
            way = select(point.delta, names)
            value = dot(way, block_of(point, self.matrix, layer, names)(way))
            yield layer, Estimate(value, 0.0, 1, True, np.array([value]))
