"""The shape of a path: its barriers, and whether interpolation fails."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from sharpscope.errors import UsageError
from sharpscope.stragglers.effects import MEAN_OOD
from sharpscope.stragglers.paired import Z95
from sharpscope.table import Array

Chord = Literal["linear", "mean"]
Form = Literal["weak", "strict"]
PerImage = Mapping[tuple[float, str], Array]  # (alpha, split) -> a number for each image, (n,)
COLUMNS = ("split", "measure", "chord", "value", "low", "high", "alpha", "n")
DRAWS = 20_000


@dataclass(frozen=True)
class Largest:
    """The largest of several means over the same images, with its 95 % interval, and which one it is."""

    value: float
    low: float
    high: float
    place: int


def largest(gaps: Sequence[Array], *, ends: int = 1, least: float | Array = 0.0) -> Largest:
    """Return the largest of means over images, averaged over data sets that weigh the same.

    Below the upper end of the interval lies every mean, each by its own test, so no correction is due; above the lower
    end at least one (the quantile is that of the largest of all errors, under their joint normal distribution). So
    picking the largest does not flatter it.

    Parameters
    ----------
    gaps
        For each data set an array ``(n, ends * places)``: for each image a number for each place, for one end after
        the other. With several ends a place counts as its smallest.
    ends
        How many.
    least
        What one image could change, for all columns or for each: a variance is taken to be at least that of one such
        image, so that agreement on ten images is not certainty.
    """
    value = np.mean([g.mean(axis=0) for g in gaps], axis=0)
    if min(map(len, gaps)) < 2:  # one image tells nothing of the spread
        centre = value.reshape(ends, -1).min(axis=0)
        return Largest(float(centre.max()), -math.inf, math.inf, int(np.argmax(centre)))
    covariance = np.sum([_covariance(g, least) for g in gaps], axis=0) / len(gaps) ** 2
    error = np.sqrt(np.diag(covariance))
    below, above = _quantiles(covariance, error, ends)
    low, centre, high = (
        part.reshape(ends, -1).min(axis=0) for part in (value - below * error, value, value + above * error)
    )
    place = int(np.argmax(centre))
    return Largest(float(centre[place]), float(low.max()), float(high.max()), place)


def _covariance(gaps: Array, least: float | Array) -> Array:
    """Return the covariance of the means over images."""
    found = np.atleast_2d(np.cov(gaps, rowvar=False))
    own = np.diag(found)
    floor = np.broadcast_to(np.square(least) / len(gaps), own.shape)
    return np.asarray(found + np.diag(np.maximum(floor - own, 0.0))) / len(gaps)


def _quantiles(covariance: Array, error: Array, ends: int) -> tuple[float, float]:
    """Return the 97.5 % quantiles of the largest error, in standard errors, of all and of the ends of one place."""
    moving = error > 1e-12 * max(1.0, float(error.max()))  # what else there is, is rounding
    if not moving.any():
        return Z95, Z95
    correlation = covariance[np.ix_(moving, moving)] / np.outer(error[moving], error[moving])
    values, vectors = np.linalg.eigh(correlation)
    normal = np.random.default_rng(0).standard_normal((DRAWS, len(values)))
    drawn = np.full((DRAWS, len(error)), -np.inf)
    drawn[:, moving] = (normal * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    of_all = float(np.quantile(drawn.max(axis=1), 0.975))
    if ends == 1:
        return of_all, Z95
    of_place = drawn.reshape(DRAWS, ends, -1).max(axis=1)
    return of_all, float(np.quantile(of_place, 0.975, axis=0).max())


def _above_chord(found: PerImage, alphas: Sequence[float], split: str, chord: Chord) -> Array:
    start, end = found[0.0, split].astype(np.float64), found[1.0, split].astype(np.float64)
    weights = [alpha if chord == "linear" else 0.5 for alpha in alphas]
    return np.stack([found[a, split] - (1 - w) * start - w * end for a, w in zip(alphas, weights, strict=True)], axis=1)


def barrier(found: PerImage, splits: Sequence[str], *, chord: Chord = "linear") -> tuple[Largest, float]:
    """Return how far the mean of a loss-like number rises above the chord between the ends, and at which alpha.

    ``max over alpha of metric(alpha) - chord(alpha)`` (arXiv 1912.05671).

    Parameters
    ----------
    found
        (alpha, split) -> loss or error of each image, errors as bool; both ends are among the alphas.
    splits
        Sets that are averaged, each weighing the same.
    chord
        ``"linear"`` from end to end: such a barrier is never below 0. Or the ``"mean"`` of both ends (the straggler
        paper's, arXiv 2410.16476): with unequal ends that gives half their difference even on a straight line.

    Raises
    ------
    UsageError
        If an end was not evaluated.
    """
    alphas = _alphas(found)
    gaps = [_above_chord(found, alphas, split, chord) for split in splits]
    best = largest(gaps, least=_least(alphas, chord) if found[0.0, splits[0]].dtype == bool else 0.0)
    return best, alphas[best.place]


def _least(alphas: Sequence[float], chord: Chord) -> Array:
    """Return how far one image that is judged otherwise moves each gap; on a linear chord the ends cannot move."""
    at_end = 0.0 if chord == "linear" else 0.5
    return np.array([at_end if alpha in (0.0, 1.0) else 1.0 for alpha in alphas])


def _alphas(found: PerImage) -> list[float]:
    alphas = sorted({alpha for alpha, _ in found if 0 <= alpha <= 1})
    if not {0.0, 1.0} <= set(alphas):
        raise UsageError(f"alphas {alphas} lack an end point; a chord joins 0 and 1", "scan both ends")
    return alphas


def barriers(metrics: Mapping[str, PerImage], id_split: str, ood: Sequence[str]) -> pd.DataFrame:
    """Return the barriers of every metric on every set and on ``"ood mean"``, by both chords.

    Columns ``split measure chord value low high alpha n``, in the unit of the metric, with the alpha of the highest
    point; empty if an end of the path was not evaluated.
    """
    rows = []
    places = [(split, [split]) for split in (id_split, *ood)] + ([(MEAN_OOD, list(ood))] if ood else [])
    for measure, found in metrics.items():
        if not {(0.0, id_split), (1.0, id_split)} <= found.keys():
            continue
        chords: tuple[Chord, ...] = ("linear", "mean")
        for name, splits in places:
            images = sum(len(found[0.0, split]) for split in splits)
            for chord in chords:
                best, alpha = barrier(found, splits, chord=chord)
                rows.append((name, measure, chord, best.value, best.low, best.high, alpha, images))
    return pd.DataFrame(rows, columns=list(COLUMNS))


@dataclass(frozen=True)
class InterpolationFailure:
    """Whether mixing two models fails on the OOD sets.

    Attributes
    ----------
    form
        ``"weak"``: no alpha strictly between the ends beats zero-shot. ``"strict"``: none beats both ends.
    verdict
        ``"fails"``: no alpha can, given the interval; ``"does not fail"``: one surely does; else ``"undecided"``.
    gain, low, high
        Of the best inner alpha over zero-shot (weak) or the better end (strict), in points of mean OOD accuracy,
        with the 95 % interval that accounts for having picked it.
    alpha
        The best inner alpha; NaN if there is none.
    """

    form: Form
    verdict: Literal["fails", "does not fail", "undecided"]
    gain: float
    low: float
    high: float
    alpha: float


def interpolation_failure(correct: PerImage, ood: Sequence[str], *, form: Form = "weak") -> InterpolationFailure:
    """Return whether interpolation fails on the OOD sets, see :class:`InterpolationFailure`.

    Undecided without an alpha between the ends or without OOD sets.

    Parameters
    ----------
    correct
        (alpha, split) -> correctness of each image.
    ood
        Names of the OOD sets, each weighing the same.
    form
        Whether zero-shot only or both ends are to be beaten.
    """
    if form not in ("weak", "strict"):
        raise UsageError(f"form {form!r} is unknown", "weak or strict")
    inner = [alpha for alpha in _alphas(correct) if 0 < alpha < 1]
    if not inner or not ood:
        return InterpolationFailure(form, "undecided", math.nan, -math.inf, math.inf, math.nan)
    ends = (0.0,) if form == "weak" else (0.0, 1.0)
    gaps = [
        np.stack([correct[a, s].astype(np.float64) - correct[end, s] for end in ends for a in inner], axis=1)
        for s in ood
    ]
    best = largest(gaps, ends=len(ends), least=1.0)
    verdict: Literal["fails", "does not fail", "undecided"] = (
        "does not fail" if best.low > 0 else "fails" if best.high <= 0 else "undecided"
    )
    return InterpolationFailure(form, verdict, 100 * best.value, 100 * best.low, 100 * best.high, inner[best.place])
