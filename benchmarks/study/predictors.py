"""H1 and H2 across models: global sharpness, and layers beside it."""

from __future__ import annotations

import numpy as np
from across import GIVEN, Across
from inference import LEVEL, holm, verdict
from rows import CONFIRMATORY, LAYERS, MODEL

SMALLEST = 0.2  # tau of interest


def global_sharpness(found: dict[tuple[str, bool], Across]) -> dict[str, object]:
    """Return H1 across models: six comparisons, their controls, and the verdict."""
    table = []
    for pool in GIVEN:
        raw, held = found[pool, False], found[pool, True]
        for measure in CONFIRMATORY:
            column = ("train", measure, MODEL)
            everywhere = dict.fromkeys(range(len(raw.cohorts)), raw.place(column))
            table.append(
                {
                    "pool": pool,
                    "measure": measure,
                    "raw": raw.effect(column),
                    "p": raw.p(everywhere),
                    "held": held.effect(column),
                    "held_chance": held.by_chance(column),
                }
            )
    for row, adjusted in zip(table, holm([row["p"] for row in table]), strict=True):
        row["p_holm"] = float(adjusted)
    against = any(r["p_holm"] <= LEVEL and abs(r["raw"].value) >= SMALLEST and r["raw"].agreed for r in table)
    equal = all(r["raw"].low > -SMALLEST and r["raw"].high < SMALLEST for r in table)
    covariates = {
        (pool, name): found[pool, False].effect(("covariate", name, MODEL))
        for pool in GIVEN
        for name in found[pool, False].rivals
    }
    rows, some = found["A", False].rows, (("A", 1, "trace"), ("A", 16, "trace"), ("B", 16, "m_sharpness"))
    within = {(pool, k): Across(rows, pool, False, k).effect(("train", m, MODEL)) for pool, k, m in some}
    return {"table": table, "covariates": covariates, "within": within, "verdict": verdict(equal, against)}


def layers(found: dict[tuple[str, bool], Across]) -> dict[str, object]:
    """Return H2 across models: six comparisons, each beside global sharpness and the other layers."""
    table = []
    for pool in GIVEN:
        held = found[pool, True]
        for measure in CONFIRMATORY:
            chosen, whole = held.best_elsewhere(measure), held.place(("train", measure, MODEL))
            others = np.mean(
                [
                    [
                        held.taus[b, held.place(("train", measure, layer))]
                        for layer in LAYERS
                        if held.place(("train", measure, layer)) != place
                    ]
                    for b, place in chosen.items()
                ]
            )
            table.append(
                {
                    "pool": pool,
                    "measure": measure,
                    "layers": [held.columns[held.tested[place]][2] for place in chosen.values()],
                    "tau": held.quoted(chosen),
                    "p": held.p(chosen, sided=1),
                    "global": held.effect(("train", measure, MODEL)),
                    "beyond": held.quoted(chosen, less=whole),
                    "others": float(others),
                    "chance": float(np.mean([held.chance[b][place].mean() for b, place in chosen.items()])),
                }
            )
    for row, adjusted in zip(table, holm([row["p"] for row in table]), strict=True):
        row["p_holm"] = float(adjusted)

    def holds(row: dict) -> bool:
        good = row["p_holm"] <= LEVEL and row["tau"].value >= SMALLEST and min(row["tau"].by_base) > 0
        return bool(good and row["beyond"].low > 0)

    nothing = all(row["tau"].high < SMALLEST for row in table)
    return {"table": table, "verdict": verdict(any(map(holds, table)), nothing)}
