"""The gate: rules on a result, one finding each, and whether it may pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sharpscope.detectors.findings import Detector, Finding
from sharpscope.detectors.rules import Rule, Rules, Undecided, read_rules, rules_from
from sharpscope.errors import GateError, MeasurementError, SharpscopeError, UsageError
from sharpscope.result import ScanResult, check_opened

Outcome = Literal["passed", "warned", "failed", "unmeasured"]


@dataclass(frozen=True)
class Checked:
    """A rule, what was found, and what that means for the gate."""

    rule: Rule
    finding: Finding
    outcome: Outcome

    def __str__(self) -> str:
        verdict = self.finding.verdict
        return f"{self.outcome:<10} {self.rule.id}: {f'{verdict}: ' * (verdict == 'undecided')}{self.finding.reason}"


@dataclass(frozen=True)
class GateResult:
    """What every rule of a gate found, in order.

    Attributes
    ----------
    passed
        Whether every rule was measured and none failed. A rule of severity ``warn`` may fail, not be unmeasured.
    exit_code
        0 passed, 1 failed, 3 a rule could not be measured; 3 goes before 1.
    """

    checks: tuple[Checked, ...]
    undecided: Undecided = "fail"

    @property
    def exit_code(self) -> int:
        """What the command line ends with."""
        outcomes = {check.outcome for check in self.checks}
        if "unmeasured" in outcomes:
            return MeasurementError.exit_code
        return GateError.exit_code if "failed" in outcomes else 0

    @property
    def passed(self) -> bool:
        """Whether the gate is open."""
        return self.exit_code == 0

    @property
    def headline(self) -> str:
        """One sentence: how it ended, and how many rules ended how."""
        word = {0: "passed", GateError.exit_code: "failed"}.get(self.exit_code, "could not be measured")
        ends = [check.outcome for check in self.checks]
        counts = [f"{ends.count(kind)} {kind}" for kind in dict.fromkeys(ends)]
        return f"Gate {word}: {', '.join(counts)} of {len(ends)} rule{'s' * (len(ends) != 1)}."

    def raise_for_status(self) -> GateResult:
        """Return this if the gate passed.

        Raises
        ------
        GateError
            If a rule failed.
        MeasurementError
            If a rule could not be measured.
        """
        if self.passed:
            return self
        stopped = [check for check in self.checks if check.outcome in ("failed", "unmeasured")]
        raise (GateError if self.exit_code == GateError.exit_code else MeasurementError)(
            "\n  ".join([self.headline, *map(str, stopped)])
        )

    def __str__(self) -> str:
        return "\n".join([*map(str, self.checks), self.headline])

    __repr__ = __str__


def check(result: ScanResult, rules: str | Path | Mapping[str, Any] | Rules | Iterable[Detector]) -> GateResult:
    """Return what the rules find in a result.

    Parameters
    ----------
    result
        Of a scan, or :func:`sharpscope.open`.
    rules
        A TOML file with ``[tool.sharpscope.check]`` (or with that table's content), the table itself, or detectors.

    Raises
    ------
    UsageError
        If the result is none, or a rule cannot be meant: an unknown key, measure, model, split or layer, a scan without
        the alpha named.

    Examples
    --------
    In a test, one line: ``assert sharpscope.check(sharpscope.open("runs/scan"), "pyproject.toml").passed``.

    Notes
    -----
    Every rule is tested for itself at 95 %: a number that lies exactly on its limit is passed, and failed, 2.5 % of the
    time each, and left undecided otherwise. Not so ``calibration_error``, which sampling raises: see
    :class:`~sharpscope.detectors.EvaluationDetector` for its rates, 0 to 9 %.
    """
    check_opened(result)
    chosen = _rules(result, rules)
    return GateResult(tuple(_checked(result, rule, chosen.undecided) for rule in chosen.rules), chosen.undecided)


def _rules(result: ScanResult, rules: str | Path | Mapping[str, Any] | Rules | Iterable[Detector]) -> Rules:
    known = tuple(result.meta["measures"])
    if isinstance(rules, Rules):
        return rules
    if isinstance(rules, str | Path):
        return read_rules(rules, known)
    if isinstance(rules, Mapping):
        return rules_from(rules, known=known)
    if not isinstance(rules, Iterable):
        raise UsageError(f"rules are {rules!r}", "a TOML file, its table as a dict, or a list of detectors")
    detectors = tuple(Rule(f"{place} {_name(d)}", d) for place, d in enumerate(rules, 1))
    if odd := [rule for rule in detectors if not callable(rule.detector)]:
        raise UsageError(f"rule {odd[0].id!r} is no detector", 'a table of rules: {"rules": [{"measure": ...}, ...]}')
    if not detectors:
        raise UsageError("there are no rules: a gate without any passes everything", "name at least one")
    return Rules(detectors)


def _name(detector: Detector) -> str:
    return getattr(detector, "__name__", type(detector).__name__)


def _checked(result: ScanResult, rule: Rule, undecided: Undecided) -> Checked:
    finding = _finding(result, rule)
    return Checked(rule, finding, _outcome(finding, rule, undecided))


def _finding(result: ScanResult, rule: Rule) -> Finding:
    """Return what the detector found; whatever stops it from finding anything is "unmeasured", never "pass"."""
    try:
        found: object = rule.detector(result)
    except UsageError as error:
        raise UsageError(f"rule {rule.id!r}: {error.problem}", error.fix) from error
    except SharpscopeError as error:
        return _unmeasured(rule, error.problem if error.fix is None else f"{error.problem}; {error.fix}")
    except Exception as error:
        return _unmeasured(rule, f"the detector raised {type(error).__name__}: {error}")
    if not isinstance(found, Finding):
        return _unmeasured(rule, f"the detector returned {type(found).__name__}, not a Finding")
    return found


def _unmeasured(rule: Rule, reason: str) -> Finding:
    return Finding(_name(rule.detector), "unmeasured", math.nan, (math.nan, math.nan), f"could not measure: {reason}")


def _outcome(finding: Finding, rule: Rule, undecided: Undecided) -> Outcome:
    if finding.verdict == "unmeasured":
        return "unmeasured"
    verdict = undecided if finding.verdict == "undecided" else finding.verdict
    if verdict == "fail" and rule.severity == "warn":
        verdict = "warn"
    outcomes: dict[str, Outcome] = {"pass": "passed", "warn": "warned", "fail": "failed"}
    return outcomes[verdict]
