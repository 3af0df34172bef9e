"""What the figures draw, taken from a result: accuracy and loss along the path, sharpness by layer and alpha."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from sharpscope.errors import UsageError
from sharpscope.result import ScanResult
from sharpscope.stragglers.interval import wilson
from sharpscope.stragglers.paired import Z95
from sharpscope.table import MODEL, Array

LIMIT = 0.30  #: relative standard error above which a value is drawn as unsure


@dataclass(frozen=True)
class Curve:
    """A number along the path with the ends of its 95 % interval (NaN where unknown), each of shape ``(alphas,)``."""

    alpha: Array
    value: Array
    low: Array
    high: Array

    def at(self, alpha: float) -> float:
        """Return the value at an alpha of the curve; NaN if it has none there."""
        found = self.value[self.alpha == alpha]
        return float(found[0]) if len(found) else math.nan


def _evaluation(result: ScanResult, split: str, measure: str) -> pd.DataFrame:
    evals = result.evals
    return evals[(evals["split"] == split) & (evals["measure"] == measure)].sort_values("alpha")


def accuracy(result: ScanResult, split: str) -> Curve:
    """Return the accuracy on a split along the path, with Wilson intervals."""
    found = _evaluation(result, split, "accuracy")
    value = found["value"].to_numpy()
    return Curve(found["alpha"].to_numpy(), value, *wilson(value, found["n"].to_numpy().astype(float)))


def loss(result: ScanResult, split: str) -> Curve:
    """Return the mean loss on a split along the path, with normal intervals."""
    found = _evaluation(result, split, "loss")
    value, stderr = found["value"].to_numpy(), found["stderr"].to_numpy()
    half = Z95 * np.where(np.isfinite(stderr), stderr, np.nan)
    return Curve(found["alpha"].to_numpy(), value, value - half, value + half)


def mean_ood(result: ScanResult) -> Curve:
    """Return the accuracy averaged over the OOD sets with equal weight, where all were evaluated."""
    evals = result.evals
    chosen = evals[(evals["measure"] == "accuracy") & evals["split"].isin(result.ood_splits)]
    table = chosen.pivot_table(index="alpha", columns="split", values="value").dropna().sort_index()
    errors = chosen.pivot_table(index="alpha", columns="split", values="stderr").reindex(table.index)
    value = table.mean(axis=1).to_numpy().round(12)  # means of the same accuracies in another order tie
    half = Z95 * np.sqrt((errors**2).sum(axis=1).to_numpy()) / max(1, table.shape[1])
    return Curve(table.index.to_numpy(), value, value - half, value + half)


@dataclass(frozen=True)
class Grid:
    """One measure by layer (rows, depth order) and alpha (columns): arrays of shape ``(layers, alphas)``.

    ``value`` and ``stderr`` are NaN where nothing was measured; an infinite ``stderr`` is an unknown one.
    """

    measure: str
    layers: tuple[str, ...]
    alphas: tuple[float, ...]
    value: Array
    stderr: Array
    converged: Array

    @property
    def measured(self) -> Array:
        """Where there is a number."""
        return np.asarray(np.isfinite(self.value))

    @property
    def relative(self) -> Array:
        """Standard error per absolute value; infinite for an inexact 0 or an unknown error, NaN if not measured."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = self.stderr / np.abs(self.value)
        empty = self.measured & (self.value == 0)  # exact (a layer that did not move) or without any scale
        return np.asarray(np.where(empty, np.where(self.stderr == 0, 0.0, np.inf), ratio))

    @property
    def unsure(self) -> Array:
        """Where the relative standard error exceeds :data:`LIMIT` or the estimate did not converge."""
        return np.asarray(self.measured & (~self.converged | (self.relative > LIMIT)))


def rows_of(result: ScanResult, measure: str) -> pd.DataFrame:
    """Return the curvature rows of one measure.

    Raises
    ------
    UsageError
        If the scan holds no such measure.
    """
    rows = result.layers
    found = rows[(rows["measure"] == measure) & (rows["split"] == result.curvature_split)]
    if found.empty:
        known = ", ".join(rows["measure"].unique()) or "none"
        raise UsageError(
            f"measure {measure!r} is not in this scan, which holds: {known}",
            "name one of these, or scan again with the measure",
        )
    return found


def depth_order(result: ScanResult) -> list[str]:
    """Return every layer id in depth order, the unused included, then whatever else has rows, the whole model last."""
    named = [*result.meta["layers"], *result.meta.get("unused", []), *result.layers["layer"].unique()]
    layers = list(dict.fromkeys(name for name in named if name != MODEL))
    return [*layers, MODEL] if MODEL in named else layers


def layer_grid(result: ScanResult, measure: str) -> Grid:
    """Return one measure by layer and alpha, every layer of the partition included."""
    rows = rows_of(result, measure)
    layers = [name for name in depth_order(result) if name != MODEL or (rows["layer"] == MODEL).any()]
    alphas = sorted(rows["alpha"].unique())

    def spread(column: str) -> Array:
        table = rows.pivot(index="layer", columns="alpha", values=column)
        return np.asarray(table.reindex(index=layers, columns=alphas).to_numpy())

    value, stderr = spread("value").astype(float), spread("stderr").astype(float)
    converged = np.where(np.isfinite(value), spread("converged"), False).astype(bool)
    return Grid(measure, tuple(layers), tuple(map(float, alphas)), value, stderr, converged)


def heat_grid(result: ScanResult, measure: str) -> Grid:
    """Return the grid as a heatmap shows it: the smallest eigenvalue, as a rule negative, with its sign changed."""
    grid = layer_grid(result, measure)
    return replace(grid, value=-grid.value) if measure.endswith("lambda_min") else grid


def measures(result: ScanResult) -> list[str]:
    """Return the curvature measures that have rows, in the order of the plan."""
    found = set(result.layers["measure"])
    return [name for name in result.meta["measures"] if name in found]
