"""Intervals over bases and models, Holm's correction, and what a verdict is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
DRAWS, LEVEL, SEED = 999, 0.05, 20261122
VERDICTS = ("supported", "contradicted", "undecided")


@dataclass(frozen=True)
class Effect:
    """A mean over bases with its 95 % interval; ``signs`` are those of the bases."""

    value: float
    low: float
    high: float
    by_base: tuple[float, ...]
    n: int

    @property
    def agreed(self) -> bool:
        """Whether all bases have the sign of the mean."""
        return all(np.sign(v) == np.sign(self.value) for v in self.by_base)

    @property
    def sign(self) -> int:
        """1 or -1 if the interval lies on that side of zero and all bases agree, else 0."""
        return 0 if not self.agreed else 1 if self.low > 0 else -1 if self.high < 0 else 0

    def __format__(self, spec: str) -> str:
        """Return ``value (low to high)``; spec as of a number."""
        spec = spec or "+.2f"
        return f"{_signed(self.value, spec)} ({_signed(self.low, spec)} to {_signed(self.high, spec)})"


def _signed(value: float, spec: str) -> str:
    return format(value, spec).replace("-", "−")


def resampled(groups: Sequence[int], seed: int = SEED) -> list[tuple[Array, list[Array]]]:
    """Return DRAWS pairs: bases drawn with replacement, and for each of them models drawn within it.

    Parameters
    ----------
    groups
        Number of models of each base.
    seed
        Of the draws.
    """
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(DRAWS):
        bases = draw.integers(len(groups), size=len(groups))
        found.append((bases, [draw.integers(groups[b], size=groups[b]) for b in bases]))
    return found


def effect(values: Mapping[int, Array], seed: int = SEED) -> Effect:
    """Return the mean over bases of the mean over models, with its interval; ``values`` by base, none empty."""
    columns = [np.asarray(v, dtype=float) for v in values.values() if len(v)]
    means = tuple(float(c.mean()) for c in columns)
    drawn = [
        np.mean([columns[b][m].mean() for b, m in zip(bases, some, strict=True)])
        for bases, some in resampled([len(c) for c in columns], seed)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Effect(float(np.mean(means)), float(low), float(high), means, sum(map(len, columns)))


def holm(p: Sequence[float]) -> Array:
    """Return Holm's adjusted p-values.

    >>> holm([0.01, 0.04, 0.03]).round(3).tolist()
    [0.03, 0.06, 0.06]
    """
    values = np.asarray(p, dtype=float)
    order = values.argsort()
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    found = np.empty_like(values)
    found[order] = np.minimum(stepped, 1.0)
    return found


def verdict(supported: bool, contradicted: bool) -> str:
    """Return the word; the plan's rules exclude that both hold, and contradiction goes first."""
    return "contradicted" if contradicted else "supported" if supported else "undecided"
