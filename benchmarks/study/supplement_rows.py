"""Reads what `supplement.py` wrote: H3 on failed paths of the embedded base. Exploratory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rows import LAYERS, RESULTS
from scipy import stats

from sharpscope.stragglers.association import association

MIX = 0.5


def _mean(values: pd.Series) -> tuple[float, float, float]:
    """Return the mean over runs with Student's 95 % interval: one base, so nothing is said of others."""
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def failures(folder: Path = RESULTS) -> dict[str, Any]:
    """Return, over failed paths, sparsified less shrunk straggler and what each does to the mix, on half B."""
    paths, points, traces = (
        pd.read_csv(folder / f"supplement-{name}.csv.gz") for name in ("paths", "points", "traces")
    )
    ood = paths.set_index(["model", "alpha"])
    at = points.assign(layer=points["layer"].str.removeprefix("visual.")).set_index(
        ["model", "kind", "layer", "amount"]
    )["ood_b"]
    table = []
    for model, part in traces.groupby("model"):
        wide = part.pivot_table(index="layer", columns="alpha", values="value").loc[list(LAYERS)]
        taus = association(wide.to_numpy(), -ood.loc[model]["ood_a"].to_numpy()[None])[:, 0]
        own, base = LAYERS[int(taus.argmax())], ood.at[(model, MIX), "ood_b"]
        gaps = {layer: at[model, "sparse", layer, 0.9] - at[model, "layer", layer, 0.1] for layer in LAYERS}
        resets = {layer: at[model, "layer", layer, 0.0] - base for layer in LAYERS}
        best = max(resets, key=lambda layer: resets[layer])
        table.append(
            {
                "model": model,
                "layer": own,
                "tau": taus.max(),
                "gap": gaps[own],
                "any": float(np.mean(list(gaps.values()))),
                "sparse": at[model, "sparse", own, 0.9] - base,
                "shrunk": at[model, "layer", own, 0.1] - base,
                "zeroed": at[model, "zeroed", own, 0.5] - base,
                "reset": resets[own],
                "best": best,
                "best_reset": resets[best],
                "missing": ood.at[(model, 0.0), "ood_b"] - base,
            }
        )
    frame = pd.DataFrame(table)
    means = {
        name: _mean(frame[name])
        for name in ("gap", "any", "sparse", "shrunk", "zeroed", "reset", "best_reset", "missing")
    }
    return {
        "n": len(frame),
        "tried": paths["model"].nunique(),
        "means": means,
        "layers": frame["layer"].value_counts().to_dict(),
    }
