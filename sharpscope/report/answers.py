"""The sentence under each figure with its key number, also its alternative text."""

from __future__ import annotations

import numpy as np
import pandas as pd

from sharpscope.report.agreement_figure import agreement
from sharpscope.report.choices import best_recipe, quoted
from sharpscope.report.curves import Grid, accuracy, heat_grid, layer_grid, mean_ood
from sharpscope.report.distance_figure import ways
from sharpscope.report.health_figure import worst_cells
from sharpscope.report.multiples_figure import FLAGS, flagged
from sharpscope.report.verdict import Verdict, per_layer_sentence
from sharpscope.report.words import (
    MINUS,
    alpha_text,
    count,
    interval,
    layer_label,
    layer_name,
    listed,
    measure_name,
    percent,
    points,
    shortened,
    significant,
)
from sharpscope.result import ScanResult
from sharpscope.stragglers.effects import MEAN_OOD
from sharpscope.stragglers.paired import Difference
from sharpscope.stragglers.standing import NECESSARY
from sharpscope.table import MODEL


def path_answer(result: ScanResult, found: Verdict) -> str:
    """Return where accuracy is highest, against both ends."""
    target = mean_ood(result) if result.ood_splits else accuracy(result, result.id_split)
    name = "Mean OOD accuracy" if result.ood_splits else "ID accuracy"
    if not len(target.alpha):
        return f"{name} was not measured."
    best = int(np.argmax(target.value))
    known = [(alpha, word) for alpha, word in ((0.0, "zero-shot"), (1.0, "fine-tuned")) if alpha in target.alpha]
    ends = [f"{percent(target.at(alpha))} {word}" for alpha, word in known]
    against = f", against {' and '.join(ends)}" if ends else ""
    advice = f" Recommended: alpha {alpha_text(found.recommendation.alpha)}." if found.recommendation else ""
    return (
        f"{name} over all images is highest at alpha {alpha_text(target.alpha[best])} with "
        f"{percent(float(target.value[best]))}{against}.{advice}"
    )


def plane_answer(result: ScanResult, found: Verdict) -> str:
    """Return ID and OOD accuracy at the ends and the recommended alpha, or at the first and the last alpha."""
    across, up = accuracy(result, result.id_split), mean_ood(result)
    chosen = found.recommendation.alpha if found.recommendation else None
    measured = [float(a) for a in up.alpha if a in across.alpha]
    if not measured:
        return "Nowhere on the path were ID and all OOD sets evaluated."
    first, last = (end if end in measured else other for end, other in ((0.0, measured[0]), (1.0, measured[-1])))
    places = dict.fromkeys([first, *([chosen] if chosen is not None else []), last])
    shown = [f"{percent(across.at(a))} ID and {percent(up.at(a))} mean OOD at alpha {alpha_text(a)}" for a in places]
    return f"The path passes {', '.join(shown)}."


def heatmap_answer(result: ScanResult, measure: str) -> str:
    """Return the layer that grows most between the ends."""
    grid = heat_grid(result, measure)
    left_out = _unsure_count(grid)
    ends = {grid.alphas[0], grid.alphas[-1]}
    if ends != {0.0, 1.0}:
        return left_out
    first, last = grid.value[:, 0], grid.value[:, -1]
    sure = ~(grid.unsure[:, 0] | grid.unsure[:, -1]) & (first > 0) & (last > 0)
    if not sure.any():
        return f"No layer is known well enough at both ends to be compared. {left_out}"
    ratio = np.where(sure, last / np.where(sure, first, 1), 0)
    top = int(ratio.argmax())
    growth = f"×{significant(float(ratio[top]), 2)} from zero-shot to fine-tuned"
    word = "grows most" if ratio[top] > 1 else "shrinks least (no layer grows)"
    return f"{layer_name(grid.layers[top])} {word}: {growth}. {left_out}"


def _unsure_count(grid: Grid) -> str:
    missing = int((~grid.measured.any(axis=1)).sum())
    end = f"; {count(missing, 'layer')} not measured" if missing else ""
    return f"{int(grid.unsure.sum())} of {count(int(grid.measured.sum()), 'value')} unsure (hatched){end}."


def health_answer(result: ScanResult, measure: str) -> str:
    """Return how many estimates are unsure and the least certain one."""
    grid = layer_grid(result, measure)
    layer, alpha, error = worst_cells(grid)[0]
    share = f"{int(grid.unsure.sum())} of {count(int(grid.measured.sum()), 'value')} did not converge or have an error"
    worst = f"Least certain: {layer_name(layer)} at alpha {alpha_text(alpha)}, relative error {percent(error)}."
    return f"{share} above 30 %. {worst}{_summed(result, grid)}"


def _summed(result: ScanResult, grid: Grid) -> str:
    own = [
        len(cell.arrays.get(MODEL, ())) for cell in result.cells if cell.rows and cell.rows[0].measure == grid.measure
    ]
    if MODEL not in grid.layers or any(own):
        return ""
    return " The whole model is the sum of its layers, whose probes are not the same, so it has no line of its own."


def multiples_answer(result: ScanResult) -> str:
    """Return which layers are drawn and why."""
    rows = flagged(result)
    taus = (f"{row.tau:.2f}".replace("-", MINUS) for row in rows.itertuples())
    named = listed(f"{layer_label(layer)} (tau {tau})" for layer, tau in zip(rows["layer"], taus, strict=True))
    if rows["verdict"].isin(FLAGS).any():
        return f"Beyond chance: {named}. A curve that bends where the error bends says more than two end points."
    return f"No layer is beyond chance; with the largest tau: {named}."


def intervention_answer(result: ScanResult) -> str:
    """Return the largest effect that is off zero and beats its control."""
    frame = result.interventions
    target = MEAN_OOD if (frame["split"] == MEAN_OOD).any() else result.id_split
    name = "mean OOD" if target == MEAN_OOD else "ID"
    aimed = frame[frame["split"] == target]
    shown = aimed[aimed["supported"].astype(bool)]
    if shown.empty:
        return (
            f"None of {count(len(aimed), 'move')} changes {name} accuracy by more than chance and its random control."
        )
    top = shown.loc[shown["effect"].abs().idxmax()]
    way = "back to zero-shot" if top["question"] == NECESSARY else "to fine-tuned"
    found = Difference(*(float(top[key]) / 100 for key in ("effect", "low", "high")))
    return (
        f"{len(shown)} of {count(len(aimed), 'move')} count{'s' if len(shown) == 1 else ''}. Largest: "
        f"{layer_name(str(top['layer']))} {way} in base {top['base']} changes {name} accuracy by {points(found.value)} "
        f"points ({interval(found)}), random moves as long by {points(float(top['control']) / 100)}."
    )


def recipe_answer(result: ScanResult) -> str:
    """Return how far the best recipe is from uniform, and whether it is better."""
    advice, recipe, _ = best_recipe(result)
    alphas = recipe.alphas(list(result.meta["layers"]))
    low, high = min(advice.ties), max(advice.ties)
    outside = sum(not low <= alpha <= high for alpha in alphas.values())
    return f"{outside} of {count(len(alphas), 'layer')} leave the range within noise. {per_layer_sentence(result)}"


def pareto_answer(result: ScanResult) -> str:
    """Return ID and OOD accuracy of what may be quoted."""
    parts = [
        f"{words} ({shortened(str(row['recipe']))}) {row['id']:.1f} % ID and {row['ood']:.1f} % mean OOD"
        for words, row in quoted(result.recipes)
    ]
    tried = "1 mix" if len(result.recipes) == 1 else f"{len(result.recipes):,} mixes"
    return f"{tried} tried: {'; '.join(parts)}."


def distance_answer(result: ScanResult) -> str:
    """Return the layer in which distance and curvature together weigh most."""
    found = ways(result)
    top = int(np.abs(found.rise).argmax())
    return (
        f"Distance and curvature together weigh most in {layer_name(found.layers[top])}: moved "
        f"{significant(float(found.distance[top]))}, half of curvature times distance squared is "
        f"{significant(float(found.rise[top]))} at alpha {alpha_text(found.alpha)}."
    )


def agreement_answer(result: ScanResult) -> str:
    """Return the pair of measures that agree least."""
    found = agreement(result)
    least = found.loc[found["tau"].idxmin()]
    return f"Least alike: {_pair(least)}, over {count(int(least['layers']), 'layer')}."


def _pair(row: pd.Series) -> str:
    numbers = f"tau {row['tau']:.2f} ({row['low']:.2f} to {row['high']:.2f})".replace("-", MINUS)
    return f"{measure_name(str(row['first']))} and {measure_name(str(row['second']))}, {numbers}"
