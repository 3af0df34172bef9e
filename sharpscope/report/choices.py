"""What the report says of recipes with an alpha per layer. Needs no matplotlib: summaries in text use it too."""

from __future__ import annotations

import pandas as pd

from sharpscope.errors import UsageError
from sharpscope.recipe import Recipe
from sharpscope.result import ScanResult
from sharpscope.stragglers.paired import Difference
from sharpscope.stragglers.recommendation import Recommendation

HOW = "run it again with --recipes (recipes=True in scan): mixes with an alpha per layer are then tried"


def searched(result: ScanResult) -> bool:
    """Return whether mixes other than uniform ones were tried."""
    return bool(result.meta.get("recipes")) and bool((result.recipes["kind"] != "uniform").any())


def best_recipe(result: ScanResult) -> tuple[Recommendation, Recipe, Difference]:
    """Return the recommendation, the best recipe on the choosing half and its paired difference to the uniform alpha.

    Raises
    ------
    UsageError
        If no recipes were tried.
    """
    if not searched(result):
        raise UsageError("no recipes with an alpha per layer were tried in this scan", HOW)
    found = result.recommend(per_layer=True)
    assert found.per_layer is not None, "it was asked for"
    return (found, *found.per_layer)


def quoted(table: pd.DataFrame) -> list[tuple[str, pd.Series]]:
    """Return the rows that may be quoted, in words: the best uniform alpha on the choosing half, the recipe chosen."""
    uniform = table[table["kind"] == "uniform"]
    best = uniform.loc[uniform["score"].idxmax()]
    chosen = table[table["chosen"].astype(bool)].iloc[0]
    found = [("best uniform alpha", best)]
    return found if chosen["kind"] == "uniform" else [*found, ("recipe chosen", chosen)]
