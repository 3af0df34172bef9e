"""Recipes as TOML files that people read, edit and keep beside the checkpoint they made. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sharpscope.errors import UsageError
from sharpscope.home import at_home
from sharpscope.journal import replace_text
from sharpscope.partition import GRANULARITIES, Granularity
from sharpscope.recipe import CONVENTION, Recipe
from sharpscope.toml import read_toml, toml

NAME = "recipe.toml"
_HEAD = "# An alpha per layer: the first rule whose pattern matches a layer's id wins; the last is '*'."
_FIX = f'e.g.\n    alpha_convention = "{CONVENTION}"\n    rules = [["visual.block.1*", 0.0], ["*", 0.5]]'
_KEYS = ("alpha_convention", "granularity", "rules", "predicted", "sources")

Interval = tuple[float, float]


@dataclass(frozen=True)
class RecipeFile:
    """A recipe with what must be known to use it.

    Attributes
    ----------
    recipe
        Layer patterns and alphas.
    granularity
        What its layer ids are ids of.
    predicted
        Name of a data set -> interval, in %, that the accuracy of the merged model is expected in.
    sources
        What the recipe was found on or merged from, for the record: names and hashes.
    """

    recipe: Recipe
    granularity: Granularity = "block"
    predicted: Mapping[str, Interval] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """Return the TOML that :func:`read_recipe` reads back to an equal value."""
        lines = [_HEAD, f"alpha_convention = {toml(CONVENTION)}", f"granularity = {toml(self.granularity)}"]
        lines += [
            "rules = [",
            *(f"  [{toml(pattern)}, {float(alpha)!r}]," for pattern, alpha in self.recipe.rules),
            "]",
        ]
        if self.predicted:
            lines += ["", "[predicted]  # accuracy, %"]
            lines += [
                f"{toml(name)} = [{float(low)!r}, {float(high)!r}]" for name, (low, high) in self.predicted.items()
            ]
        if self.sources:
            lines += ["", "[sources]", *(f"{toml(name)} = {toml(value)}" for name, value in self.sources.items())]
        return "\n".join(lines) + "\n"


def write_recipe(stored: RecipeFile, path: str | Path) -> Path:
    """Write the recipe, whole or not at all; return its path."""
    replace_text(at_home(path), stored.text())
    return Path(path)


def read_recipe(path: str | Path) -> RecipeFile:
    """Return the recipe of a TOML file; ``path`` may be the folder of a merged checkpoint.

    Raises
    ------
    UsageError
        If there is none, or it is no recipe; the message names the culprit. A file that does not say which end
        alpha 0 is, or says it the other way round, is refused: it would merge backwards.
    """
    place = at_home(path)
    file = place / NAME if place.is_dir() else place
    stored = read_toml(file, "recipe at", f"recommended, a number, or a TOML file of rules, {_FIX}")
    if unknown := next((key for key in stored if key not in _KEYS), None):
        near = get_close_matches(unknown, _KEYS, n=1)
        raise UsageError(f"{file}: {unknown!r} is no key of a recipe", f"did you mean {near[0]!r}?" if near else _FIX)
    return _checked(file, stored)


def _checked(file: Path, stored: Mapping[str, Any]) -> RecipeFile:
    convention, granularity = stored.get("alpha_convention"), stored.get("granularity", "block")
    if convention != CONVENTION:
        found = "does not say which end alpha 0 is" if convention is None else f"has alpha_convention {convention!r}"
        raise UsageError(f"{file} {found}", f'alpha_convention = "{CONVENTION}"')
    if granularity not in GRANULARITIES:
        raise UsageError(f"{file}: granularity {granularity!r} is unknown", f"one of {', '.join(GRANULARITIES)}")
    rules = stored.get("rules")
    if not isinstance(rules, list) or not rules:
        raise UsageError(f"{file} has no rules", _FIX)
    try:
        recipe = Recipe(tuple(_rule(rule) for rule in rules))
    except UsageError as error:
        raise UsageError(f"{file}: {error.problem}", error.fix) from error
    predicted = {name: _interval(file, name, found) for name, found in _table(file, stored, "predicted").items()}
    sources = {name: str(value) for name, value in _table(file, stored, "sources").items()}
    return RecipeFile(recipe, granularity, predicted, sources)


def _table(file: Path, stored: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = stored.get(name, {})
    if not isinstance(found, dict):
        raise UsageError(f"{file}: {name} is {found!r}, not a table", f"[{name}]")
    return found


def _rule(found: Any) -> tuple[str, float]:
    if not isinstance(found, list) or len(found) != 2 or not isinstance(found[0], str) or not _is_number(found[1]):
        raise UsageError(f"rule {found!r} is no pair of a pattern and an alpha", _FIX)
    return found[0], float(found[1])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _interval(file: Path, name: str, found: Any) -> Interval:
    ends = found if isinstance(found, list) and len(found) == 2 and all(map(_is_number, found)) else (math.nan,) * 2
    if not 0 <= ends[0] <= ends[1] <= 100:
        raise UsageError(f"{file}: predicted {name!r} is {found!r}", "two accuracies in %, the lower first")
    return float(ends[0]), float(ends[1])
