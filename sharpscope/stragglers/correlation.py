"""First straggler table: whose sharpness runs with the OOD error along the path. Description, not proof."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy import stats

from sharpscope.table import MODEL, Array

CO_MOVES = 0.5  # |tau| from which a row is worded "co-moves"; a reading aid, no test
NEEDED_ALPHAS = 4  # tau over three points takes four values only


def kendall(curve: Array, error: Array) -> float:
    """Return Kendall's tau-b of two curves of shape ``(alphas,)``; 0 if one of them is constant."""
    if len(curve) < 2:
        return 0.0
    tau = stats.kendalltau(curve, error).statistic
    return 0.0 if np.isnan(tau) else float(tau)


def _above_noise(curve: pd.DataFrame) -> bool:
    """Return whether the curve varies by more than its own standard errors explain (95 % chi-square)."""
    known = np.isfinite(curve["stderr"]) & (curve["stderr"] > 0)
    if not known.all():
        return bool((curve["stderr"] == 0).all() and curve["value"].nunique() > 1)
    weights = curve["stderr"].to_numpy() ** -2.0
    values = curve["value"].to_numpy()
    centre = np.sum(weights * values) / np.sum(weights)
    return bool(np.sum(weights * (values - centre) ** 2) > stats.chi2.ppf(0.95, len(values) - 1))


def _wording(tau: float, curve: pd.DataFrame) -> str:
    if len(curve) < NEEDED_ALPHAS:
        return f"undecided: fewer than {NEEDED_ALPHAS} alphas"
    if not curve["converged"].any():
        return "undecided: sharpness converged nowhere"
    if not _above_noise(curve):
        return "undecided: sharpness does not rise above its own error"
    if tau >= CO_MOVES:
        return "co-moves"
    return "co-moves, inverted" if tau <= -CO_MOVES else "does not co-move"


def ood_error(evals: pd.DataFrame, ood: Iterable[str]) -> pd.Series:
    """Return the error (1 - accuracy) by alpha, averaged over the OOD sets with equal weight; empty without sets."""
    chosen = evals[(evals["measure"] == "accuracy") & evals["split"].isin(list(ood))]
    return 1 - chosen.groupby("alpha")["value"].mean()


def co_movement(layers: pd.DataFrame, error: pd.Series) -> pd.DataFrame:
    """Return one row per layer and measure: rank correlation of its sharpness with the OOD error along the path.

    ``tau`` is Kendall's tau-b over the alphas (log or not makes no difference to ranks). The points of one path
    are not independent, so a large tau is weak evidence and no p-value is given: two unrelated smooth curves
    of eleven points pass a naive test at the 5 % level in about half of all cases. ``verdict`` therefore
    knows no more than "co-moves".

    Parameters
    ----------
    layers
        Frame of curvature rows, ``r.layers``.
    error
        OOD error indexed by alpha, see :func:`ood_error`.
    """
    found = []
    # The smallest eigenvalue grows where a block becomes less curved downwards: no sharpness, so no straggler.
    sharpness = layers[~layers["measure"].str.endswith("lambda_min")]
    for (measure, layer), curve in sharpness.groupby(["measure", "layer"], sort=False):
        curve = curve[curve["alpha"].isin(error.index)].sort_values("alpha")
        if curve.empty:
            continue
        tau = kendall(curve["value"].to_numpy(), error.loc[curve["alpha"]].to_numpy())
        verdict = _wording(tau, curve)
        found.append({"layer": layer, "measure": measure, "tau": tau, "alphas": len(curve), "verdict": verdict})
    return pd.DataFrame(found, columns=["layer", "measure", "tau", "alphas", "verdict"])


def with_distance(table: pd.DataFrame, layers: dict[str, dict[str, float]]) -> pd.DataFrame:
    """Return the table with each layer's ``delta_norm`` and ``relative_delta``, the baseline of every claim."""
    total = {
        key: float(np.sqrt(sum(facts[key] ** 2 for facts in layers.values()))) for key in ("delta_norm", "start_norm")
    }
    facts = {**layers, MODEL: total}
    moved = table["layer"].map(lambda name: facts[name]["delta_norm"])
    start = table["layer"].map(lambda name: facts[name]["start_norm"])
    return table.assign(delta_norm=moved, relative_delta=moved / start.where(start > 0))
