"""Layers of a result: how many are stragglers, and the sharpness of one of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sharpscope.detectors.findings import Finding, Limits, limits
from sharpscope.detectors.images import alpha_of, check_apart, check_keep_id, model_named
from sharpscope.detectors.intervals import Estimate
from sharpscope.detectors.judgement import PLAIN, judged
from sharpscope.errors import MeasurementError, UsageError, nearest
from sharpscope.report.words import count, listed
from sharpscope.stragglers.paired import Z95
from sharpscope.stragglers.wording import UNMOVED
from sharpscope.table import MODEL, Row, cell_key

if TYPE_CHECKING:
    import pandas as pd

    from sharpscope.result import ScanResult

STRAGGLER = "straggler"
BEYOND = "co-moves beyond the null"  #: one rung below: a straggler if an intervention supports it
OPEN = ("undecided", "not enough points")  #: how verdicts begin that are none


@dataclass(frozen=True, kw_only=True)
class StragglerDetector:
    """Judges the number of layers with the verdict "straggler" in at least one measure.

    A layer that is not decided (too few points, sharpness below its own noise, beyond the null but without an
    intervention) may be one: the interval runs from the stragglers to these as well.

    Parameters
    ----------
    min, max
        The limits, both included.
    of
        Only this measure of sharpness; None: any.
    """

    min: int | None = None
    max: int | None = None
    of: str | None = None

    def __post_init__(self) -> None:
        found = self._limits()
        if found.high < 0:
            raise UsageError(f"n_stragglers: max is {self.max}, and layers are counted", "a number from 0")

    def _limits(self) -> Limits:
        return limits("n_stragglers", self.min, self.max)

    def __call__(self, result: ScanResult) -> Finding:
        """Return the finding; ``MeasurementError`` if the scan has no straggler table (no OOD set, no sharpness)."""
        table = _of(result.stragglers, "measure", self.of)
        table = table[table["layer"] != MODEL]
        if table.empty or table["verdict"].isna().any():
            missing = "an undefined verdict" if len(table) else "no straggler table"
            raise MeasurementError(f"the scan holds {missing}", "scan with OOD sets, sharpness and four alphas or more")
        sure = set(table.loc[table["verdict"] == STRAGGLER, "layer"])
        open_ones = set(table.loc[table["verdict"].map(_is_open), "layer"])
        untested = set(table.loc[table["verdict"] == BEYOND, "layer"]) - _intervened(result)
        perhaps = (open_ones | untested) - sure
        interval = (float(len(sure)), float(len(sure | perhaps)))
        verdict = self._limits().verdict(interval)
        reason = f"{count(len(sure), 'straggler')}{_named(sure)}, limit {self._limits()}"
        if perhaps:
            reason += f"; {count(len(perhaps), 'layer')} not decided{_named(perhaps)}"
        return Finding("n_stragglers", verdict, float(len(sure)), interval, reason)


def _is_open(verdict: str) -> bool:
    return verdict.startswith(OPEN) and verdict != UNMOVED


def _named(layers: set[str]) -> str:
    shown = sorted(layers)[:5]
    return f" ({listed(shown)}{', ...' if len(layers) > len(shown) else ''})" if shown else ""


def _intervened(result: ScanResult) -> set[str]:
    table: pd.DataFrame | None = getattr(result, "interventions", None)
    return set() if table is None or table.empty else set(table["layer"])


def _of(table: pd.DataFrame, column: str, name: str | None) -> pd.DataFrame:
    """Return the rows with this name, all for None; ``UsageError`` with the nearest name if there are none."""
    if name is None or name in (known := table[column].unique()):
        return table if name is None else table[table[column] == name]
    raise UsageError(f"{column} {name!r} is not in this scan", nearest(name, known))


@dataclass(frozen=True, kw_only=True)
class SharpnessDetector:
    """Judges the sharpness of one layer, or of the whole model, at one place of the path.

    Parameters
    ----------
    measure
        A curvature measure of the scan, e.g. ``trace``.
    layer
        Layer id; ``model`` is the whole network.
    model, keep_id
        See :class:`~sharpscope.detectors.EvaluationDetector`.
    max
        Limit of the value.
    max_ratio
        Limit of the value over that of the zero-shot model (Fieller's interval, with the covariance of samples that
        were drawn alike at both).
    """

    measure: str
    layer: str = MODEL
    model: str = "candidate"
    max: float | None = None
    max_ratio: float | None = None
    keep_id: float | None = None

    def __post_init__(self) -> None:
        model_named(self.model)
        if self.max is not None and self.max_ratio is not None:
            raise UsageError("max and max_ratio are two limits", "give one, and another rule for the other")
        if self.max_ratio is not None:
            check_apart(self.model, "zero-shot")  # which the ratio is to
        check_keep_id(self.keep_id, self.model)
        limits(self.measure, None, self._limit(), ("max", "max_ratio"))

    def _limit(self) -> float | None:
        return self.max if self.max_ratio is None else self.max_ratio

    def __call__(self, result: ScanResult) -> Finding:
        """Return the finding; ``MeasurementError`` if the scan lacks the number or its Lanczos did not converge."""
        alpha = alpha_of(result, self.model, self.keep_id)
        row, samples = _row(result, alpha, self.measure, self.layer)
        estimate, what = _of_row(row), f"{self.measure} of {self.layer!r} at alpha {alpha:g}"
        if self.max_ratio is not None:
            other, others = _row(result, 0.0, self.measure, self.layer)
            what += " over that of zero-shot"
            covariance = _covariance(row, samples, other, others)
            estimate = ratio(estimate, _of_row(other), covariance, bounds="lambda" in self.measure)
        return judged(
            self.measure, what, estimate, limits(self.measure, None, self._limit()), scale=PLAIN, things="draw"
        )


def _row(result: ScanResult, alpha: float, measure: str, layer: str) -> tuple[Row, np.ndarray | None]:
    """Return the row and its samples."""
    known = result.meta["layers"]
    if layer not in known and layer != MODEL:
        raise UsageError(f"layer {layer!r} is not in this scan", nearest(layer, [*known, MODEL]))
    key = cell_key(alpha, result.curvature_split, measure)
    cell = next((cell for cell in result.cells if cell.key == key), None)
    row = next((row for row in cell.rows if row.layer == layer), None) if cell else None
    if cell is None or row is None:
        raise MeasurementError(
            f"{measure} of {layer!r} was not measured at alpha {alpha:g}", f"scan again with --measures {measure}"
        )
    if "lambda" in measure and not row.converged:
        raise MeasurementError(f"{measure} of {layer!r} at alpha {alpha:g} did not converge", "more Lanczos steps")
    return row, cell.arrays.get(layer)


def _of_row(row: Row) -> Estimate:
    return Estimate(row.value, *row.interval, row.draws)


def _covariance(row: Row, samples: np.ndarray | None, other: Row, others: np.ndarray | None) -> float:
    """Return the covariance of two values that are plain means of as many samples, drawn alike at every alpha."""
    if samples is None or others is None or samples.shape != others.shape or samples.ndim != 1 or len(samples) < 2:
        return 0.0
    plain = math.isclose(samples.mean(), row.value, rel_tol=1e-6)
    if not (plain and math.isclose(others.mean(), other.value, rel_tol=1e-6)):
        return 0.0
    return float(np.cov(samples, others)[0, 1]) / len(samples)


def ratio(above: Estimate, below: Estimate, covariance: float = 0.0, *, bounds: bool = False) -> Estimate:
    """Return the ratio of two estimates with Fieller's interval; infinite unless ``below`` is positive for sure.

    Intervals that are ``bounds`` (of an eigenvalue) are divided crosswise.
    """
    n = min(above.n, below.n)
    if not below.low > 0:
        value = above.value / below.value if below.value else 0.0
        return Estimate(value, -math.inf, math.inf, n)
    value = above.value / below.value
    if bounds:
        ends = [a / b for a in above.interval for b in below.interval]
        return Estimate(value, min(ends), max(ends), n)
    a, b = (above.high - above.low) / 2, (below.high - below.low) / 2  # 1.96 standard errors, or Student's
    shared = min(max(covariance * Z95**2, -a * b), a * b)
    g = (b / below.value) ** 2
    centre = value - g * shared / b**2 if b else value
    width = a**2 - 2 * value * shared + (value * b) ** 2 - g * (a**2 - shared**2 / b**2 if b else 0.0)
    half = math.sqrt(max(width, 0.0)) / below.value
    return Estimate(value, (centre - half) / (1 - g), (centre + half) / (1 - g), n)
