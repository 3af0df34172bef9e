"""Correlation across fine-tuned models: independent points, unlike those of one path."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import stats

from sharpscope.errors import UsageError
from sharpscope.stragglers.association import Statistic, check
from sharpscope.stragglers.permutation import Cohort
from sharpscope.table import MODEL, Array

if TYPE_CHECKING:
    from sharpscope.result import ScanResult

NEEDED_MODELS = 5
DISTANCE = "distance"
COLUMNS = ("predictor", "kind", "target", "given", "tau", "models", "p", "p_family", "q", "low", "high", "chance")
Columns = dict[str, Array]


def across_models(
    results: Iterable[ScanResult],
    *,
    at: float,
    measure: str,
    covariates: Mapping[str, Sequence[float]] | None = None,
    statistic: Statistic = "kendall",
    seed: int = 0,
) -> pd.DataFrame:
    """Return one row per predictor, target and covariate: correlation over models, at one alpha.

    Predictors are the sharpness of every layer that all models share (kind ``"layer"``) and the baselines that it has
    to beat: distance from zero-shot, global sharpness, held-out loss (kind ``"baseline"``). Targets are the mean
    accuracy on the OOD sets that all models share, and its gain over zero-shot where alpha 0 was scanned.

    Parameters
    ----------
    results
        Scans of at least five fine-tuned models, each an independent training.
    at
        Alpha at which sharpness and accuracy are taken.
    measure
        Measure of sharpness.
    covariates
        Name -> a number per model, e.g. ``{"log learning rate": [...]}``. The distance ``||delta||`` is always one.
    statistic
        ``"kendall"`` (tau-b), ``"spearman"``, or ``"pearson"`` (of the logarithm of sharpness above zero).
    seed
        Of permutations and bootstrap.

    Returns
    -------
    DataFrame
        ``predictor kind target given tau models p p_family q low high chance``. ``given`` names what is held fixed:
        nothing (an empty text), each covariate, and all of them (joined by ``" + "``); tau is then the partial
        correlation. ``p`` is two-sided, by permutation of the models (every one up to seven models, else 4,999): exact
        without covariates, else of the target's residuals given them, about ``chance``, the mean of tau under
        permutation, which covariates can move off 0: with nine models p is at most .05 in 6 % of null cases given one
        covariate, in 9 % given three. ``p_family`` is of the largest distance from it over the layers,
        ``q`` the false discovery rate over them; baselines have NaN there. ``low`` to ``high`` is a 95 % percentile
        bootstrap interval over models, which is narrow for fewer than about ten.

    Raises
    ------
    UsageError
        For fewer than five models, one model twice, or models without the alpha, the measure, a common layer or a
        common OOD set.
    """
    check(statistic)
    _check_alpha(at)
    results = list(results)
    _refuse_others(results)
    _refuse_few(results)
    _refuse_twice(results)
    predictors, layers = _predictors(results, at, measure)
    given = {name: _covariate(name, found, len(results)) for name, found in (covariates or {}).items()}
    given[DISTANCE] = predictors[DISTANCE]
    rows: list[dict[str, object]] = []
    for name, target in _targets(results, at).items():
        for held in _held(list(given), len(results)):
            usable = [key for key in predictors if key not in held]
            columns = np.stack([predictors[key] for key in usable])
            fixed = np.array([given[key] for key in held]).reshape(len(held), len(results))
            about = {"target": name, "given": " + ".join(held), "models": len(results)}
            rows += [about | row for row in _rows(usable, layers, Cohort(columns, target, fixed, statistic, seed))]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _check_alpha(at: Any) -> None:
    if isinstance(at, bool) or not isinstance(at, Real):
        raise UsageError(f"at={at!r}: needs an alpha, a number", "one that every model was scanned at: at=1.0")


def _refuse_others(results: Sequence[Any]) -> None:
    if others := [found for found in results if not hasattr(found, "meta")]:
        raise UsageError(
            f"{others[0]!r} is a {type(others[0]).__name__}, no result of a scan",
            "[sharpscope.open(FOLDER) for FOLDER in ...]",
        )


def _refuse_few(results: Sequence[ScanResult]) -> None:
    if len(results) < NEEDED_MODELS:
        raise UsageError(
            f"{len(results)} models are too few to correlate over: with four, chance alone orders two things alike, or "
            "opposite, once in twelve times",
            f"scan {NEEDED_MODELS} fine-tuned models or more",
        )


def _refuse_twice(results: Sequence[ScanResult]) -> None:
    """Raise if two results are of the same fine-tuned weights: no independent points."""
    places: dict[object, int] = {}
    for place, result in enumerate(results):
        mark = result.meta.get("models", {}).get("fine_tuned", {}).get("hash", id(result))
        first = places.setdefault(mark, place)
        if first != place:
            raise UsageError(
                f"{_name(results, first)} and {_name(results, place)} have the same fine-tuned weights",
                "each fine-tuned model once, every one a training of its own",
            )


def _name(results: Sequence[ScanResult], place: int) -> str:
    found = results[place].meta.get("models", {}).get("fine_tuned", {}).get("name")
    return f"model {place}" + (f" ({found})" if found else "")


def _predictors(results: Sequence[ScanResult], at: float, measure: str) -> tuple[Columns, list[str]]:
    """Return a column of n numbers per predictor, and which of them are layers."""
    tables = []
    for place, result in enumerate(results):
        frame = result.layers
        chosen = frame[np.isclose(frame["alpha"], at) & (frame["measure"] == measure) & np.isfinite(frame["value"])]
        if chosen.empty:
            there = f"alphas {sorted(set(frame['alpha']))}, measures {sorted(set(frame['measure']))}"
            raise UsageError(
                f"{_name(results, place)} has no {measure!r} at alpha {at:g}; it has {there}",
                "scan all models with the same alphas and measures",
            )
        tables.append(chosen.set_index("layer")["value"])
    layers = [name for name in tables[0].index if name != MODEL and all(name in table.index for table in tables)]
    if not layers:
        raise UsageError("the models have no layer in common", "compare models of one architecture")
    found = {name: _logarithm(np.array([table[name] for table in tables])) for name in layers}
    norms = [[facts["delta_norm"] for facts in result.meta["layers"].values()] for result in results]
    found[DISTANCE] = np.array([math.hypot(*some) for some in norms])
    if all(MODEL in table.index for table in tables):
        found["global sharpness"] = _logarithm(np.array([table[MODEL] for table in tables]))
    losses = [_evaluation(result, "loss", at).get(result.id_split) for result in results]
    if all(loss is not None for loss in losses):
        found["held-out loss"] = np.array(losses, dtype=float)
    return found, layers


def _logarithm(column: Array) -> Array:
    return np.asarray(np.log(column)) if (column > 0).all() else column


def _evaluation(result: ScanResult, measure: str, at: float) -> dict[str, float]:
    """Return the finite values of an evaluation at alpha, by split."""
    frame = result.evals
    chosen = frame[np.isclose(frame["alpha"], at) & (frame["measure"] == measure) & np.isfinite(frame["value"])]
    return {str(split): float(value) for split, value in zip(chosen["split"], chosen["value"], strict=True)}


def _targets(results: Sequence[ScanResult], at: float) -> Columns:
    def accuracy(result: ScanResult, alpha: float) -> dict[str, float]:
        found = _evaluation(result, "accuracy", alpha)
        return {split: found[split] for split in result.ood_splits if split in found}

    here = [accuracy(result, at) for result in results]
    common = set(here[0]).intersection(*here[1:])
    if not common:
        sets = "; ".join(f"{_name(results, i)}: {', '.join(found) or 'none'}" for i, found in enumerate(here))
        raise UsageError(
            f"no labelled OOD set is common to all models at alpha {at:g} ({sets})", "scan all on the same sets"
        )

    def mean(found: Mapping[str, float]) -> float:
        # Means of the same accuracies in another order tie.
        return round(float(np.mean([found[split] for split in sorted(common)])), 12)

    targets = {"OOD accuracy": np.array([mean(found) for found in here])}
    start = [accuracy(result, 0.0) for result in results]
    if at != 0 and all(common <= set(found) for found in start):
        gain = targets["OOD accuracy"] - np.array([mean(found) for found in start])
        targets["gain over zero-shot"] = gain.round(12)
    return targets


def _covariate(name: str, values: Sequence[float], models: int) -> Array:
    found = np.asarray(values, dtype=float)
    if found.shape != (models,) or not np.isfinite(found).all():
        raise UsageError(f"covariate {name!r} is {list(values)}: needs a finite number for each of {models} models")
    return found


def _held(names: Sequence[str], models: int) -> Iterator[tuple[str, ...]]:
    """Yield the sets of covariates to hold fixed, those that leave at least two models to spare."""
    chosen = dict.fromkeys([(), *((name,) for name in names), tuple(names)])
    yield from (held for held in chosen if len(held) + 4 <= models)


def _rows(names: Sequence[str], layers: Sequence[str], test: Cohort) -> Iterator[dict[str, object]]:
    taus, chance = test.observed(), test.chance()
    # Ranks are not linear in covariates: what these explain of both sides leaves a partial tau of chance that is not 0.
    centre = chance.mean(axis=1) if len(test.given) else np.zeros(len(taus))
    away, chance = np.abs(taus - centre), np.abs(chance - centre[:, None])
    p = np.mean(chance >= away[:, None], axis=1)
    family = np.isin(names, layers)
    largest = chance[family].max(axis=0)
    q = np.full(len(names), np.nan)
    q[family] = stats.false_discovery_control(p[family])
    low, high = test.interval()
    for i, name in enumerate(names):
        yield {
            "predictor": name,
            "kind": "layer" if family[i] else "baseline",
            "tau": float(taus[i]),
            "p": float(p[i]),
            "p_family": float(np.mean(largest >= away[i])) if family[i] else math.nan,
            "q": float(q[i]),
            "low": float(low[i]),
            "high": float(high[i]),
            "chance": float(centre[i]),
        }
