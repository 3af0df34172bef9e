"""Two saved scans side by side: what differs in settings, accuracy, sharpness and verdicts. Needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sharpscope.detectors.intervals import independent, proportion
from sharpscope.errors import MismatchError, SharpscopeError
from sharpscope.result import ScanResult, check_opened
from sharpscope.stragglers.paired import Difference, difference
from sharpscope.table import Array, reach

ROUNDING = 1e-5  # relative: float32 sums in another order differ by this much without meaning it
_LAYER_KEYS = ["measure", "layer", "split", "alpha"]
_ALSO = ("granularity", "sharpscope", "provenance")  # of meta, beside what determines the numbers


@dataclass(frozen=True)
class Comparison:
    """What differs from the first scan to the second.

    Attributes
    ----------
    same_plan
        Whether weights, data, layers and all settings that determine the numbers are equal.
    same_images
        Whether sharpness was measured on the same images; else its changes hold what other images do, which the
        errors of probes do not cover.
    settings
        ``setting first second``, one row per setting that differs.
    layers
        ``measure layer split alpha first second change low high changed``: sharpness at every place that both
        measured. ``low high`` is the change's 95 % interval by the errors of both, taken as independent (bounds, of
        eigenvalues, are added); ``changed`` if it does not cover zero. One in twenty does so by chance.
    accuracy
        ``split alpha first second change low high paired changed`` in % and points; paired over images where both
        scans had the same.
    verdicts
        ``layer measure first second`` where the verdicts differ; None where one scan has none.
    recommended
        The alphas that the scans recommend, None where a scan recommends nothing.
    """

    same_plan: bool
    same_images: bool
    settings: pd.DataFrame
    layers: pd.DataFrame
    accuracy: pd.DataFrame
    verdicts: pd.DataFrame
    recommended: tuple[float | None, float | None]

    def to_json(self) -> str:
        """Return all of it as JSON; an unknown bound is null."""
        frames = {name: getattr(self, name) for name in ("settings", "layers", "accuracy", "verdicts")}
        found = {name: json.loads(frame.to_json(orient="records")) for name, frame in frames.items()}
        facts = {"same_plan": self.same_plan, "same_images": self.same_images, "recommended": list(self.recommended)}
        return json.dumps({**facts, **found}, indent=1, allow_nan=False)


def diff(first: ScanResult, second: ScanResult) -> Comparison:
    """Return what differs between two results.

    Raises
    ------
    UsageError, MismatchError
        If one is no result, or they share neither a measured layer nor an accuracy.

    Notes
    -----
    With the same seed both scans draw the same probes, so that their errors cancel in part: the intervals of
    ``layers`` are then too wide, never too narrow.
    """
    check_opened(first)
    check_opened(second)
    layers, accuracy = _layers(first, second), _accuracy(first, second)
    if layers.empty and accuracy.empty:
        raise MismatchError(
            "the two scans have no place in common: no layer with the same measure, data set and alpha",
            "scans of one architecture with common alphas and the same names of data sets",
        )
    return Comparison(
        same_plan=first.meta["plan"] == second.meta["plan"],
        same_images=_images(first) == _images(second),
        settings=_settings(first.meta, second.meta),
        layers=layers,
        accuracy=accuracy,
        verdicts=_verdicts(first, second),
        recommended=(_recommended(first), _recommended(second)),
    )


def _images(result: ScanResult) -> tuple[Any, ...]:
    """Return what decides which images sharpness was measured on."""
    facts = result.meta["splits"][result.curvature_split]
    plan = result.meta["plan"]
    drawn = facts["measured"] < facts["n"]
    return facts["fingerprint"], facts["measured"], plan.get("seed") if drawn else None


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> pd.DataFrame:
    rows = []
    for facts in (_plan, _besides):
        mine, theirs = facts(first), facts(second)
        names = dict.fromkeys([*mine, *theirs])
        rows += [(name, mine.get(name), theirs.get(name)) for name in names if mine.get(name) != theirs.get(name)]
    return pd.DataFrame(rows, columns=["setting", "first", "second"], dtype=object)


def _plan(meta: Mapping[str, Any]) -> dict[str, Any]:
    return dict(_flat(meta["plan"], ""))


def _besides(meta: Mapping[str, Any]) -> dict[str, Any]:
    names = {f"models.{role}": facts.get("name") for role, facts in meta.get("models", {}).items()}
    return {**names, **dict(_flat({key: meta.get(key) for key in _ALSO}, ""))}


def _layers(first: ScanResult, second: ScanResult) -> pd.DataFrame:
    found = first.layers.merge(second.layers, on=_LAYER_KEYS, suffixes=("_a", "_b"), sort=False)
    widths = [
        _joint(
            row.measure, reach(row.measure, row.stderr_a, row.draws_a), reach(row.measure, row.stderr_b, row.draws_b)
        )
        for row in found.itertuples()
    ]
    size = np.maximum(found["value_a"].abs(), found["value_b"].abs())
    width = np.maximum(np.array(widths, dtype=float), ROUNDING * size)
    found = found.rename(columns={"value_a": "first", "value_b": "second"})
    return _with_change(found[[*_LAYER_KEYS, "first", "second"]], width)


def _joint(measure: str, one: float, other: float) -> float:
    return one + other if "lambda" in measure else math.hypot(one, other)


def _with_change(found: pd.DataFrame, width: Any) -> pd.DataFrame:
    change = found["second"] - found["first"]
    low, high = change - width, change + width
    return found.assign(change=change, low=low, high=high, changed=(low > 0) | (high < 0))


def _accuracy(first: ScanResult, second: ScanResult) -> pd.DataFrame:
    mine, theirs = first.correct, second.correct
    rows = []
    for alpha, split in sorted(mine.keys() & theirs.keys(), key=lambda place: (place[1], place[0])):
        paired = first.meta["splits"][split]["fingerprint"] == second.meta["splits"][split]["fingerprint"]
        a, b = mine[alpha, split], theirs[alpha, split]
        gap = difference(b, a) if paired else unpaired(a, b)
        low, high = gap.interval
        numbers = (100 * float(x) for x in (a.mean(), b.mean(), gap.value, low, high))
        rows.append((split, alpha, *numbers, paired, gap.sign != 0))
    columns = ["split", "alpha", "first", "second", "change", "low", "high", "paired", "changed"]
    return pd.DataFrame(rows, columns=columns)


def unpaired(a: Array, b: Array) -> Difference:
    """Return the difference of two accuracies on different images, with Newcombe's interval (MOVER of Wilson's)."""
    return independent(proportion(b), proportion(a))


def _verdicts(first: ScanResult, second: ScanResult) -> pd.DataFrame:
    keys = ["layer", "measure"]
    mine, theirs = (result.stragglers[[*keys, "verdict"]].set_index(keys)["verdict"] for result in (first, second))
    places = [*mine.index, *(place for place in theirs.index if place not in mine.index)]
    rows = [(*place, mine.get(place), theirs.get(place)) for place in places]
    changed = [row for row in rows if row[2] != row[3]]
    return pd.DataFrame(changed, columns=[*keys, "first", "second"], dtype=object)


def _recommended(result: ScanResult) -> float | None:
    try:
        return result.recommend().alpha
    except SharpscopeError:
        return None
