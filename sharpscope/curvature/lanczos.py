"""Extreme eigenvalues of every layer's block by Lanczos, with the Ritz residual as error bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from sharpscope.curvature.estimate import Estimate, Estimates
from sharpscope.curvature.point import FREE, Matrix, Point
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
        self.history: list[float] = []  # largest Ritz value after each step
        self.exhausted = False

    def step(self) -> None:
        """Add a basis vector; one product."""
        self.basis.append(self._next)
        image = self._product(self.basis[-1])
        self._diagonal.append(dot(self.basis[-1], image))
        self.values, self.vectors = np.linalg.eigh(
            np.diag(self._diagonal) + np.diag(self._beside, 1) + np.diag(self._beside, -1)
        )
        self.history.append(float(self.values[-1]))
        rest = _orthogonalised(image, self.basis)
        length = norm(rest)
        noise = torch.finfo(next(iter(rest.values())).dtype).eps * float(np.abs(self.values).max())
        self.exhausted = length <= 10 * noise
        self._beside.append(length)
        self._next = scaled(rest, 1 / length) if not self.exhausted else rest

    def residuals(self) -> np.ndarray:
        """Return the residual norm of each Ritz pair."""
        return np.asarray(np.abs(self._beside[-1] * self.vectors[-1]))

    def combination(self, weights: np.ndarray) -> Tree:
        """Return the sum of the Ritz vectors, ascending as their values, with these weights."""
        shares = self.vectors @ weights
        total = scaled(self.basis[0], float(shares[0]))
        for share, vector in zip(shares[1:], self.basis[1:], strict=True):
            total = axpy(float(share), vector, total)
        return total

    def vector(self, place: int) -> Tree:
        """Return a Ritz vector."""
        return self.combination(np.eye(len(self.values))[place])

    def grown(self, tolerance: float, most: int, *, least: int = 2, count: int = 1) -> Krylov:
        """Return self after stepping until the ``count`` top pairs have residuals up to ``tolerance * |value|``."""
        top = slice(-count, None)
        while not self.exhausted and len(self.basis) < most:
            self.step()
            met = self.residuals()[top] <= tolerance * np.abs(self.values[top])
            if len(self.basis) >= max(least, count) and met.all():
                break
        return self


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
    krylov = Krylov(product, start).grown(tolerance, most, least=least, count=count)
    residuals, history = krylov.residuals(), tuple(krylov.history)
    places = range(len(krylov.values))[::-1][:count]
    return [
        Ritz(float(krylov.values[p]), krylov.vector(p), float(residuals[p]), history if not i else history[-1:])
        for i, p in enumerate(places)
    ]


@dataclass(frozen=True)
class Eigenvalue:
    """An extreme (signed) eigenvalue of every layer's block and of the whole matrix.

    Lanczos starts where an eigenvector is likely: at what the neighbouring alpha left, if anything, else at the
    gradient; noise is added. (The layer's part of the whole matrix's eigenvector is too good a start: close to an
    eigenvector of the block, but not always to the leading one; measured, 3 and 10 % too little.) What an alpha
    leaves is a sum of its Ritz vectors, each with ``(value / largest value) ** 8``: started at the leading one alone,
    Lanczos stops at once with a residual near zero, and an eigenvector that has taken the lead since goes unseen
    (measured: 12 % too little for the head of a small tower).

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
        """Yield an estimate per layer, then of the model; leave start vectors for the next alpha in ``point.found``."""
        found = {}
        for layer, names in {**layers.layers, MODEL: layers.names}.items():
            krylov = self._grown(point, layer, names, seed)
            found[f"{self.name}/{layer}"] = krylov.combination(_weights(krylov.values))
            yield layer, self._estimate(krylov)
        point.found.update(found)

    def _grown(self, point: Point, layer: str, names: tuple[str, ...], seed: int) -> Krylov:
        product = block_of(point, self.matrix, layer, names)
        # In the layer's own order: sums over a tree read back from disk must not round differently.
        guess = select(point.memory.get(f"{self.name}/{layer}", point.gradient), names)
        start = self._start(guess, (seed, self.name, layer))
        size = sum(tensor.numel() for tensor in start.values())
        krylov = Krylov(product if self.end == "max" else partial(_negated, product), start)
        # More steps where they cost nothing, as in a head, whose leading eigenvalues lie close together.
        least = 12 if point.share_above(names) < FREE else 2
        return krylov.grown(self.tolerance, min(self.most, size), least=least)

    def _start(self, guess: Tree, key: tuple[object, ...]) -> Tree:
        length, random = norm(guess), gaussian(guess, *key)
        share = self.noise / norm(random)
        return scaled(random, share) if length == 0 else axpy(share, random, scaled(guess, 1 / length))

    def _estimate(self, krylov: Krylov) -> Estimate:
        sign = 1 if self.end == "max" else -1
        value, residual = float(krylov.values[-1]), float(krylov.residuals()[-1])
        met = residual <= self.tolerance * abs(value)  # a zero block: 0 <= 0
        return Estimate(sign * value + 0.0, residual, len(krylov.basis), met, sign * np.array(krylov.history))


def _weights(values: np.ndarray) -> np.ndarray:
    """Return the weights of the Ritz vectors, ascending, in the next start vector; the leading one has 1."""
    if values[-1] <= 0:
        leading: np.ndarray = np.eye(len(values))[-1]
        return leading
    weights: np.ndarray = np.maximum(values / values[-1], 0.0) ** 8
    return weights


def block_of(point: Point, matrix: Matrix, layer: str, names: tuple[str, ...]) -> Product:
    """Return the product of the layer's block, or of the whole matrix for the model."""
    operator = point.operator(matrix)
    return operator.product if layer == MODEL else partial(operator.block_product, names)


def _negated(product: Product, v: Tree) -> Tree:
    return scaled(product(v), -1.0)
