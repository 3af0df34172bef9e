"""What a detector says about a result: a verdict, the number it rests on and how sure that number is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Literal, Protocol, SupportsFloat

from sharpscope.errors import MeasurementError, UsageError

if TYPE_CHECKING:
    from sharpscope.result import ScanResult

Verdict = Literal["pass", "fail", "undecided", "unmeasured"]
VERDICTS: tuple[Verdict, ...] = ("pass", "fail", "undecided", "unmeasured")
ROUNDING = 1e-9  # of the largest number: Wilson's interval of no image in 52 begins at 1e-17


@dataclass(frozen=True)
class Finding:
    """What one detector found.

    Parameters
    ----------
    detector
        Its name.
    verdict
        ``"pass"`` or ``"fail"`` if the interval lies wholly on one side of the limit, else ``"undecided"``;
        ``"unmeasured"`` if there is no number to judge by.
    score
        The number judged. Only an unmeasured finding may lack it (NaN).
    interval
        Where the true number lies with 95 % confidence, around the score; an end is infinite where nothing is known.
    reason
        A sentence with the number, its interval and the limit.
    needed
        How many images (or draws) would decide an undecided finding, if the number found is the true one; None
        where no number of them would, or none is needed.

    Raises
    ------
    MeasurementError
        For a verdict on NaN, on an interval without order or on a score outside of its interval, which is never "pass",
        for one that is no verdict, and for a score or an end that is no number.
    """

    detector: str
    verdict: Verdict
    score: float
    interval: tuple[float, float]
    reason: str
    needed: int | None = None

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise MeasurementError(
                f"detector {self.detector!r} gave the verdict {self.verdict!r}", f"one of: {', '.join(VERDICTS)}"
            )
        ends = tuple(self.interval) if isinstance(self.interval, Iterable) else ()
        if len(ends) != 2 or not all(isinstance(number, SupportsFloat) for number in (self.score, *ends)):
            raise MeasurementError(
                f"detector {self.detector!r} gave the score {self.score!r} and the interval {self.interval!r}",
                "a score is a number and an interval two, nan where there is none",
            )
        low, high = ends
        if self.verdict != "unmeasured" and not (math.isfinite(self.score) and low <= high):
            raise MeasurementError(
                f"detector {self.detector!r} calls {self.score} (95 % interval {low} to {high}) {self.verdict!r}",
                "a verdict needs a finite score and an interval; raise MeasurementError if there is none",
            )
        if self.verdict != "unmeasured" and not _within(self.score, low, high):
            raise MeasurementError(
                f"detector {self.detector!r} gave the score {self.score}, outside of its own 95 % interval {low} to "
                f"{high}",
                "score and interval of the same number, in the same unit; an interval that is corrected for a bias "
                "is widened to the score",
            )

    def _repr_html_(self) -> str:
        return f"<p><strong>{escape(self.verdict)}</strong> {escape(f'{self.detector}: {self.reason}')}</p>"


def _within(score: float, low: float, high: float) -> bool:
    rounding = ROUNDING * max(abs(number) for number in (score, low, high) if math.isfinite(number))
    return bool(low - rounding <= score <= high + rounding)


class Detector(Protocol):
    """Anything that turns a result into a finding: a function, or an object with settings.

    It raises :class:`~sharpscope.errors.MeasurementError` where the result does not hold what it judges by.
    """

    def __call__(self, result: ScanResult, /) -> Finding:
        """Return what was found."""


@dataclass(frozen=True)
class Limits:
    """The good side of a number: from ``low`` to ``high``, both included."""

    low: float = -math.inf
    high: float = math.inf

    def verdict(self, interval: tuple[float, float]) -> Verdict:
        """Return pass if the interval lies wholly within, fail if wholly outside, else undecided."""
        low, high = interval
        if self.low <= low and high <= self.high:
            return "pass"
        return "fail" if high < self.low or low > self.high else "undecided"

    def __str__(self) -> str:
        if math.isinf(self.low):
            return f"at most {self.high:g}"
        return f"at least {self.low:g}" if math.isinf(self.high) else f"{self.low:g} to {self.high:g}"


def limits(what: str, low: float | None, high: float | None, names: tuple[str, str] = ("min", "max")) -> Limits:
    """Return the limits of the two keys, None for one that was not given.

    Raises
    ------
    UsageError
        If neither was given, one is not finite, or no number lies between.
    """
    given = [value for value in (low, high) if value is not None]
    if not given:
        raise UsageError(f"{what} has no limit", f"give {names[0]} or {names[1]}")
    if not all(map(_is_finite, given)):
        raise UsageError(f"{what} has a limit that is {given[0] if len(given) == 1 else given}", "a finite number")
    if low is not None and high is not None and low > high:
        raise UsageError(f"{what}: {names[0]} is {low:g}, above {names[1]}, {high:g}", "exchange them")
    return Limits(-math.inf if low is None else low, math.inf if high is None else high)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of 400 digits
        return False


def check_percent(what: str, value: float | None) -> None:
    """Raise for a limit that no percentage can reach, or that looks like a share of one.

    Raises
    ------
    UsageError
        Unless it is None, 0, or from 1 to 100.
    """
    if value is not None and 0 < abs(value) < 1:
        raise UsageError(f"{what} is in percent: {value:g} means {value:g} %", f"{100 * value:g}?")
    if value is not None and not 0 <= value <= 100:
        raise UsageError(f"{what} is in percent, and its limit is {value:g}", "a limit from 0 to 100")
