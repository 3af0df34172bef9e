"""Rules of a gate as they stand in a TOML file: read, checked key by key, and turned into detectors."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from sharpscope.detectors.barrier import BarrierDetector
from sharpscope.detectors.evaluation import EvaluationDetector
from sharpscope.detectors.findings import Detector
from sharpscope.detectors.images import CANDIDATE
from sharpscope.detectors.layers import SharpnessDetector, StragglerDetector
from sharpscope.detectors.scan import MeasuredDetector, RecommendedAlphaDetector
from sharpscope.errors import SharpscopeError, UsageError, nearest
from sharpscope.home import at_home
from sharpscope.table import EVALUATIONS
from sharpscope.toml import read_toml, underscored

GROUP = "sharpscope.detectors"  #: entry points under which other packages offer detectors
TABLE = ("tool", "sharpscope", "check")
BUILT_IN: dict[str, Callable[..., Detector]] = {
    **dict.fromkeys(EVALUATIONS, EvaluationDetector),
    "barrier": BarrierDetector,
    "n_stragglers": StragglerDetector,
    "recommended_alpha": RecommendedAlphaDetector,
    "measured": MeasuredDetector,
}
# As in sharpscope.measures, which imports torch; a scan may hold others.
SHARPNESS = (
    "trace",
    "lambda_max",
    "m_sharpness",
    "m_sharpness_average",
    "lambda_min",
    "directional",
    "gauss_newton_trace",
    "gauss_newton_lambda_max",
    "gauss_newton_directional",
    "m_sharpness_adaptive",
    "m_sharpness_inf",
    "m_sharpness_apgd",
    "m_sharpness_average_adaptive",
)

Undecided = Literal["pass", "warn", "fail"]
Severity = Literal["error", "warn"]


@dataclass(frozen=True)
class Rule:
    """A detector with the name that its finding is reported under and how grave it is."""

    id: str
    detector: Detector
    severity: Severity = "error"


@dataclass(frozen=True)
class Rules:
    """Rules in order, and what becomes of an undecided one."""

    rules: tuple[Rule, ...]
    undecided: Undecided = "fail"


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    undecided: Undecided = "fail"
    keep_id: float | None = Field(default=None, le=0, strict=True)  # true is no number
    rules: list[dict[str, Any]] = Field(min_length=1)


class _Head(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str = Field(min_length=1)
    severity: Severity = "error"
    measure: str | None = None
    detector: str | None = None


_NUMBER = re.compile(r"\b(int|float)\b")  # in the annotation of a key
_TEXT = re.compile(r"\b(str|Literal|Any)\b")

_HEAD = ("id", "severity", "detector")


def read_rules(path: str | Path, known: tuple[str, ...] = ()) -> Rules:
    """Return the rules of a TOML file: its ``[tool.sharpscope.check]``, or the whole file if it has no ``[tool]``.

    ``known`` are further names that a measure of sharpness may have, e.g. those of a scan.

    Raises
    ------
    UsageError
        For the first thing that cannot be meant, naming file, rule, key and the nearest one known.
    """
    place = at_home(path)
    stored = read_toml(place, "file of rules", "a file of TOML, e.g. --rules pyproject.toml")
    return rules_from(_table(stored, place) if "tool" in stored else stored, str(place), known)


def _table(stored: dict[str, Any], place: Path) -> dict[str, Any]:
    found: Any = stored
    for depth, key in enumerate(TABLE):
        if not isinstance(found, dict) or key not in found:
            inside = nearest(key, found) if isinstance(found, dict) else "a table"
            raise UsageError(f"{place} holds no [{'.'.join(TABLE)}]: no {key!r} in {'.'.join(TABLE[:depth])!r}", inside)
        found = found[key]
    if not isinstance(found, dict):
        raise UsageError(f"{place}: {'.'.join(TABLE)} is {found!r}, not a table", f"[{'.'.join(TABLE)}]")
    return found


def rules_from(table: Mapping[str, Any], source: str = "rules", known: tuple[str, ...] = ()) -> Rules:
    """Return the rules of a table as TOML gives it; see :func:`read_rules`."""
    try:
        checked = _Table(**underscored(table, source))
    except ValidationError as error:
        raise UsageError(f"{source}: {_fault(error, tuple(_Table.model_fields))}") from error
    shared = {} if checked.keep_id is None else {"keep_id": checked.keep_id}
    rules = tuple(
        _rule(stored, shared, f"{source}, rule {place}", known) for place, stored in enumerate(checked.rules, 1)
    )
    ids = [rule.id for rule in rules]
    if twice := {name for name in ids if ids.count(name) > 1}:
        raise UsageError(f"{source}: two rules have the id {min(twice)!r}", "give each its own")
    return Rules(rules, checked.undecided)


def _rule(stored: Mapping[str, Any], shared: Mapping[str, Any], where: str, known: tuple[str, ...]) -> Rule:
    where += f" ({stored['id']!r})" if isinstance(stored.get("id"), str) else ""
    stored = underscored(stored, where)
    try:
        head = _Head(**stored)
        factory = _factory(head, known)
        settings = {name: value for name, value in stored.items() if name not in _HEAD}
        allowed = list(inspect.signature(factory).parameters)
        if "measure" not in allowed:
            settings.pop("measure", None)
        if _heeds(factory, settings):
            settings = {**{k: v for k, v in shared.items() if k in allowed}, **settings}
        return Rule(head.id, _detector(factory, settings, allowed), head.severity)
    except ValidationError as error:
        raise UsageError(f"{where}: {_fault(error, tuple(_Head.model_fields))}") from error
    except SharpscopeError as error:
        raise UsageError(f"{where}: {error.problem}", error.fix) from error


def _heeds(factory: Callable[..., Detector], settings: Mapping[str, Any]) -> bool:
    """Whether a detector heeds what stands above all rules: one of ours only where a candidate is judged."""
    if factory not in (EvaluationDetector, SharpnessDetector):
        return True
    return CANDIDATE in (settings.get("model", CANDIDATE), settings.get("versus"))


def _factory(head: _Head, known: tuple[str, ...]) -> Callable[..., Detector]:
    """Return what makes the detector that a rule names."""
    if (head.measure is None) == (head.detector is None):
        raise UsageError("a rule names a measure or a detector, and one of them only", "measure = 'accuracy'")
    if head.measure is not None:
        named = [*BUILT_IN, *dict.fromkeys((*SHARPNESS, *known))]
        if head.measure not in named:
            raise UsageError(f"{head.measure!r} is no measure", nearest(head.measure, named))
        return BUILT_IN.get(head.measure, SharpnessDetector)
    offered = {point.name: point for point in entry_points(group=GROUP)}
    name = head.detector or ""
    if name not in offered:
        raise UsageError(f"no installed package offers a detector {name!r}", nearest(name, offered))
    try:
        factory: Callable[..., Detector] = offered[name].load()
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"{offered[name].value} cannot be loaded: {error}", "see the package that offers it"
        ) from error
    return factory


def _detector(factory: Callable[..., Detector], settings: dict[str, Any], allowed: list[str]) -> Detector:
    """Return the detector with these settings; the types of a dataclass are checked."""
    for name in settings:
        if name not in allowed:
            raise UsageError(f"{name!r} is no key of this rule", nearest(name, [*allowed, *_HEAD]))
    if hasattr(factory, "__dataclass_fields__"):
        _check_numbers(factory, settings)
        made: Detector = _adapter(factory).validate_python(settings)
        return made
    try:
        inspect.signature(factory).bind(**settings)
    except TypeError as error:
        raise UsageError(
            f"the detector cannot be made: {error}", f"its keys: {', '.join(allowed) or 'none'}"
        ) from error
    return factory(**settings)


@cache
def _adapter(factory: Callable[..., Detector]) -> TypeAdapter[Any]:
    """Return what checks the types of a dataclass: making it takes a millisecond, and a gate may have thousands."""
    return TypeAdapter(cast(Any, factory))


def _check_numbers(factory: Callable[..., Detector], settings: Mapping[str, Any]) -> None:
    """Refuse true, false and text where a number is wanted: pydantic would read 1, 0, and "5" as 5."""
    for name, parameter in inspect.signature(factory).parameters.items():
        found, wanted = settings.get(name), str(parameter.annotation)
        if isinstance(found, bool) and "bool" not in wanted:
            raise UsageError(f"{name!r} is {str(found).lower()}", "a number")
        if isinstance(found, str) and _NUMBER.search(wanted) and not _TEXT.search(wanted):
            raise UsageError(f"{name!r} is the text {found!r}", "a number, without quotes")


def _fault(error: ValidationError, known: tuple[str, ...]) -> str:
    """Return the first fault in words."""
    fault = error.errors()[0]
    name = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return f"{name!r} is no key here; {nearest(name, known)}"
    if fault["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{name!r} is missing"
    return f"{name!r}: {fault['msg'][:1].lower()}{fault['msg'][1:]}, found {fault['input']!r}"
