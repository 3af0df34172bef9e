"""Top eigenvalue of every layer's Hessian block by Lanczos, with the Ritz residual as error bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch

from sharpscope.curvature.estimate import Estimate, Estimates
from sharpscope.curvature.point import Point
from sharpscope.partition import Partition
from sharpscope.table import MODEL
from sharpscope.tree import Tree, axpy, dot, gaussian, norm, scaled, select

Product = Callable[[Tree], Tree]


@dataclass(frozen=True)
class Ritz:
    """Largest Ritz pair: ``|H vector - value vector| = residual``, so an eigenvalue lies within residual of value."""

    value: float
    vector: Tree
    residual: float
    history: tuple[float, ...]  # Ritz value after each step


def _orthogonalised(vector: Tree, basis: list[Tree]) -> Tree:
    # Twice is enough (Kahan-Parlett): without it float32 Lanczos loses orthogonality after the first converged pair.
    for _ in range(2):
        for earlier in basis:
            vector = axpy(-dot(earlier, vector), earlier, vector)
    return vector


def _combination(weights: np.ndarray, basis: list[Tree]) -> Tree:
    total = scaled(basis[0], float(weights[0]))
    for weight, vector in zip(weights[1:], basis[1:], strict=True):
        total = axpy(float(weight), vector, total)
    return total


def largest(product: Product, start: Tree, *, tolerance: float, most: int, least: int = 2) -> Ritz:
    """Return the largest eigenpair that Lanczos finds from the start vector, with full reorthogonalisation.

    Stops when the residual is at most ``tolerance * |value|`` after at least ``least`` products, when the Krylov
    space is exhausted, or after ``most`` products. Memory: one vector per step.

    The residual bounds the distance to *an* eigenvalue; that it is the largest rests on the start vector having
    a part along its eigenvector, as everywhere with Krylov methods.
    """
    basis = [scaled(start, 1 / norm(start))]
    diagonal: list[float] = []
    beside: list[float] = []
    history: list[float] = []
    while True:
        image = product(basis[-1])
        diagonal.append(dot(basis[-1], image))
        values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
        rest = _orthogonalised(image, basis)
        length = norm(rest)
        history.append(float(values[-1]))
        residual = abs(length * float(vectors[-1, -1]))
        scale = float(np.abs(values).max())
        done = len(diagonal) >= least and residual <= tolerance * abs(history[-1])
        exhausted = length <= 10 * torch.finfo(next(iter(rest.values())).dtype).eps * scale or len(basis) == most
        if done or exhausted:
            return Ritz(history[-1], _combination(vectors[:, -1], basis), residual, tuple(history))
        beside.append(length)
        basis.append(scaled(rest, 1 / length))


@dataclass(frozen=True)
class LambdaMax:
    """Largest (signed) eigenvalue of every layer's block H_ll and of H.

    Lanczos starts at the eigenvector found at the neighbouring alpha, if there is one, mixed with noise so that an
    eigenvector that has taken the lead in between is found; else at the gradient mixed with noise.

    Parameters
    ----------
    tolerance
        Ritz residual over eigenvalue at which a layer is done; ``stderr`` of the row is the residual.
    most
        Largest number of products for a layer.
    noise
        Norm of the random part of a start vector whose other part has norm 1.
    """

    name: ClassVar[str] = "lambda_max"
    tolerance: float = 0.01
    most: int = 40
    noise: float = 0.3

    def __call__(self, point: Point, layers: Partition, seed: int) -> Estimates:
        """Yield an estimate per layer, then of the model; leave the eigenvectors in ``point.found``."""
        found: dict[str, Tree] = {}
        for layer, names in {**layers.layers, MODEL: layers.names}.items():
            start = self._start(point, layer, names, seed)
            ritz = largest(
                point.product if layer == MODEL else partial(point.block_product, names),
                start,
                tolerance=self.tolerance,
                most=min(self.most, sum(tensor.numel() for tensor in start.values())),
            )
            found[layer] = ritz.vector
            yield layer, self._estimate(ritz)
        point.found.update({f"{self.name}/{layer}": vector for layer, vector in found.items()})

    def _start(self, point: Point, layer: str, names: tuple[str, ...], seed: int) -> Tree:
        # In the layer's own order: sums over a tree read back from disk must not round differently.
        guess = select(point.memory.get(f"{self.name}/{layer}", point.gradient), names)
        length = norm(guess)
        random = gaussian(guess, seed, self.name, layer)
        share = self.noise / norm(random)
        return scaled(random, share) if length == 0 else axpy(share, random, scaled(guess, 1 / length))

    def _estimate(self, ritz: Ritz) -> Estimate:
        # A block without curvature (value and residual both zero) is known exactly.
        met = ritz.residual <= self.tolerance * abs(ritz.value) or math.isclose(ritz.residual, 0, abs_tol=1e-300)
        return Estimate(ritz.value, ritz.residual, len(ritz.history), met, np.array(ritz.history))
