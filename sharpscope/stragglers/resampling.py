"""Curves as they would have come out with other images and other probes: the whiskers of a correlation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sharpscope.table import Array


def error_draws(
    correct: Mapping[tuple[float, str], Array],
    splits: Iterable[str],
    alphas: Sequence[float],
    draws: int,
    generator: np.random.Generator,
) -> Array:
    """Return the mean OOD error of resampled images, shape ``(draws, alphas)``.

    Each set is resampled on its own and weighs the same; within a draw the same images stand at every alpha.

    Parameters
    ----------
    correct
        Per-image correctness by alpha and split.
    splits, alphas
        Which to take.
    draws, generator
        How many, and from where.
    """
    found = [_resampled(np.stack([correct[alpha, split] for alpha in alphas]), draws, generator) for split in splits]
    return np.asarray(1 - np.mean(found, axis=0))


def _resampled(correct: Array, draws: int, generator: np.random.Generator) -> Array:
    """Return accuracies, shape ``(draws, alphas)``, of correctness ``(alphas, n)`` over resampled images.

    Images that are right and wrong at the same alphas are drawn together: few kinds exist, so n costs nothing.
    """
    kinds, counts = np.unique(correct, axis=1, return_counts=True)
    total = counts.sum()
    return np.asarray(generator.multinomial(total, counts / total, draws) @ kinds.T / total)


def curve_draws(
    values: Array, stderr: Array, samples: Sequence[Array | None], draws: int, generator: np.random.Generator
) -> Array:
    """Return a layer's curve under other probes, shape ``(draws, n)``.

    With samples at every alpha the probes are resampled: the same ones at every alpha, since probe i is the same
    vector all along the path, with the deviation scaled to the standard error. Else each value is drawn with its
    standard error on its own (an eigenvalue with its residual). An unknown error counts as the largest known one.

    Parameters
    ----------
    values, stderr
        Shape ``(n,)``.
    samples
        The draws behind each value, None where they are not known or are no independent draws.
    draws, generator
        How many, and from where.
    """
    known = np.isfinite(stderr)
    error = np.where(known, stderr, stderr[known].max(initial=0.0))
    columns = [column for column in samples if column is not None and len(column) > 1]
    if len(columns) < len(values):
        return np.asarray(values + error * generator.standard_normal((draws, len(values))))
    most = max(map(len, columns))
    weights = generator.multinomial(most, np.full(most, 1 / most), draws).astype(float)
    return np.stack([v + e * _deviation(weights, s) for v, e, s in zip(values, error, columns, strict=True)], axis=1)


def _deviation(weights: Array, samples: Array) -> Array:
    """Return the deviations of weighted means of the samples, in standard errors, shape ``(draws,)``."""
    own = weights[:, : len(samples)]
    spread = samples.std()
    if spread == 0:
        return np.zeros(len(weights))
    # The first probes of a longer list can all be left out of a draw: no news then.
    total = np.maximum(own.sum(axis=1), 1.0)
    centred = (samples - samples.mean()) / (spread / np.sqrt(len(samples)))
    return np.asarray(own @ centred / total)
