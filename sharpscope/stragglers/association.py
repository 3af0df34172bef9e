"""Correlation of many curves with many: Kendall's tau-b, Spearman's rho, Pearson's r, each as a cosine."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from scipy import stats

from sharpscope.errors import UsageError
from sharpscope.table import Array

Statistic = Literal["kendall", "spearman", "pearson"]


def features(curves: Array, statistic: Statistic = "kendall") -> Array:
    """Return a unit vector per curve; the correlation of two curves is the inner product of theirs.

    Kendall: the signs of all pairwise differences, which gives tau-b, ties counted. Spearman: centred ranks.
    Pearson: centred values. A constant curve has the zero vector, so it correlates 0 with everything.

    Parameters
    ----------
    curves
        Shape ``(m, n)``: m curves over n points.
    statistic
        Which correlation.

    Returns
    -------
    Array
        Shape ``(m, n (n - 1) / 2)`` for Kendall, else ``(m, n)``.
    """
    check(statistic)
    if statistic == "kendall":
        first, second = np.triu_indices(curves.shape[1], 1)
        found = np.sign(curves[:, second] - curves[:, first])
    else:
        ranked = stats.rankdata(curves, axis=1) if statistic == "spearman" else curves
        found = ranked - ranked.mean(axis=1, keepdims=True)
        found[np.ptp(ranked, axis=1) == 0] = 0.0
    length = np.linalg.norm(found, axis=1, keepdims=True)
    return np.asarray(found / np.where(length > 0, length, 1.0))


def association(first: Array, second: Array, statistic: Statistic = "kendall") -> Array:
    """Return the correlations of every curve of ``first``, shape ``(a, n)``, with every one of ``second``, ``(b, n)``.

    >>> association(np.array([[1.0, 2.0, 4.0]]), np.array([[1.0, 2.0, 3.0], [3.0, 1.0, 1.0]])).round(3)
    array([[ 1.   , -0.816]])
    """
    # Rounded so that equal correlations compare equal whatever the order of summation.
    return np.asarray(np.clip((features(first, statistic) @ features(second, statistic).T).round(12), -1.0, 1.0))


def check(statistic: str) -> None:
    """Raise ``UsageError`` for a statistic that is unknown."""
    if statistic not in get_args(Statistic):
        raise UsageError(f"statistic {statistic!r} is unknown", f"one of {', '.join(get_args(Statistic))}")
