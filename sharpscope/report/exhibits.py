"""The figures of the page: each with the one question it answers, and the answer in a sentence with the key number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sharpscope.report.curves import Grid, accuracy, heat_grid, layer_grid, mean_ood, measures
from sharpscope.report.health_figure import worst_cells
from sharpscope.report.verdict import Verdict, co_moving, verdict
from sharpscope.report.words import alpha_text, count, layer_name, measure_name, percent, significant, titled
from sharpscope.result import ScanResult


@dataclass(frozen=True)
class Exhibit:
    """One figure of the page: file name, section it stands in, title, question, answer (also its alternative text)."""

    name: str
    section: str
    title: str
    question: str
    answer: str
    figure: Any


def exhibits(result: ScanResult) -> Iterator[Exhibit]:
    """Yield the figures that the result has data for, in the order of the page."""
    plot, found = result.plot, verdict(result)
    yield Exhibit(
        "path",
        "path",
        "Accuracy and loss along the path",
        "Which alpha, and is there a barrier between the two models?",
        _path_answer(result, found),
        plot.path()[0].figure,
    )
    if result.ood_splits:
        yield Exhibit(
            "plane",
            "path",
            "OOD against ID accuracy",
            "Does a mix lie above both ends, or is ID accuracy bought with OOD accuracy?",
            _plane_answer(result, found),
            plot.plane().figure,
        )
    for measure in measures(result):
        yield from _of_measure(result, measure)
    if not result.stragglers.empty:
        yield Exhibit(
            "stragglers",
            "stragglers",
            "Co-movement by layer",
            "Whose sharpness rises and falls with the OOD error, and did those layers merely move most?",
            co_moving(result),
            plot.stragglers()[0].figure,
        )


def _of_measure(result: ScanResult, measure: str) -> Iterator[Exhibit]:
    name = titled(measure_name(measure))
    yield Exhibit(
        f"heatmap-{measure}",
        "sharpness",
        f"{name} by layer and alpha",
        "Where does sharpness grow along the path?",
        _heatmap_answer(heat_grid(result, measure)),
        result.plot.heatmap(measure)[0].figure,
    )
    if not _is_estimated(result, measure):
        return
    yield Exhibit(
        f"health-{measure}",
        "health",
        f"{name}: health of the estimates",
        "Are these estimates settled enough to be compared?",
        _health_answer(layer_grid(result, measure)),
        result.plot.health(measure)[0].figure,
    )


def _is_estimated(result: ScanResult, measure: str) -> bool:
    """Return whether draws or steps stand behind the measure; an exact one has no health to show."""
    return any(
        len(samples) > 1
        for cell in result.cells
        if cell.rows and cell.rows[0].measure == measure
        for samples in cell.arrays.values()
    )


def _path_answer(result: ScanResult, found: Verdict) -> str:
    target = mean_ood(result) if result.ood_splits else accuracy(result, result.id_split)
    name = "Mean OOD accuracy" if result.ood_splits else "ID accuracy"
    if not len(target.alpha):
        return f"{name} was not measured."
    best = int(np.argmax(target.value))
    ends = [f"{percent(target.at(alpha))} {word}" for alpha, word in ((0.0, "zero-shot"), (1.0, "fine-tuned"))]
    advice = f" Recommended: alpha {alpha_text(found.recommendation.alpha)}." if found.recommendation else ""
    return (
        f"{name} over all images is highest at alpha {alpha_text(target.alpha[best])} with "
        f"{percent(float(target.value[best]))}, against {' and '.join(ends)}.{advice}"
    )


def _plane_answer(result: ScanResult, found: Verdict) -> str:
    across, up = accuracy(result, result.id_split), mean_ood(result)
    chosen = found.recommendation.alpha if found.recommendation else None
    places = dict.fromkeys([0.0, *([chosen] if chosen is not None else []), 1.0])
    shown = [f"{percent(across.at(a))} ID and {percent(up.at(a))} mean OOD at alpha {alpha_text(a)}" for a in places]
    return f"The path passes {', '.join(shown)}."


def _heatmap_answer(grid: Grid) -> str:
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


def _health_answer(grid: Grid) -> str:
    layer, alpha, error = worst_cells(grid)[0]
    unsure = int(grid.unsure.sum())
    share = f"{unsure} of {count(int(grid.measured.sum()), 'value')} did not converge or have an error above 30 %"
    return f"{share}. Least certain: {layer_name(layer)} at alpha {alpha_text(alpha)}, relative error {percent(error)}."
