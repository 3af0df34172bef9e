"""Permutation test and bootstrap of a (partial) correlation over independent models."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
from scipy import stats

from sharpscope.stragglers.association import Statistic, features
from sharpscope.table import Array

EXACT = 7  # models up to which every permutation is taken: 5,040
DRAWS = 4999
BOOTSTRAPS = 499


def partial_correlation(first: Array, second: Array, given: Array, statistic: Statistic) -> Array:
    """Return the correlations of a with b curves when c covariates are held fixed, shape ``(a, b)``; 0 if undefined.

    A correlation is a cosine of features, a partial one that of features less their part in the covariates' span;
    for one covariate this is the textbook formula, for Kendall as for Pearson.

    Parameters
    ----------
    first, second, given
        Shapes ``(a, n)``, ``(b, n)`` and ``(c, n)``; c may be 0.
    statistic
        Which correlation.
    """
    one, other = features(first, statistic), features(second, statistic)
    if len(given):
        span, sizes, _ = np.linalg.svd(features(given, statistic).T, full_matrices=False)
        span = span[:, sizes > 1e-9]
        one, other = one - (one @ span) @ span.T, other - (other @ span) @ span.T
    lengths = np.outer(np.linalg.norm(one, axis=1), np.linalg.norm(other, axis=1))
    # Rounded so that equal correlations compare equal whatever the order of summation.
    return np.asarray((one @ other.T / np.where(lengths > 1e-9, lengths, np.inf)).round(9))


@dataclass(frozen=True)
class Cohort:
    """What is correlated over n models: predictors ``(a, n)``, target ``(n,)``, covariates ``(c, n)``."""

    predictors: Array
    target: Array
    given: Array
    statistic: Statistic
    seed: int

    def observed(self) -> Array:
        """Return the (partial) correlation of every predictor with the target, shape ``(a,)``."""
        return partial_correlation(self.predictors, self.target[None], self.given, self.statistic)[:, 0]

    def chance(self) -> Array:
        """Return the correlations under permutation of the models, shape ``(a, orders)``, the identity among them.

        With covariates the residuals of the target are permuted (Freedman-Lane), on ranks for rank correlations.
        """
        ranked = self.statistic != "pearson"
        target = stats.rankdata(self.target) if ranked else self.target
        given = stats.rankdata(self.given, axis=1) if ranked and len(self.given) else self.given
        design = np.column_stack([np.ones(len(target)), *given])
        fitted = design @ np.linalg.lstsq(design, target, rcond=None)[0]
        permuted = fitted + (target - fitted)[self._orders()]
        if ranked:  # equal ranks stay equal; accuracies would change, and with them the correlation of the identity
            permuted = permuted.round(9)
        return partial_correlation(self.predictors, permuted, self.given, self.statistic)

    def _orders(self) -> Array:
        models = len(self.target)
        if models <= EXACT:
            return np.array(list(permutations(range(models))))
        identity = np.arange(models)
        drawn = np.random.default_rng([self.seed, 0]).permuted(np.tile(identity, (DRAWS, 1)), axis=1)
        return np.concatenate([identity[None], drawn])

    def interval(self) -> Array:
        """Return the 95 % percentile bootstrap interval over models of every predictor, shape ``(2, a)``."""
        models = len(self.target)
        drawn = np.random.default_rng([self.seed, 1]).integers(0, models, (BOOTSTRAPS, models))
        found = [
            partial_correlation(self.predictors[:, m], self.target[None, m], self.given[:, m], self.statistic)[:, 0]
            for m in drawn
        ]
        return np.asarray(np.quantile(found, (0.025, 0.975), axis=0))
