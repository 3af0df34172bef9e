"""From an estimate and its limits to a finding in words."""

from __future__ import annotations

from dataclasses import dataclass

from sharpscope.detectors.findings import Finding, Limits
from sharpscope.detectors.intervals import Estimate
from sharpscope.report.words import count, significant


@dataclass(frozen=True)
class Scale:
    """How the numbers of a rule are written: ``factor`` of the unit make one."""

    factor: float = 1.0
    unit: str = ""
    signed: bool = False

    def __call__(self, value: float) -> str:
        """Return the number in the unit, to one digit after the point if that is a percentage."""
        scaled = value * self.factor
        text = f"{scaled:.1f}" if self.factor == 100 else significant(scaled)
        return f"+{text}" if self.signed and scaled > 0 else text.replace("−", "-")


PERCENT = Scale(100.0, " %")
POINTS = Scale(100.0, " points", signed=True)
PLAIN = Scale()
CHANGE = Scale(signed=True)


def judged(
    detector: str,
    what: str,
    estimate: Estimate,
    good: Limits,
    *,
    scale: Scale = PLAIN,
    things: str = "image",
    of: int = 1,
) -> Finding:
    """Return the finding on an estimate, which is in units of one; the limits are in the unit of the scale.

    ``what`` names the number, ``things`` (singular) what it was made from; ``of`` says how many of them are spent for
    each one that it rests on: 2 where half of them chose alpha.
    """
    limits = Limits(good.low / scale.factor, good.high / scale.factor)
    verdict = limits.verdict(estimate.interval)
    low, high = map(scale, estimate.interval)
    reason = f"{what}: {scale(estimate.value)}{scale.unit} (95 % interval {low} to {high}), limit {good}{scale.unit}"
    needed = estimate.needed(limits) if verdict == "undecided" else None
    if needed is not None:
        needed *= of
        reason += f"; about {count(needed, things)} would decide, there are {estimate.n * of:,}"
    elif verdict == "undecided":
        reason += f"; no number of {things}s would decide while the number is so close to the limit"
    shown = estimate.scaled(scale.factor)
    return Finding(detector, verdict, shown.value, shown.interval, reason, needed)
