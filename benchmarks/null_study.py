"""Size and power of the null of a path, on simulated curves; see stragglers.py for the command."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy import fft, stats

from sharpscope.stragglers.association import features
from sharpscope.stragglers.surrogates import surrogates

Null = Callable[[np.ndarray, np.ndarray, int, np.random.Generator], np.ndarray]
LAYERS = 40
LEVEL = 0.05
LIKENESS = 0.97  # Pearson correlation of the planted layer's curve with the error, for power
# Squared-exponential Gaussian curves by length scale; a length scale of their own for every layer; sums of sigmoids;
# and traps: all curves valleys or all monotone, with a little noise, so that any two have much in common.
FAMILIES = ("gaussian 0.1", "gaussian 0.3", "gaussian 1.0", "mixed lengths", "sigmoids", "valleys", "monotone")
INDEPENDENT = FAMILIES[:5]


def dct_signs(_: np.ndarray, curve: np.ndarray, draws: int, random: np.random.Generator) -> np.ndarray:
    """The null that was there before: random signs of the cosine transform; equal spacing only."""
    coefficients = fft.dct(curve - curve.mean(), norm="ortho")
    return np.asarray(fft.idct(coefficients * random.choice([-1.0, 1.0], (draws, len(curve))), norm="ortho", axis=1))


NULLS: dict[str, Null] = {"shipped": surrogates, "cosine transform, random signs": dct_signs}


def curves(family: str, alphas: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Independent curves of a family, shape ``(count, n)``."""
    kind, *length = family.split()
    if kind == "gaussian":
        return gaussian(float(length[0]), alphas, count, random)
    if kind == "mixed":
        return np.concatenate([gaussian(random.choice([0.1, 0.3, 1.0]), alphas, 1, random) for _ in range(count)])
    noise = 0.01 * random.standard_normal((count, len(alphas)))
    if kind == "valleys":
        return (alphas - random.uniform(0.2, 0.8, (count, 1))) ** 2 + noise
    if kind == "monotone":
        return alphas ** random.uniform(0.3, 3, (count, 1)) + noise
    middle, width = random.uniform(0, 1, (count, 3, 1)), random.uniform(0.05, 0.5, (count, 3, 1))
    return np.sum(random.standard_normal((count, 3, 1)) * np.tanh((alphas - middle) / width), axis=1)


def gaussian(length: float, alphas: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    kernel = np.exp(-0.5 * ((alphas[:, None] - alphas) / length) ** 2)
    values, vectors = np.linalg.eigh(kernel)
    return random.standard_normal((count, len(alphas))) @ (vectors * np.sqrt(np.maximum(values, 0))).T


def naive_threshold(points: int) -> float:
    """The smallest tau that a naive one-sided test of independent points calls significant."""
    order, least = list(range(points)), 1.0
    for i in range(points):
        for j in range(points - 1 - i):
            order[j], order[j + 1] = order[j + 1], order[j]
            found = stats.kendalltau(range(points), order, alternative="greater")
            if found.pvalue >= LEVEL:
                return least
            least = float(found.statistic)
    return least


def planted(error: np.ndarray, layer: np.ndarray) -> np.ndarray:
    """A curve with the correlation ``LIKENESS`` with the error, but for chance."""
    one, other = ((c - c.mean()) / c.std() for c in (error, layer))
    return np.asarray(LIKENESS * one + np.sqrt(1 - LIKENESS**2) * other)


def rates(
    family: str, points: int, paths: int, draws: int, nulls: Mapping[str, Null], *, plant: bool, seed: int = 0
) -> dict[str, Any]:
    """In percent of paths: some layer flagged family-wise, or (planted) the planted one; and flags per layer."""
    alphas, random = np.linspace(0, 1, points), np.random.default_rng(seed)
    family_wise, alone = dict.fromkeys(nulls, 0.0), dict.fromkeys(nulls, 0.0)
    naive, threshold = 0, naive_threshold(points)
    for _ in range(paths):
        error, layers = curves(family, alphas, 1, random)[0], curves(family, alphas, LAYERS, random)
        if plant:
            layers[0] = planted(error, layers[0])
        layer_features = features(layers)
        taus = (layer_features @ features(error[None]).T).round(12)
        naive += (taus >= threshold - 1e-9).any()
        for name, null in nulls.items():
            chance = (layer_features @ features(null(alphas, error, draws, random)).T).round(12)
            p = (1 + (chance >= taus).sum(axis=1)) / (draws + 1)
            p_family = (1 + (chance.max(axis=0) >= taus).sum(axis=1)) / (draws + 1)
            family_wise[name] += p_family[0] <= LEVEL if plant else (p_family <= LEVEL).any()
            alone[name] += p[0] <= LEVEL if plant else (p <= LEVEL).mean()
    percent = 100 / paths
    return {
        name: {
            "family_wise": round(float(percent * family_wise[name]), 1),
            "one_layer": round(float(percent * alone[name]), 1),
        }
        for name in nulls
    } | {"naive, any layer": round(float(percent * naive), 1)}


def study(paths: int, draws: int, nulls: Mapping[str, Null] = NULLS) -> list[dict[str, Any]]:
    """Size in every family and power in those of independent curves, for 6, 11 and 21 alphas."""
    rows = []
    for points in (11, 6, 21):
        for family in FAMILIES:
            row = {"alphas": points, "family": family, "size": rates(family, points, paths, draws, nulls, plant=False)}
            if family in INDEPENDENT:
                row["power"] = rates(family, points, paths, draws, nulls, plant=True, seed=1)
            rows.append(row)
            print(row, flush=True)
    return rows
