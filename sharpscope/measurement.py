"""The loop of a scan: cells of one alpha after the other, each written as it is finished."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from sharpscope.apart import SETUP, Apart, Task, kind_of
from sharpscope.backoff import that_fit
from sharpscope.curvature.estimate import Estimate
from sharpscope.curvature.point import Point
from sharpscope.data import Split
from sharpscope.errors import MeasurementError
from sharpscope.evaluate import evaluation_cell, per_example
from sharpscope.intervention import Interventions
from sharpscope.job import Job
from sharpscope.journal import Journal
from sharpscope.losses import cross_entropy
from sharpscope.measures import Measure
from sharpscope.memory import Memory
from sharpscope.objective import check_finite
from sharpscope.plan import Plan, path_notes
from sharpscope.progress import Progress
from sharpscope.search import RecipeSearch, Search
from sharpscope.table import MODEL, Cell, Row, cell_key
from sharpscope.tree import Tree

_SATURATED = 1e-6  # mean cross-entropy; there float32 has lambda_max off by .2 %, at 1e-7 m-sharpness by 3 %


def _evaluate(job: Job, weights: Tree, alpha: float, split: Split) -> Cell:
    batches = job.batches(split, job.team)
    examples = per_example(job.network.forward, weights, batches, job.columns(split), job.team)
    _check_loss(float(examples["loss"].mean()), weights, alpha, split.name)
    return evaluation_cell(alpha, split.name, examples)


def _check_loss(loss: float, weights: Tree, alpha: float, split: str) -> None:
    """Raise for a loss that is not finite; beyond the two models a variance on the path may have gone below zero."""
    try:
        check_finite(loss, f"alpha {alpha:g} on {split!r}")
    except MeasurementError as fault:
        variances = {name: float(w.min()) for name, w in weights.items() if name.endswith("running_var")}
        lowest = min(variances, key=variances.__getitem__, default="")
        if 0 <= alpha <= 1 or not variances.get(lowest, 0.0) < 0:
            raise
        raise MeasurementError(
            f"{fault.problem}: extrapolated beyond the two models, the running variance {lowest!r} goes down to "
            f"{variances[lowest]:.3g} there",
            "alphas from 0 to 1, or so near to them that no running variance is negative",
        ) from fault


def _curvature_cell(alpha: float, split: str, measure: str, found: Mapping[str, Estimate]) -> Cell:
    rows = tuple(
        Row(alpha, layer, split, measure, e.value, e.stderr, e.draws, e.converged) for layer, e in found.items()
    )
    return Cell(cell_key(alpha, split, measure), rows, {layer: e.samples for layer, e in found.items()})


def _measure(job: Job, plan: Plan, point: Point, measure: Measure, alpha: float, tick: Any) -> Cell:
    found = {}
    try:
        for layer, estimate in measure(point, job.layers, plan.seed):
            found[layer] = estimate
            tick(measure.name, layer)
    except ValueError:  # of NaN, by numpy too; what needs no derivatives is measured without them
        point.check_finite(f"alpha {alpha:g} on {job.curvature_split!r}")
        raise
    ordered = {layer: found[layer] for layer in (*job.layers.layers, MODEL) if layer in found}
    return _curvature_cell(alpha, job.curvature_split, measure.name, ordered)


@contextmanager
def _timed(spent: dict[str, float], kind: str) -> Iterator[None]:
    begun = time.monotonic()
    yield
    spent[kind] = time.monotonic() - begun


def _kinds(job: Job, plan: Plan) -> dict[str, Split | Measure]:
    """Return what is found at every alpha, in this order."""
    evaluations = {kind_of(cell_key(0, split.name, "evaluation")): split for split in job.splits}
    return evaluations | {kind_of(cell_key(0, job.curvature_split, m.name)): m for m in plan.measures}


def _cells_at(job: Job, plan: Plan, task: Task, memory: Memory, tick: Any, spent: dict[str, float]) -> Iterator[Cell]:
    """Yield the cells of a task; what each took goes to ``spent``."""
    alpha, point = plan.alphas[task.index], None
    weights, kinds = job.weights(alpha), _kinds(job, plan)
    for kind in filter(task.claims, task.kinds):
        what = kinds[kind]
        if isinstance(what, Split):
            with _timed(spent, kind):
                cell = _evaluate(job, weights, alpha, what)
            tick("evaluation", what.name)
            yield cell
            continue
        if point is None:
            with _timed(spent, SETUP):
                point = _point(job, plan, task, weights, memory)
        known = len(point.found)
        with _timed(spent, kind):
            cell = _measure(job, plan, point, what, alpha, tick)
            if len(point.found) > known:
                memory.bound.add(kind)
                if not plan.ends(task.index):
                    memory.keep(task.index, point.found, plan.first(task.index))
        job.count(point)
        yield cell


def _point(job: Job, plan: Plan, task: Task, weights: Tree, memory: Memory) -> Point:
    """Return the alpha as a point that knows what the alphas before left."""
    alpha, index = plan.alphas[task.index], task.index
    knows = task.at_home and not plan.begins(index)
    point = Point(
        job.objective,
        weights,
        job.layers.names,
        graph_bytes=job.room(),
        memory=memory.before(index, weights, plan.stride(index)) if knows else {},
        delta=job.path.delta,
        workspace=job.workspace,
    )
    _check_loss(point.loss, weights, alpha, job.curvature_split)
    _warn_of_rounding(job, plan, point, alpha)
    if task.at_home:
        point.found.update(memory.at(index, weights))  # of measures that were done before the scan was stopped here
    return point


def _warn_of_rounding(job: Job, plan: Plan, point: Point, alpha: float) -> None:
    """Say once where softmax rounds to 1: there float32 has gradient and Hessian wrong, and no residual shows it."""
    said = f"in float32 probabilities round to 1 where the loss is below {_SATURATED:g}"
    single = point.weights[job.layers.names[0]].dtype == torch.float32
    told = any(warning.startswith(said) for warning in job.warnings)
    if plan.loss is cross_entropy and single and point.loss < _SATURATED and not told:
        job.warnings.append(
            f"{said} (at alpha {alpha:g} it is {point.loss:.1g}): sharpness there is off by more than its stated "
            "error, and right with both models in float64, model.double()"
        )


def _by_alpha(
    job: Job, plan: Plan, journal: Journal, memory: Memory, progress: Progress
) -> Iterator[tuple[int, Iterator[Cell]]]:
    """Yield every alpha with the cells of it that are not in the journal."""

    def wanted(index: int) -> tuple[str, ...]:
        alpha = f"{plan.alphas[index]!r}|"
        return tuple(kind for kind in _kinds(job, plan) if alpha + kind not in journal)

    def measured(task: Task, spent: dict[str, float]) -> Iterator[Cell]:
        def at() -> Iterator[Cell]:
            left = wanted(task.index)
            missing = replace(task, kinds=tuple(kind for kind in task.kinds if kind in left))
            return _cells_at(job, plan, missing, memory, partial(progress.step, task.index), spent)

        # Ranks that gather weights wait for each other within a product: there, running out of memory ends the scan.
        fits = job.parallel != "weights"
        return that_fit(job, at, f"alpha {plan.alphas[task.index]:g}", progress.say) if fits else at()

    every = {index: wanted(index) for indices in plan.rounds for index in indices}
    if job.parallel == "alphas" and job.ranks.size > 1:
        homes = {i: chain % job.ranks.size for indices in plan.rounds for chain, i in enumerate(indices)}
        yield from Apart(job.ranks, measured, memory, every, homes).found()
    else:
        yield from ((index, measured(Task(index, kinds), {})) for index, kinds in every.items())


def cells(job: Job, plan: Plan, journal: Journal, memory: Memory, progress: Progress) -> Iterator[Cell]:
    """Yield every cell of the plan as it is finished; those in the journal are not measured again.

    Each is written as soon as the vectors that it came with are.

    Raises
    ------
    MeasurementError
        After all others, if alphas could not be measured.
    """
    faults: dict[float, MeasurementError] = {}
    journal.follow(memory.settled)
    try:
        for index, found in _by_alpha(job, plan, journal, memory, progress):
            alpha = plan.alphas[index]
            try:
                for cell in found:
                    journal.append(cell)
                    yield cell
            except MeasurementError as fault:
                faults[alpha] = fault
                progress.say(f"alpha {alpha:g} failed: {fault.problem}")
            else:
                progress.alpha_done(index, alpha)
    finally:
        memory.settled(wait=True)
        journal.write()
    if faults:
        raise _unmeasured(faults, plan, journal) from next(iter(faults.values()))


def _unmeasured(faults: Mapping[float, MeasurementError], plan: Plan, journal: Journal) -> MeasurementError:
    """Return what is said of alphas without usable numbers; the others are finished by then."""
    first, others = next(iter(faults.values())), len(plan.alphas) - len(faults)
    listed = ", ".join(f"{alpha:g}" for alpha in faults)
    kept = f", {others} are" + (f" and kept in {journal.path}" if journal.path else "") if others else ""
    return MeasurementError(
        f"{first.problem}; {len(faults)} of {len(plan.alphas)} alphas ({listed}) could not be measured{kept}", first.fix
    )


def measured(
    job: Job,
    plan: Plan,
    moves: Interventions | None,
    recipes: RecipeSearch | None,
    journal: Journal,
    memory: Memory,
    show: bool | None,
) -> dict[str, Any]:
    """Bring the journal to completion, with progress: the path, interventions, recipes. Return what the latter were."""
    steps = len(plan.alphas) * (len(job.splits) + len(plan.measures) * (len(job.layers.layers) + 1))
    steps += moves.steps(job) if moves else 0
    steps += recipes.evaluations * len(job.splits) if recipes else 0
    with Progress(steps, len(plan.alphas), show) as bar:
        bar.say("\n".join([job.describe(plan, len(journal)), *(f"  note: {n}" for n in path_notes(plan.alphas))]))
        for _ in cells(job, plan, journal, memory, bar):
            pass
        job.workspace.clear()
        if moves:
            bar.say(moves.describe(job))
            for cell in moves.cells(job, plan, journal, bar.count):
                journal.append(cell)
        tried = None
        if recipes:
            bar.say(f"recipes: at most {recipes.evaluations} are tried on all images")
            search = Search(recipes, job, plan, journal, bar.count)
            for cell in search.cells():
                journal.append(cell)
            tried = search.meta()
    return {"interventions": moves.meta(job, plan, journal) if moves else None, "recipes": tried}
