"""The figures of the page: each with the one question it answers, and the answer in a sentence with the key number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.axes import Axes

from sharpscope.errors import UsageError
from sharpscope.optim.activity import Audit
from sharpscope.report import answers
from sharpscope.report.activity_figure import activity_answer
from sharpscope.report.curves import measures
from sharpscope.report.verdict import co_moving, verdict
from sharpscope.report.words import measure_name, titled
from sharpscope.result import ScanResult

SECTIONS = ("path", "stragglers", "recipe", "sharpness", "health", "training")


@dataclass(frozen=True)
class Exhibit:
    """One figure of the page.

    Attributes
    ----------
    name
        Of its file.
    section
        One of :data:`SECTIONS`.
    title, question
        The question is the one that the figure answers.
    answer
        With the key number, also the alternative text. Where there is no figure: why, and how to get it.
    figure
        None if the scan does not hold what it shows.
    """

    name: str
    section: str
    title: str
    question: str
    answer: str
    figure: Any | None


Source = tuple[Callable[[], Any], Callable[[], str]]  #: draws the figure, says the answer
ABOUT = {  #: section, title, question
    "path": ("path", "Accuracy and loss along the path", "Which alpha, and is there a barrier between the two models?"),
    "plane": (
        "path",
        "OOD against ID accuracy",
        "Does a mix lie above both ends, or is ID accuracy bought with OOD accuracy?",
    ),
    "forest": (
        "stragglers",
        "Co-movement by layer",
        "Whose sharpness runs with the OOD error by more than chance, and did those layers merely move most?",
    ),
    "multiples": (
        "stragglers",
        "The curves behind the flags",
        "Do the two curves bend together, or do only their end points agree?",
    ),
    "interventions": (
        "stragglers",
        "One layer moved alone",
        "Does the layer itself change OOD accuracy, more than a random move as long?",
    ),
    "recipe": ("recipe", "Alpha by layer", "Which layers would get another alpha than the rest?"),
    "pareto": ("recipe", "ID against OOD accuracy of all that was tried", "Is an alpha per layer worth it?"),
    "heatmap": ("sharpness", "{} by layer and alpha", "Where does sharpness grow along the path?"),
    "distance": ("sharpness", "Distance against curvature", "Did a layer move far, or along a curved way?"),
    "agreement": (
        "sharpness",
        "Agreement of the measures",
        "Does it depend on the measure which layers are sharp?",
    ),
    "health": ("health", "{}: health of the estimates", "Are these estimates settled enough to be compared?"),
    "activity": (
        "training",
        "What Selective Projection Decay held back",
        "Did the projection act, and in the layers where it should?",
    ),
}


def exhibits(result: ScanResult, audit: Audit | None = None) -> Iterator[Exhibit]:
    """Yield the figures in the order of the page; ``audit`` is the log of an SPD training."""
    for name, source in _of_decisions(result).items():
        yield _exhibit(name, "", source)
    for measure in measures(result):
        plot, say = result.plot, answers
        yield _exhibit(
            "heatmap", measure, (partial(plot.heatmap, measure), partial(say.heatmap_answer, result, measure))
        )
        if _is_estimated(result, measure):
            source = (partial(plot.health, measure), partial(say.health_answer, result, measure))
            yield _exhibit("health", measure, source)
    for name, source in _of_measures(result).items():
        yield _exhibit(name, "", source)
    if audit is not None:
        yield _exhibit("activity", "", (partial(result.plot.activity, audit), partial(activity_answer, audit)))


def _of_decisions(result: ScanResult) -> dict[str, Source]:
    plot, found = result.plot, verdict(result)
    return {
        "path": (plot.path, partial(answers.path_answer, result, found)),
        "plane": (plot.plane, partial(answers.plane_answer, result, found)),
        "forest": (plot.forest, partial(co_moving, result)),
        "multiples": (plot.multiples, partial(answers.multiples_answer, result)),
        "interventions": (plot.interventions, partial(answers.intervention_answer, result)),
        "recipe": (plot.recipe, partial(answers.recipe_answer, result)),
        "pareto": (plot.pareto, partial(answers.pareto_answer, result)),
    }


def _of_measures(result: ScanResult) -> dict[str, Source]:
    return {
        "distance": (result.plot.distance, partial(answers.distance_answer, result)),
        "agreement": (result.plot.agreement, partial(answers.agreement_answer, result)),
    }


def _exhibit(name: str, measure: str, source: Source) -> Exhibit:
    section, title, question = ABOUT[name]
    title, file = title.format(titled(measure_name(measure))), f"{name}-{measure}" if measure else name
    draw, say = source
    try:
        made = draw()
    except UsageError as trouble:  # a scan without what the figure shows; the error says how to get it
        return Exhibit(file, section, title, question, f"{titled(trouble.problem)}. To see it: {trouble.fix}.", None)
    first = made if isinstance(made, Axes) else made[0]
    return Exhibit(file, section, title, question, say(), first.figure)


def _is_estimated(result: ScanResult, measure: str) -> bool:
    """Return whether draws or steps stand behind the measure; an exact one has no health to show."""
    return any(
        len(samples) > 1
        for cell in result.cells
        if cell.rows and cell.rows[0].measure == measure
        for samples in cell.arrays.values()
    )
