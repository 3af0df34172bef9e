"""Whether sharpness orders the models of a base as their OOD error does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from inference import DRAWS, Effect, resampled
from rows import CONFIRMATORY, LAYERS, MODEL, Rows

from sharpscope.stragglers.permutation import Cohort, partial_correlation

Array = np.ndarray
Column = tuple[str, str, str]  # on, measure, layer
BASELINES = ("id_loss", "id_error")  # what needs no curvature: held-out ID loss and error
GIVEN = {"A": ("log_rate", "renderings", "log_distance"), "B": ("log_distance", "loss")}


@dataclass(frozen=True)
class Across:
    """Kendall's tau of every predictor with OOD error at alpha 1, within base, in one pool.

    Parameters
    ----------
    rows
        Of the study.
    pool
        ``"A"`` or ``"B"``.
    held
        Whether the pool's covariates are held fixed.
    renderings
        Only models trained on so many renderings of each page; None for all.
    """

    rows: Rows
    pool: str
    held: bool
    renderings: int | None = None

    @cached_property
    def columns(self) -> list[Column]:
        """Names of the predictors: every measure and layer, then the covariates."""
        covariates = () if self.held else tuple(("covariate", name, MODEL) for name in self.rivals)
        return [*self.rows.ends.columns, *covariates]

    @property
    def rivals(self) -> tuple[str, ...]:
        """What sharpness has to beat, raw."""
        return (*GIVEN[self.pool], *BASELINES)

    @cached_property
    def cohorts(self) -> list[Cohort]:
        """A cohort per base."""
        return [self._cohort(base) for base in self.rows.bases]

    def _cohort(self, base: int) -> Cohort:
        names = self.rows.members(self.pool, base)
        if self.renderings is not None:
            names = [n for n in names if self.rows.cohort.at[n, "renderings"] == self.renderings]
        sharp = self.rows.ends.loc[names].to_numpy().T.copy()
        positive = (sharp > 0).all(axis=1)
        sharp[positive] = np.log(sharp[positive])
        facts = self.rows.cohort.loc[names, list(GIVEN[self.pool])].to_numpy(dtype=float).T
        rivals = self.rows.cohort.loc[names, list(self.rivals)].to_numpy(dtype=float).T
        error = 100 - self.rows.ood["all"].xs(1.0, level="alpha").loc[names].to_numpy()
        predictors = sharp if self.held else np.concatenate([sharp, rivals])
        return Cohort(predictors, error, facts if self.held else facts[:0], "kendall", int(base))

    @cached_property
    def every(self) -> Array:
        """Observed taus of all predictors, (bases, predictors)."""
        return np.stack([cohort.observed() for cohort in self.cohorts])

    @property
    def taus(self) -> Array:
        """Observed taus, (bases, tested)."""
        return self.every[:, self.tested]

    @cached_property
    def tested(self) -> list[int]:
        """Numbers of the predictors with p-values and intervals; of other variants' layers only tau is shown."""
        return [
            i
            for i, (on, measure, layer) in enumerate(self.columns)
            if layer == MODEL or (on == "train" and measure in CONFIRMATORY)
        ]

    @cached_property
    def chance(self) -> list[Array]:
        """Under permutation, (tested, orders) of each base; the first order is the observed one."""
        return [replace(cohort, predictors=cohort.predictors[self.tested]).chance() for cohort in self.cohorts]

    @cached_property
    def draws(self) -> tuple[Array, Array]:
        """Bootstrap: the base in each place (draws, places), and its taus (draws, places, tested)."""
        bases, taus = [], np.empty((DRAWS, len(self.cohorts), len(self.tested)))
        for i, (chosen, some) in enumerate(resampled([len(c.target) for c in self.cohorts])):
            bases.append(chosen)
            for place, (b, m) in enumerate(zip(chosen, some, strict=True)):
                c = self.cohorts[b]
                own = c.predictors[self.tested][:, m]
                taus[i, place] = partial_correlation(own, c.target[None, m], c.given[:, m], c.statistic)[:, 0]
        return np.array(bases), taus

    def place(self, column: Column) -> int:
        """Return the number of a tested predictor among those."""
        return self.tested.index(self.columns.index(column))

    def quoted(self, chosen: Mapping[int, int], less: int | None = None) -> Effect:
        """Return the mean tau with each base's own predictor, less that of another predictor if given."""
        own = np.array([chosen[b] for b in range(len(self.cohorts))])
        bases, drawn = self.draws
        picked = np.take_along_axis(drawn, own[bases][..., None], axis=2)[..., 0]
        by_base = self.taus[np.arange(len(own)), own]
        if less is not None:
            picked, by_base = picked - drawn[..., less], by_base - self.taus[:, less]
        low, high = np.quantile(picked.mean(axis=1), (0.025, 0.975))
        n = sum(len(c.target) for c in self.cohorts)
        return Effect(float(by_base.mean()), float(low), float(high), tuple(map(float, by_base)), n)

    def effect(self, column: Column) -> Effect:
        """Return a predictor's tau."""
        return self.quoted(dict.fromkeys(range(len(self.cohorts)), self.place(column)))

    def p(self, chosen: Mapping[int, int], *, sided: int = 2) -> float:
        """Return the p-value of the mean tau, by permutation within each base."""
        null = np.mean([self.chance[b][place] for b, place in chosen.items()], axis=0)
        null = np.abs(null) if sided == 2 else null
        return float(np.mean(null >= null[0] - 1e-9))

    def by_chance(self, column: Column) -> float:
        """Return the mean tau of a predictor under permutation: where zero lies once covariates are held."""
        return float(np.mean([null[self.place(column)].mean() for null in self.chance]))

    def best_elsewhere(self, measure: str) -> dict[int, int]:
        """Return for each base the layer with the largest mean tau on the other two."""
        places = np.array([self.place(("train", measure, layer)) for layer in LAYERS])
        found = {}
        for base in range(len(self.cohorts)):
            others = [b for b in range(len(self.cohorts)) if b != base]
            found[base] = int(places[self.taus[others][:, places].mean(axis=0).argmax()])
        return found


def pools(rows: Rows) -> dict[tuple[str, bool], Across]:
    """Return both pools, without and with the covariates held."""
    return {(pool, held): Across(rows, pool, held) for pool in GIVEN for held in (False, True)}
