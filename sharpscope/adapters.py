"""A result for other tools: an xarray data set, flat metrics for MLflow, one call per alpha for a tracker."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import pandas as pd

from sharpscope.errors import SharpscopeError, UsageError
from sharpscope.table import MODEL

if TYPE_CHECKING:
    import xarray

    from sharpscope.result import ScanResult

LONGEST = 250  #: characters that MLflow keeps of a name


class Tracker(Protocol):
    """What Weights & Biases, trackio and the like have in common."""

    def log(self, metrics: dict[str, float], *, step: int) -> object:
        """Keep the numbers of a step."""


def to_xarray(result: ScanResult) -> xarray.Dataset:
    """Return the numbers on labelled axes.

    Every measure of sharpness is a variable over ``(layer, alpha)``, every evaluation one over ``(split, alpha)``, each
    with ``NAME_stderr``; sharpness also with ``NAME_converged``. NaN where nothing was measured. Layers stand in depth
    order, the whole network (``model``) last.

    Raises
    ------
    UsageError
        If xarray is not installed.
    """
    try:
        import xarray
    except ImportError as missing:
        raise UsageError("to_xarray needs xarray, which is not installed", "pip install xarray") from missing
    layers = [*(name for name in result.meta["layers"] if name not in result.meta.get("unused", [])), MODEL]
    orders = {"layer": layers, "split": [result.id_split, *result.ood_splits], "alpha": result.meta["alphas"]}
    variables = {
        **_grids(result.layers, "layer", orders, ("value", "stderr", "converged")),
        **_grids(result.evals, "split", orders, ("value", "stderr")),
    }
    facts = {"seed": result.meta["seed"], "id_split": result.id_split, "curvature_split": result.curvature_split}
    facts["alpha_convention"] = result.meta.get("alpha_convention", "")
    return xarray.Dataset(variables, coords=orders, attrs=facts)


def _grids(
    rows: pd.DataFrame, axis: str, orders: Mapping[str, Sequence[Any]], columns: Sequence[str]
) -> dict[str, tuple[tuple[str, str], Any]]:
    """Return a variable for each measure and column."""
    found = {}
    for measure, chosen in rows.groupby("measure", sort=False):
        for column in columns:
            table = chosen.pivot(index=axis, columns="alpha", values=column)
            grid = table.reindex(index=orders[axis], columns=orders["alpha"])
            name = str(measure) if column == "value" else f"{measure}_{column}"
            values = grid.eq(True) if column == "converged" else grid.astype(float)
            found[name] = ((axis, "alpha"), values.to_numpy())
    return found


def to_mlflow_metrics(result: ScanResult) -> dict[str, float]:
    """Return the numbers of zero-shot, candidate and fine-tuned as one flat dict, for ``mlflow.log_metrics``.

    Names are ``MEASURE/WHERE/MODEL``, where WHERE is a split or a layer, and ``accuracy_change/SPLIT/versus END`` (with
    ``_low`` and ``_high``, the 95 % interval); what MLflow does not take in a name becomes ``_``. Shares and changes
    are fractions, as in ``evals``. An unknown standard error is left out.
    """
    found: dict[str, float] = {}
    for name, value in _summary(result):
        if math.isfinite(value):
            found[_free(_valid(name), found)] = float(value)
    return found


def _summary(result: ScanResult) -> Iterator[tuple[str, float]]:
    models = {"zero-shot": 0.0, "fine-tuned": 1.0}
    try:
        advice = result.recommend()
    except SharpscopeError:
        advice = None
    if advice is not None:
        models["candidate"] = advice.alpha
        yield "recommended_alpha", advice.alpha
        for end, by_split in advice.versus.items():
            for split, change in by_split.items():
                values = (change.value, *change.interval)
                for suffix, value in zip(("", "_low", "_high"), values, strict=True):
                    yield f"accuracy_change{suffix}/{split}/versus {end}", value
    for model, alpha in models.items():
        for name, value in _at(result, alpha):
            yield f"{name}/{model}", value


def _at(result: ScanResult, alpha: float) -> Iterator[tuple[str, float]]:
    """Yield ``MEASURE/WHERE`` and the value, then its standard error, of every row of an alpha."""
    for frame, axis in ((result.evals, "split"), (result.layers, "layer")):
        rows = frame[frame["alpha"] == alpha]
        for measure, where, value, stderr in zip(
            rows["measure"], rows[axis], rows["value"], rows["stderr"], strict=True
        ):
            yield f"{measure}/{where}", value
            yield f"{measure}_stderr/{where}", stderr


def _valid(name: str) -> str:
    """Return the name with what MLflow refuses replaced: other signs, empty or dotted parts, excess length."""
    parts = [re.sub(r"[^A-Za-z0-9_\-. ]", "_", part).strip(" .") or "_" for part in name.split("/")]
    return "/".join(parts)[: LONGEST - 8].rstrip("/ ")


def _free(name: str, taken: Mapping[str, float]) -> str:
    number = 2
    free = name
    while free in taken:
        free, number = f"{name}_{number}", number + 1
    return free


def log_to(result: ScanResult, tracker: Tracker) -> None:
    """Log the path to anything with ``log(dict, step=)``: a call for each alpha, then one with the summary.

    Step i holds ``alpha`` and ``MEASURE/WHERE`` of the i-th alpha, the last step what :func:`to_mlflow_metrics` gives.

    Raises
    ------
    UsageError
        If the tracker has no such method.
    """
    if not callable(getattr(tracker, "log", None)):
        raise UsageError(f"{type(tracker).__name__} has no log(dict, step=)", "wandb.init(...), trackio.init(...)")
    alphas = [float(alpha) for alpha in result.meta["alphas"]]
    for step, alpha in enumerate(alphas):
        numbers = {name: float(value) for name, value in _at(result, alpha) if math.isfinite(value)}
        tracker.log({"alpha": alpha, **numbers}, step=step)
    tracker.log(to_mlflow_metrics(result), step=len(alphas))
