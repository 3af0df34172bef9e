"""The straggler table: whose sharpness runs with the OOD error along the path, and whether chance would do as well."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats

from sharpscope.stragglers.association import Statistic, association, features
from sharpscope.stragglers.resampling import curve_draws
from sharpscope.stragglers.surrogates import surrogates
from sharpscope.stragglers.wording import LADDER, NEEDED_ALPHAS, UNMOVED, doubt, wording
from sharpscope.table import MODEL, Array

NUMBERS = ("p", "p_family", "q", "null_low", "null_high", "tau_low", "tau_high")
COLUMNS = ("layer", "measure", "tau", "alphas", "verdict", *NUMBERS)
SURROGATES = 999
BOOTSTRAPS = 200
Samples = Mapping[tuple[str, str, float], Array]  # (measure, layer, alpha) -> independent draws behind a value


@dataclass(frozen=True)
class Reference:
    """What every layer's curve is held against, over all alphas: OOD error, surrogates of it, its bootstrap draws."""

    error: pd.Series
    null: Array
    draws: Array
    statistic: Statistic
    seed: int


@dataclass(frozen=True)
class Curve:
    """Sharpness of a layer at the alphas where it is known, shape ``(n,)``; ``seen`` marks them among the error's."""

    layer: str
    measure: str
    seen: Array
    values: Array
    stderr: Array
    samples: tuple[Array | None, ...]
    doubt: str | None

    def logarithm(self) -> tuple[Array, Array]:
        """Return values and standard errors on the logarithmic scale if all values are above zero, else as they are."""
        if (self.values > 0).all():
            return np.log(self.values), self.stderr / self.values
        return self.values, self.stderr

    def correlation(self, errors: Array, statistic: Statistic) -> Array:
        """Return the correlation with each of the error curves ``(m, all alphas)``, shape ``(m,)``."""
        return np.asarray(association(self.logarithm()[0][None], errors[:, self.seen], statistic)[0])

    def interval(self, tau: float, reference: Reference) -> tuple[float, float]:
        """Return the 95 % bootstrap interval; noise on top of noise lowers every draw, so tau itself is included."""
        if not np.isfinite(self.stderr).any():
            return -1.0, 1.0
        # One generator for all layers: their order changes nothing.
        generator = np.random.default_rng([reference.seed, 2])
        own = curve_draws(*self.logarithm(), self.samples, len(reference.draws), generator)
        other = reference.draws[:, self.seen]
        drawn = np.sum(features(own, reference.statistic) * features(other, reference.statistic), axis=1)
        low, high = np.quantile(drawn, (0.025, 0.975))
        return min(float(low), tau), max(float(high), tau)


def ood_error(evals: pd.DataFrame, ood: Iterable[str]) -> pd.Series:
    """Return the error (1 - accuracy) by alpha, averaged over the OOD sets with equal weight.

    Sets without any accuracy (no labels) are left out, then alphas at which one of the others has none, so that the
    mean is over the same sets at every alpha. Empty if nothing remains. Rounded to 12 digits, so that means of the same
    accuracies in another order tie.
    """
    chosen = evals[(evals["measure"] == "accuracy") & evals["split"].isin(list(ood)) & np.isfinite(evals["value"])]
    return 1 - chosen.pivot_table(index="alpha", columns="split", values="value").dropna().mean(axis=1).round(12)


def co_movement(
    layers: pd.DataFrame,
    error: pd.Series,
    *,
    statistic: Statistic = "kendall",
    supported: Collection[str] = (),
    unmoved: Collection[str] = (),
    samples: Samples | None = None,
    error_draws: Array | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Return one row per layer and measure: correlation of its sharpness with the OOD error, held against chance.

    The points of one path are not independent: two unrelated smooth curves of eleven points pass a naive test at the
    5 % level in up to half of all cases. Chance is therefore drawn as surrogates of the OOD error that are as smooth
    as it is, see :func:`~sharpscope.stragglers.surrogates.surrogates`; the same ones for all layers, so that layers
    that resemble each other count once.

    Parameters
    ----------
    layers
        Frame of curvature rows, ``r.layers``. Rows without a finite value are left out.
    error
        OOD error indexed by ascending alpha, see :func:`ood_error`.
    statistic
        ``"kendall"`` (tau-b), ``"spearman"``, or ``"pearson"`` of the logarithm of sharpness.
    supported
        Layers whose move an intervention has shown to harm OOD accuracy.
    unmoved
        Layers with the same weights at both ends: their sharpness changes through the others, and they are not tested.
    samples
        The draws behind the values, for the whiskers; without them from the standard errors alone.
    error_draws
        OOD errors of resampled images, shape ``(any, alphas)``; without them the error is taken as exact.
    seed
        Of surrogates and bootstrap.

    Returns
    -------
    DataFrame
        ``layer measure tau alphas verdict p p_family q null_low null_high tau_low tau_high``, strongest verdict first,
        then by tau. ``p``: one-sided, for correlation above zero. ``p_family``: of the largest correlation over all
        rows of a measure. ``q``: false discovery rate within the measure (Benjamini-Hochberg). ``null_low`` to
        ``null_high`` holds 90 % of the null, ``tau_low`` to ``tau_high`` is a 95 % bootstrap interval over probes and
        images, of the correlation at this noise: noise pulls tau towards 0, and that of curves without it can lie
        beyond the outer end (with 10 % noise and 1,000 images in half of the cases where it is 1). Rows that cannot be
        tested have NaN for these and a verdict that says why; tau with a constant is 0.
    """
    alphas = error.index.to_numpy(dtype=float)
    # The smallest eigenvalue grows where a block becomes less curved downwards: no sharpness, so no straggler.
    usable = ~layers["measure"].str.endswith("lambda_min") & np.isfinite(layers["value"])
    sharpness = layers[usable & layers["alpha"].isin(alphas)]
    values = error.to_numpy(dtype=float)
    enough = len(alphas) >= NEEDED_ALPHAS
    null = surrogates(alphas, values, SURROGATES, np.random.default_rng([seed, 0])) if enough else values[None]
    draws = np.tile(values, (BOOTSTRAPS, 1)) if error_draws is None else error_draws
    reference = Reference(error, null, draws, statistic, seed)
    found: list[dict[str, object]] = []
    for _, family in sharpness.groupby("measure", sort=False):
        curves = [_curve(rows, reference, samples or {}) for _, rows in family.groupby("layer", sort=False)]
        curves = [replace(curve, doubt=UNMOVED) if curve.layer in unmoved else curve for curve in curves]
        found += _family(curves, reference, supported)
    table = pd.DataFrame(found, columns=list(COLUMNS)).astype(dict.fromkeys(NUMBERS, float))
    rung = table["verdict"].map({name: place for place, name in enumerate(LADDER)}).fillna(len(LADDER))
    return (
        table.assign(rung=rung)
        .sort_values(["rung", "tau"], ascending=[True, False], kind="stable", ignore_index=True)
        .drop(columns="rung")
    )


def _curve(rows: pd.DataFrame, reference: Reference, samples: Samples) -> Curve:
    rows = rows.sort_values("alpha")
    layer, measure = str(rows["layer"].iloc[0]), str(rows["measure"].iloc[0])
    seen = reference.error.index.isin(rows["alpha"])
    values = rows["value"].to_numpy(dtype=float)
    stderr = rows["stderr"].fillna(np.inf).to_numpy(dtype=float)
    error = reference.error.to_numpy(dtype=float)[seen]
    why = doubt(values, stderr, rows["converged"].to_numpy(dtype=bool), error)
    drawn = tuple(samples.get((measure, layer, alpha)) for alpha in rows["alpha"])
    return Curve(layer, measure, seen, values, stderr, drawn, why)


def _family(curves: Sequence[Curve], reference: Reference, supported: Collection[str]) -> Iterator[dict[str, object]]:
    """Yield the rows of one measure; those in doubt are described but take no part in the test."""
    error = reference.error.to_numpy(dtype=float)[None]
    taus = [float(curve.correlation(error, reference.statistic)[0]) for curve in curves]
    tested = [i for i, curve in enumerate(curves) if curve.doubt is None]
    facts = dict(zip(tested, _chance([curves[i] for i in tested], [taus[i] for i in tested], reference), strict=True))
    for i, (curve, tau) in enumerate(zip(curves, taus, strict=True)):
        row: dict[str, object] = {
            "layer": curve.layer,
            "measure": curve.measure,
            "tau": tau,
            "alphas": len(curve.values),
        }
        if curve.doubt is None:
            low, high = curve.interval(tau, reference)
            verdict = wording(tau, facts[i]["p_family"], curve.layer in supported)
            row |= {"verdict": verdict, **facts[i], "tau_low": low, "tau_high": high}
        yield row | ({"verdict": curve.doubt} if curve.doubt else {})


def _chance(curves: Sequence[Curve], taus: Sequence[float], reference: Reference) -> list[dict[str, float]]:
    """Return p-values and null bar of every tested row of a measure."""
    if not curves:
        return []
    null = np.stack([curve.correlation(reference.null, reference.statistic) for curve in curves])
    observed = np.array(taus)[:, None]
    count = null.shape[1] + 1  # the observed curve is one of its own surrogates
    p = (1 + np.sum(null >= observed, axis=1)) / count
    p_family = (1 + np.sum(null.max(axis=0) >= observed, axis=1)) / count
    low, high = np.quantile(null, (0.05, 0.95), axis=1)
    columns = {"p": p, "p_family": p_family, "q": stats.false_discovery_control(p), "null_low": low, "null_high": high}
    return [dict(zip(columns, map(float, row), strict=True)) for row in zip(*columns.values(), strict=True)]


def with_distance(table: pd.DataFrame, layers: dict[str, dict[str, float]]) -> pd.DataFrame:
    """Return the table with each layer's ``delta_norm`` and ``relative_delta``, the baseline of every claim."""
    total = {
        key: float(np.sqrt(sum(facts[key] ** 2 for facts in layers.values()))) for key in ("delta_norm", "start_norm")
    }
    facts = {**layers, MODEL: total}
    moved = table["layer"].map(lambda name: facts[name]["delta_norm"])
    start = table["layer"].map(lambda name: facts[name]["start_norm"])
    return table.assign(delta_norm=moved, relative_delta=moved / start.where(start > 0))
