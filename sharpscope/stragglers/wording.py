"""From evidence to words: the ladder on which only the last rung is called a straggler."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats

from sharpscope.table import Array

CO_MOVES = 0.5  # |tau| from which a row is worded "co-moves"; a reading aid, no test
LEVEL = 0.05  # family-wise error rate of "beyond the null"
NEEDED_ALPHAS = 5  # over four points the smallest possible p-value is 1/24

NOT_ENOUGH = "not enough points to test"
UNMOVED = "undecided: the layer did not move"
BEYOND = "co-moves beyond the null"
STRAGGLER = "straggler"
LADDER = (STRAGGLER, BEYOND, "co-moves", "co-moves, inverted", "does not co-move")  # strongest first; then the untested


def doubt(values: Array, stderr: Array, converged: Array, error: Array) -> str | None:
    """Return why a layer's curve cannot be compared with the OOD error, None if it can; shapes ``(n,)``."""
    if len(values) < NEEDED_ALPHAS:
        return NOT_ENOUGH
    if np.ptp(error) == 0:
        return "undecided: OOD error is the same at every alpha"
    if not converged.any():
        return "undecided: sharpness converged nowhere"
    if np.ptp(values) == 0:
        return "undecided: sharpness is the same at every alpha"
    return None if _above_noise(values, stderr) else "undecided: sharpness does not rise above its own error"


def _above_noise(values: Array, stderr: Array) -> bool:
    """Return whether the curve varies by more than its own standard errors explain (95 % chi-square)."""
    if not np.isfinite(stderr).all():
        return False
    weights = np.maximum(stderr, 1e-9 * np.abs(values).max()) ** -2.0
    centre = np.sum(weights * values) / np.sum(weights)
    return bool(np.sum(weights * (values - centre) ** 2) > stats.chi2.ppf(0.95, len(values) - 1))


def wording(tau: float, p_family: float, supported: bool) -> str:
    """Return how a tested correlation is called.

    Parameters
    ----------
    tau
        Correlation of the layer's sharpness with the OOD error.
    p_family
        Its family-wise p-value against the null of the path.
    supported
        Whether this layer's move was shown to harm OOD accuracy, see :func:`supported`.
    """
    if tau <= -CO_MOVES:
        return "co-moves, inverted"
    if tau < CO_MOVES:
        return "does not co-move"
    if not p_family <= LEVEL:
        return "co-moves"
    return STRAGGLER if supported else BEYOND


def supported(interventions: pd.DataFrame | None) -> set[str]:
    """Return the layers whose move is shown to harm OOD accuracy; none without interventions.

    Shown by a supported row of split ``"ood mean"``: accuracy rises when the layer goes back to zero-shot
    (``"necessary"``, effect above 0), or falls when it alone is fine-tuned (``"sufficient"``, effect below 0). A layer
    whose move helps is no straggler, however surely.
    """
    if interventions is None or interventions.empty:
        return set()
    shown = interventions["split"].eq("ood mean") & interventions["supported"].eq(True)
    back = interventions["question"].eq("necessary") & interventions["effect"].gt(0)
    alone = interventions["question"].eq("sufficient") & interventions["effect"].lt(0)
    return set(interventions.loc[shown & (back | alone), "layer"])
