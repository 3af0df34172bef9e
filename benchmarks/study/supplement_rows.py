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
    """Return, over failed paths, sparsified less shrunk straggler and what each does to the mix; empty without rows."""
    files = {name: folder / f"supplement-{name}.csv.gz" for name in ("paths", "points", "traces")}
    if not all(file.exists() for file in files.values()):
        return {}
    paths, points, traces = (pd.read_csv(file) for file in files.values())
    ood = paths.set_index(["model", "alpha"])
    points["layer"] = points["layer"].str.removeprefix("visual.")
    at = points.set_index(["model", "kind", "layer", "amount"])["ood_b"]
    failed = {str(model): part for model, part in traces.groupby("model")}
    frame = pd.DataFrame([_changes(at.loc[m], ood.loc[m], part) for m, part in failed.items()])
    means = {name: _mean(frame[name]) for name in frame.columns.drop("layer")}
    layers = frame["layer"].value_counts().to_dict()
    return {"n": len(frame), "tried": paths["model"].nunique(), "means": means, "layers": layers}


def _changes(at: pd.Series, ood: pd.DataFrame, trace: pd.DataFrame) -> dict[str, Any]:
    """Return points of half B's OOD accuracy at alpha .5 that a change of the path's straggler makes."""
    wide = trace.pivot_table(index="layer", columns="alpha", values="value").loc[list(LAYERS)]
    own = LAYERS[int(association(wide.to_numpy(), -ood["ood_a"].to_numpy()[None])[:, 0].argmax())]
    base = float(ood.at[MIX, "ood_b"])
    gaps = {layer: at["sparse", layer, 0.9] - at["layer", layer, 0.1] for layer in LAYERS}
    return {
        "layer": own,
        "gap": gaps[own],
        "any": float(np.mean(list(gaps.values()))),
        "sparse": at["sparse", own, 0.9] - base,
        "reset": at["layer", own, 0.0] - base,
        "best_reset": max(at["layer", layer, 0.0] for layer in LAYERS) - base,
        "missing": float(ood.at[0.0, "ood_b"]) - base,
    }
