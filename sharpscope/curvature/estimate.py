"""What a measurement returns: a value and how far it can be trusted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sharpscope.table import Array


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error (an eigenvalue: its Ritz residual), what it cost and whether it met its target.

    ``samples`` are the single draws (trace, m-sharpness) or the Ritz value after each step (eigenvalue).
    """

    value: float
    stderr: float
    draws: int
    converged: bool
    samples: Array


Estimates = Iterator[tuple[str, Estimate]]  # layer id, estimate


def mean_and_error(samples: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard error; the error of a single sample is unknown, so infinite.

    >>> mean_and_error([1.0, 3.0])
    (2.0, 1.0)
    """
    count = len(samples)
    mean = math.fsum(samples) / count
    return mean, float(np.std(samples, ddof=1)) / math.sqrt(count) if count > 1 else math.inf
