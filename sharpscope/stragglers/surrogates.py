"""What the OOD error along a path could have been without regard to any layer: the null of a correlation of curves."""

from __future__ import annotations

import numpy as np
from numpy.polynomial import legendre

from sharpscope.table import Array

TREND = 2  # degrees that half of the surrogates keep: line and parabola


def orthogonal_polynomials(places: Array) -> Array:
    """Return orthonormal polynomials of degree 1 to n - 1 on n places, as columns, shape ``(n, n - 1)``."""
    spread = 2 * (places - places.min()) / np.ptp(places) - 1
    basis, _ = np.linalg.qr(legendre.legvander(spread, len(places) - 1))
    return np.asarray(basis[:, 1:])


def surrogates(alphas: Array, curve: Array, draws: int, generator: np.random.Generator) -> Array:
    """Return rearrangements of a curve that are about as smooth as it is, shape ``(draws, n)``.

    The curve is expanded in orthogonal polynomials of alpha (which may be spaced unequally), each coefficient is
    multiplied by a normal number, and the values of the curve are put in the order of the result. So each surrogate
    has the values of the curve, ties included, and on average its spectrum.

    In half of the draws the coefficients of line and parabola are kept: OOD error along a path is often monotone or
    U-shaped, and so is most sharpness, for reasons that the two need not share. A layer that has no more in common
    with the error than such a trend meets about as much correlation under the null.

    Notes
    -----
    The construction is ours; its size and power beside those of others are in ``benchmarks/NOTES.md``. The points of
    a curve with few features (monotone, a single valley) are worth two or three independent ones, whatever their
    number: no test tells a layer that follows such a curve from one that happens to run alike.
    """
    basis = orthogonal_polynomials(alphas)
    coefficients = basis.T @ curve
    drawn = generator.standard_normal((draws, len(coefficients))) * coefficients
    drawn[: draws // 2, :TREND] = coefficients[:TREND]
    ranks = (drawn @ basis.T).argsort(axis=1).argsort(axis=1)
    return np.asarray(np.sort(curve)[ranks])
