"""Extreme eigenvalues of every layer's block by Lanczos, with the Ritz residual as error bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpscope.curvature.estimate import Estimate, Estimates
from sharpscope.curvature.point import FREE, Matrix, Point
from sharpscope.errors import UsageError
from sharpscope.partition import Partition
from sharpscope.sharding import mesh_of, over_ranks
from sharpscope.table import MODEL
from sharpscope.tree import Tree, flat, gaussian, norm, scaled, select, unflat

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

    Whoever has the matrix gives its product with :attr:`next` to :meth:`add`. Memory: one vector per step, flat.
    """

    def __init__(self, start: Tree) -> None:
        self._like = start
        self._mesh = mesh_of(start.values())
        self._next = flat(start) / norm(start)
        self._basis: list[Tensor] = []
        self._diagonal: list[float] = []
        self._beside: list[float] = []
        self._taken: tuple[Tensor, Tensor] | None = None
        self.values = np.zeros(0)  # ascending Ritz values
        self.vectors = np.zeros((0, 0))  # their coordinates in the basis
        self.history: list[float] = []  # largest Ritz value after each step
        self._met = 0  # how often in a row the residuals were small enough
        self.exhausted = False

    @property
    def next(self) -> Tree:
        """The vector, of norm 1, whose image is wanted."""
        return unflat(self._next, self._like)

    @property
    def steps(self) -> int:
        """Number of images so far."""
        return len(self._basis)

    def add(self, image: Tree) -> None:
        """Take the matrix times :attr:`next`."""
        self.take(image)
        self.settle()

    def take(self, image: Tree) -> None:
        """Do the work of :meth:`add` on the device without waiting for it; :meth:`settle` must follow."""
        self._basis.append(self._next)
        rest = flat(select(image, self._like))
        diagonal = _inner(self._next, rest, self._mesh)
        rest = _orthogonalised(rest, self._basis, self._mesh)
        self._taken = rest, torch.stack([diagonal, _inner(rest, rest, self._mesh)])

    def settle(self) -> None:
        """Wait for what was taken, and see what it says."""
        assert self._taken is not None
        rest, numbers = self._taken
        diagonal, square = numbers.tolist()
        self._diagonal.append(diagonal)
        self.values, self.vectors = np.linalg.eigh(
            np.diag(self._diagonal) + np.diag(self._beside, 1) + np.diag(self._beside, -1)
        )
        self.history.append(float(self.values[-1]))
        noise = torch.finfo(rest.dtype).eps * float(np.abs(self.values).max())
        length = math.sqrt(square)
        self.exhausted = length <= 10 * noise
        self._beside.append(length)
        self._next, self._taken = rest if self.exhausted else rest / length, None

    def residuals(self) -> np.ndarray:
        """Return the residual norm of each Ritz pair."""
        return np.asarray(np.abs(self._beside[-1] * self.vectors[-1]))

    def combination(self, weights: np.ndarray) -> Tree:
        """Return the sum of the Ritz vectors, ascending as their values, with these weights."""
        total = torch.zeros_like(self._next)
        for share, vector in zip(self.vectors @ weights, self._basis, strict=True):
            total.add_(vector, alpha=float(share))
        return unflat(total, self._like)

    def vector(self, place: int) -> Tree:
        """Return a Ritz vector."""
        return self.combination(np.eye(len(self.values))[place])

    def done(self, tolerance: float, most: int, *, least: int = 2, count: int = 1, running: int = 1) -> bool:
        """Return whether the ``count`` top pairs have residuals up to ``tolerance * |value|``, or no step is left.

        To be asked after each step: it must hold ``running`` times in a row.
        """
        if self.exhausted or self.steps >= most:
            return True
        top = slice(-count, None)
        met = self.steps >= count and (self.residuals()[top] <= tolerance * np.abs(self.values[top])).all()
        self._met = self._met + 1 if met else 0
        return self.steps >= least and self._met >= running


def _inner(a: Tensor, b: Tensor, mesh: Any) -> Tensor:
    """Return the inner product, accumulated in float64, without waiting for the device."""
    return over_ranks(torch.sum(a * b, dtype=torch.float64), mesh)


def _orthogonalised(vector: Tensor, basis: list[Tensor], mesh: Any) -> Tensor:
    # Twice is enough (Kahan-Parlett): without it float32 Lanczos loses orthogonality after the first converged pair.
    for _ in range(2):
        for earlier in basis:
            # Accumulated in float64: torch.dot would leave 5e-6 between vectors of a million entries, not 3e-8.
            vector = torch.addcmul(vector, earlier, _inner(earlier, vector, mesh).to(vector.dtype), value=-1)
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
    krylov = Krylov(start)
    while not krylov.done(tolerance, most, least=least, count=count):
        krylov.add(product(krylov.next))
    residuals, history = krylov.residuals(), tuple(krylov.history)
    places = range(len(krylov.values))[::-1][:count]
    return [
        Ritz(float(krylov.values[p]), krylov.vector(p), float(residuals[p]), history if not i else history[-1:])
        for i, p in enumerate(places)
    ]


@dataclass(frozen=True)
class Eigenvalue:
    """An extreme (signed) eigenvalue of every layer's block and of the whole matrix.

    Lanczos starts where an eigenvector is likely: at what the neighbouring alphas left, drawn on to this one, else at
    the gradient; noise is added. (The layer's part of the whole matrix's eigenvector is too good a start: close to an
    eigenvector of the block, but not always to the leading one; measured, 3 and 10 % too little.) What an alpha
    leaves is a sum of its Ritz vectors, each with ``(value / largest value) ** 8``: started at the leading one alone,
    Lanczos stops at once with a residual near zero, and an eigenvector that has taken the lead since goes unseen
    (measured: 12 % too little for the head of a small tower). A search from the gradient goes on for a step after its
    residual is small: the gradient may have next to no part along the leading eigenvector, which shows one step later
    (measured on a small tower: without it 5 of 184 layers too low, one by 7 %; with it 1 of 352 others, by 6 %, where
    three eigenvalues led together). Of searches from a neighbour 6 of 560 were 1 to 8 % too low, 3 with a tolerance
    of .005, 1 with .001. No residual can tell.

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
        """Yield an estimate per layer as it is found, then of the model; leave start vectors in ``point.found``.

        All layers take a step together: data whose graphs are not kept is gone through once for all of them.
        """
        found: dict[str, Tree] = {}
        for together in (layers.layers, {MODEL: layers.names}):
            growing = {layer: Krylov(self._guess(point, layer, names, seed)) for layer, names in together.items()}
            sure = {layer for layer in together if f"{self.name}/{layer}" in point.memory}
            while growing:
                images = self._images(point, {layer: krylov.next for layer, krylov in growing.items()})
                for layer, krylov in growing.items():
                    krylov.take(images.pop(layer))
                for layer, krylov in list(growing.items()):
                    krylov.settle()
                    if self._done(krylov, point, together[layer], sure=layer in sure):
                        found[f"{self.name}/{layer}"] = krylov.combination(_weights(krylov))
                        yield layer, self._estimate(growing.pop(layer))
        point.found.update(found)

    def _images(self, point: Point, vectors: Mapping[str, Tree]) -> dict[str, Tree]:
        images = point.operator(self.matrix).block_products(vectors)
        return images if self.end == "max" else {layer: scaled(image, -1.0) for layer, image in images.items()}

    def _guess(self, point: Point, layer: str, names: tuple[str, ...], seed: int) -> Tree:
        # In the layer's own order: sums over a tree read back from disk must not round differently.
        guess = select(point.memory.get(f"{self.name}/{layer}", point.gradient), names)
        return self._start(guess, (seed, self.name, layer))

    def _done(self, krylov: Krylov, point: Point, names: Sequence[str], *, sure: bool) -> bool:
        size = sum(tensor.numel() for tensor in select(point.gradient, names).values())
        # More steps where they cost nothing, as in a head, whose leading eigenvalues lie close together.
        least = 12 if point.share_above(names) < FREE else 2
        return krylov.done(self.tolerance, min(self.most, size), least=least, running=1 if sure else 2)

    def _start(self, guess: Tree, key: tuple[object, ...]) -> Tree:
        # In rows: a few calls instead of a few a tensor.
        entries, random = flat(guess), flat(gaussian(guess, *key))
        mesh = mesh_of(guess.values())
        length, noise = (math.sqrt(float(_inner(row, row, mesh))) for row in (entries, random))
        start = random * (self.noise / noise)
        return unflat(start + entries / length if length else start, guess)

    def _estimate(self, krylov: Krylov) -> Estimate:
        sign = 1 if self.end == "max" else -1
        value, residual = float(krylov.values[-1]), float(krylov.residuals()[-1])
        met = residual <= self.tolerance * abs(value)  # a zero block: 0 <= 0
        return Estimate(sign * value + 0.0, residual, krylov.steps, met, sign * np.array(krylov.history))


def _weights(krylov: Krylov) -> np.ndarray:
    """Return the weights of the Ritz vectors, ascending, in the next start vector; the leading one has 1 or -1.

    A Ritz vector has the sign that brings it towards the start vector, so that what is left along a path is smooth.
    """
    values, towards = krylov.values, np.where(krylov.vectors[0] < 0, -1.0, 1.0)
    if values[-1] <= 0:
        leading: np.ndarray = towards * np.eye(len(values))[-1]
        return leading
    weights: np.ndarray = towards * np.maximum(values / values[-1], 0.0) ** 8
    return weights


def block_of(point: Point, matrix: Matrix, layer: str, names: tuple[str, ...]) -> Product:
    """Return the product of the layer's block, or of the whole matrix for the model."""
    operator = point.operator(matrix)
    return operator.product if layer == MODEL else partial(operator.block_product, names)
