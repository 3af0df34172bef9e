"""Whether it depends on the definition: every variant of sharpness, on training and on held-out images."""

from __future__ import annotations

from typing import Any

from across import GIVEN, Across
from rows import LAYERS, MODEL


def variants(found: dict[tuple[str, bool], Across]) -> list[dict[str, object]]:
    """Return, for every variant and data, global tau raw and held and the largest layer's held, in both pools."""
    names = sorted(
        {(on, measure) for on, measure, _ in found["A", True].columns}, key=lambda key: (key[0] != "train", key[1])
    )
    table = []
    for on, measure in names:
        row: dict[str, object] = {"on": on, "measure": measure}
        for pool in GIVEN:
            row[f"{pool} raw"] = found[pool, False].effect((on, measure, MODEL))
            held = found[pool, True]
            row[f"{pool} held"] = held.effect((on, measure, MODEL))
            taus = {la: float(held.every[:, held.columns.index((on, measure, la))].mean()) for la in LAYERS}
            row[f"{pool} best"] = max(taus, key=lambda layer: abs(taus[layer]))
            row[f"{pool} best tau"] = taus[row[f"{pool} best"]]  # type: ignore[index]
        table.append(row)
    return table


def definitions(table: list[dict[str, Any]]) -> dict[str, Any]:
    """How many variants agree, in each pool, on training and on held-out images."""
    found = {}
    for pool in "AB":
        for on in ("train", "heldout"):
            effects = {row["measure"]: row[f"{pool} raw"] for row in table if row["on"] == on}
            ordered = sorted(effects, key=lambda name: effects[name].value)
            found[pool, on] = {
                "n": len(effects),
                "up": sum(e.sign > 0 for e in effects.values()),
                "down": sum(e.sign < 0 for e in effects.values()),
                "least": (ordered[0], effects[ordered[0]]),
                "most": (ordered[-1], effects[ordered[-1]]),
            }
    return found
