"""Extreme eigenvalues of every layer's block by Lanczos, with the Ritz residual as error bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from sharpscope.curvature.estimate import Estimate, Estimates
from sharpscope.curvature.point import Matrix, Point
from sharpscope.errors import UsageError
from sharpscope.partition import Partition
from sharpscope.table import MODEL
from sharpscope.tree import Tree, axpy, dot, gaussian, norm, scaled, select

Product = Callable[[Tree], Tree]


@dataclass(frozen=True)
class Ritz:
    """A Ritz pair: ``|H vector - value vector| = residual``, so an eigenvalue lies within residual of value."""

    value: float
    vector: Tree
    residual: float
    history: tuple[float, ...]  # Ritz value after each step


class Krylov:
    """Lanczos with full reorthogonalisation: grows an orthonormal basis in which the matrix is tridiagonal.

    Memory: one vector per step.
    """

    def __init__(self, product: Product, start: Tree) -> None:
        self._product = product
        self._next = scaled(start, 1 / norm(start))
        self.basis: list[Tree] = []
        self._diagonal: list[float] = []
        self._beside: list[float] = []
        self.values = np.zeros(0)  # ascending Ritz values
        self.vectors = np.zeros((0, 0))  # their coordinates in the basis
        self.exhausted = False

    def step(self) -> None:
        """Add a basis vector; one product."""
        self.basis.append(self._next)
        image = self._product(self.basis[-1])
        self._diagonal.append(dot(self.basis[-1], image))
        self.values, self.vectors = np.linalg.eigh(
            np.diag(self._diagonal) + np.diag(self._beside, 1) + np.diag(self._beside, -1)
        )
        rest = _orthogonalised(image, self.basis)
        length = norm(rest)
        noise = torch.finfo(next(iter(rest.values())).dtype).eps * float(np.abs(self.values).max())
        self.exhausted = length <= 10 * noise
        self._beside.append(length)
        self._next = scaled(rest, 1 / length) if not self.exhausted else rest

    def residuals(self) -> np.ndarray:
        """Return the residual norm of each Ritz pair."""
        return np.asarray(np.abs(self._beside[-1] * self.vectors[-1]))

    def vector(self, place: int) -> Tree:
        """Return a Ritz vector."""
        weights = self.vectors[:, place]
        total = scaled(self.basis[0], float(weights[0]))
        for weight, vector in zip(weights[1:], self.basis[1:], strict=True):
            total = axpy(float(weight), vector, total)
        return total


def _orthogonalised(vector: Tree, basis: list[Tree]) -> Tree:
    # Twice is enough (Kahan-Parlett): without it float32 Lanczos loses orthogonality after the first converged pair.
    for _ in range(2):
        for earlier in basis:
            vector = axpy(-dot(earlier, vector), earlier, vector)
    return vector


def largest(
    product: Product, start: Tree, *, tolerance: float, most: int, least: int = 2, count: int = 1
) -> list[Ritz]:
    """Return the ``count`` largest eigenpairs, largest first, that Lanczos finds from the start vector.

    Stops when each has a residual of at most ``tolerance * |value|`` after at least ``least`` products, when the
    Krylov space is exhausted (then there may be fewer pairs), or after ``most`` products. For the smallest
    eigenvalues pass the negated product. Memory: one vector per step.

    The residual bounds the distance to *an* eigenvalue; that it is the largest rests on the start vector having
    a part along its eigenvector, as everywhere with Krylov methods. An eigenvalue of multiplicity two is found once.
    """
    krylov = Krylov(product, start)
    history: list[float] = []
    while True:
        krylov.step()
        history.append(float(krylov.values[-1]))
        steps, top = len(history), slice(-count, None)
        met = krylov.residuals()[top] <= tolerance * np.abs(krylov.values[top])
        if (steps >= max(least, count) and met.all()) or krylov.exhausted or steps >= most:
            break
    residuals = krylov.residuals()
    places = range(len(krylov.values))[::-1][:count]
    return [
        Ritz(float(krylov.values[p]), krylov.vector(p), float(residuals[p]), tuple(history if not i else history[-1:]))
        for i, p in enumerate(places)
    ]


@dataclass(frozen=True)
class Eigenvalue:
    """An extreme (signed) eigenvalue of every layer's block and of the whole matrix.

    Lanczos starts at the eigenvector found at the neighbouring alpha, if there is one, mixed with noise so that an
    eigenvector that has taken the lead in between is found; else at the gradient mixed with noise.

    Parameters
    ----------
    end
        ``"max"``: the largest; ``"min"``: the smallest, the most negative one of an indefinite block.
    matrix
        The Hessian or the Gauss-Newton matrix (for cross-entropy the Fisher).
    tolerance
        Ritz residual over eigenvalue at which a layer is done; ``stderr`` of the row is the residual.
    most
        Largest number of products for a layer.
    noise
        Norm of the random part of a start vector whose other part has norm 1.
    """

    end: str = "max"
    matrix: Matrix = "hessian"
    tolerance: float = 0.01
    most: int = 40
    noise: float = 0.3

    def __post_init__(self) -> None:
        if self.end not in ("max", "min") or self.most < 1 or self.tolerance < 0 or self.noise <= 0:
            raise UsageError(f"{self} cannot be meant", "end 'max' or 'min', most >= 1, tolerance >= 0, noise > 0")

    @property
    def name(self) -> str:
        """``lambda_max``, ``lambda_min``, or with the prefix ``gauss_newton_``."""
        return ("" if self.matrix == "hessian" else "gauss_newton_") + f"lambda_{self.end}"

    def __call__(self, point: Point, layers: Partition, seed: int) -> Estimates:
        """Yield an estimate per layer, then of the model; leave the eigenvectors in ``point.found``."""
        found: dict[str, Tree] = {}
        for layer, names in {**layers.layers, MODEL: layers.names}.items():
            product = block_of(point, self.matrix, layer, names)
            start = self._start(point, layer, names, seed)
            size = sum(tensor.numel() for tensor in start.values())
            (ritz,) = largest(
                product if self.end == "max" else partial(_negated, product),
                start,
                tolerance=self.tolerance,
                most=min(self.most, size),
            )
            found[f"{self.name}/{layer}"] = ritz.vector
            yield layer, self._estimate(ritz)
        point.found.update(found)

    def _start(self, point: Point, layer: str, names: tuple[str, ...], seed: int) -> Tree:
        # In the layer's own order: sums over a tree read back from disk must not round differently.
        guess = select(point.memory.get(f"{self.name}/{layer}", point.gradient), names)
        length = norm(guess)
        random = gaussian(guess, seed, self.name, layer)
        share = self.noise / norm(random)
        return scaled(random, share) if length == 0 else axpy(share, random, scaled(guess, 1 / length))

    def _estimate(self, ritz: Ritz) -> Estimate:
        sign = 1 if self.end == "max" else -1
        met = ritz.residual <= self.tolerance * abs(ritz.value)  # a zero block: 0 <= 0
        history = sign * np.array(ritz.history)
        return Estimate(sign * ritz.value + 0.0, ritz.residual, len(history), met, history)


def block_of(point: Point, matrix: Matrix, layer: str, names: tuple[str, ...]) -> Product:
    """Return the product of the layer's block, or of the whole matrix for the model."""
    operator = point.operator(matrix)
    return operator.product if layer == MODEL else partial(operator.block_product, names)


def _negated(product: Product, v: Tree) -> Tree:
    return scaled(product(v), -1.0)
