"""The scan itself: which alpha it recommends, and how much of it was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sharpscope.detectors.findings import Finding, Limits, check_percent, limits
from sharpscope.errors import MeasurementError, UsageError, nearest
from sharpscope.report.words import count

if TYPE_CHECKING:
    from sharpscope.result import ScanResult


@dataclass(frozen=True, kw_only=True)
class RecommendedAlphaDetector:
    """Judges the recommended alpha; its interval spans the alphas that these images cannot tell from it."""

    min: float | None = None
    max: float | None = None
    keep_id: float | None = None

    def __post_init__(self) -> None:
        self._limits()

    def _limits(self) -> Limits:
        return limits("recommended_alpha", self.min, self.max)

    def __call__(self, result: ScanResult) -> Finding:
        """Return the finding; ``UsageError`` where no alpha can be recommended."""
        advice = result.recommend(self.keep_id)
        interval = (min(advice.ties), max(advice.ties))
        reason = f"recommended alpha: {advice.alpha:g} (not told from it: {interval[0]:g} to {interval[1]:g})"
        verdict = self._limits().verdict(interval)
        return Finding("recommended_alpha", verdict, advice.alpha, interval, f"{reason}, limit {self._limits()}")


@dataclass(frozen=True, kw_only=True)
class MeasuredDetector:
    """Judges the share, in percent, of sharpness numbers that were measured and met their target error.

    Parameters
    ----------
    min
        The limit.
    of
        Only this measure; None: all.
    """

    min: float
    of: str | None = None

    def __post_init__(self) -> None:
        limits("measured", self.min, None)
        check_percent("measured", self.min)

    def __call__(self, result: ScanResult) -> Finding:
        """Return the finding; ``MeasurementError`` if nothing was planned or nothing converged."""
        planned = list(result.meta["measures"])
        if self.of is not None and self.of not in planned:
            raise UsageError(f"measure {self.of!r} is not in this scan", nearest(self.of, planned))
        rows = result.layers
        rows = rows if self.of is None else rows[rows["measure"] == self.of]
        total = len(result.meta["alphas"]) * int(rows.groupby("measure")["layer"].nunique().sum())
        met = int(rows["converged"].sum())
        if not met:
            found = f"none of {count(total, 'sharpness number')} converged" if total else "the scan holds no sharpness"
            raise MeasurementError(found, "see how the estimators did in the report; --tolerance 2 asks for less")
        share = 100 * met / total
        reason = f"{met:,} of {count(total, 'sharpness number')} converged: {share:.1f} %, limit {self.min:g} % or more"
        verdict = limits("measured", self.min, None).verdict((share, share))
        return Finding("measured", verdict, share, (share, share), reason)
