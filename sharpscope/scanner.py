"""The scan: two models and data in, cells out, one alpha after the other, resumable."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path as FilePath
from typing import Any

from sharpscope.backoff import that_fit
from sharpscope.curvature.estimate import Estimate
from sharpscope.curvature.point import Point
from sharpscope.data import Split, as_split
from sharpscope.errors import MeasurementError
from sharpscope.evaluate import evaluation_cell, per_example
from sharpscope.intervention import Interventions, interventions_from
from sharpscope.journal import Journal
from sharpscope.losses import Loss, Towers, loss_from
from sharpscope.measures import DEFAULT, Measure, measures_from
from sharpscope.memory import Memory
from sharpscope.objective import check_finite
from sharpscope.partition import Granularity
from sharpscope.plan import Job, Plan, alphas_from, prepare
from sharpscope.precision import Precision, matmul_precision
from sharpscope.progress import Progress
from sharpscope.ranks import Parallel, Ranks, joined, parallel_from
from sharpscope.result import ScanResult
from sharpscope.search import RecipeSearch, Search, recipes_from
from sharpscope.storage import locked, writing
from sharpscope.table import MODEL, Cell, Row, cell_key
from sharpscope.tree import Tree


def _evaluate(job: Job, weights: Tree, alpha: float, split: Split) -> Cell:
    batches = job.batches(split, job.team)
    examples = per_example(job.network.forward, weights, batches, job.columns(split), job.team)
    check_finite(float(examples["loss"].mean()), f"alpha {alpha:g} on {split.name!r}")
    return evaluation_cell(alpha, split.name, examples)


def _curvature_cell(alpha: float, split: str, measure: str, found: Mapping[str, Estimate]) -> Cell:
    rows = tuple(
        Row(alpha, layer, split, measure, e.value, e.stderr, e.draws, e.converged) for layer, e in found.items()
    )
    return Cell(cell_key(alpha, split, measure), rows, {layer: e.samples for layer, e in found.items()})


def _measure(job: Job, plan: Plan, point: Point, measure: Measure, alpha: float, tick: Any) -> Cell:
    found = {}
    for layer, estimate in measure(point, job.layers, plan.seed):
        found[layer] = estimate
        tick(measure.name, layer)
    ordered = {layer: found[layer] for layer in (*job.layers.layers, MODEL) if layer in found}
    return _curvature_cell(alpha, job.curvature_split, measure.name, ordered)


def _cells_at(job: Job, plan: Plan, index: int, journal: Journal, memory: Memory, tick: Any) -> Iterator[Cell]:
    """Yield the cells of one alpha that are not in the journal yet."""
    alpha = plan.alphas[index]
    weights = job.weights(alpha)
    for split in job.splits:
        if cell_key(alpha, split.name, "evaluation") not in journal:
            cell = _evaluate(job, weights, alpha, split)
            tick("evaluation", split.name)
            yield cell
    missing = [m for m in plan.measures if cell_key(alpha, job.curvature_split, m.name) not in journal]
    if not missing:
        return
    guesses = {} if plan.begins(index) else memory.before(index, str(job.device), plan.stride(index))
    point = Point(
        job.objective,
        weights,
        job.layers.names,
        graph_bytes=job.graph_bytes,
        memory=guesses,
        delta=job.path.delta,
        workspace=job.workspace,
    )
    check_finite(point.loss, f"alpha {alpha:g} on {job.curvature_split!r}")
    for measure in missing:
        known = len(point.found)
        cell = _measure(job, plan, point, measure, alpha, tick)
        if len(point.found) > known:  # on disk before the cell that goes with it
            memory.keep(index, point.found)
        yield cell
    job.count(point)


def cells(job: Job, plan: Plan, journal: Journal, memory: Memory, progress: Progress) -> Iterator[Cell]:
    """Yield every cell of the plan as it is finished, after writing it; those in the journal are not measured again.

    Raises
    ------
    MeasurementError
        After all others, if alphas could not be measured.
    """
    faults: dict[float, MeasurementError] = {}

    def measured(index: int) -> Iterator[Cell]:
        at = partial(_cells_at, job, plan, index, journal, memory, partial(progress.step, index))
        # Ranks that share a product cannot begin again one by one: there, running out of memory ends the scan.
        return that_fit(job, at, f"alpha {plan.alphas[index]:g}", progress.say) if job.team.size == 1 else at()

    for indices in plan.rounds:
        together = ((index, measured(index)) for index in indices)
        for index, found in _apart(job.ranks, indices, measured) if job.parallel == "alphas" else together:
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
    if faults:
        raise _unmeasured(faults, plan, journal) from next(iter(faults.values()))


def _apart(
    ranks: Ranks, indices: Sequence[int], measured: Callable[[int], Iterator[Cell]]
) -> Iterator[tuple[int, Iterator[Cell]]]:
    """Yield each alpha with its cells, found by one rank each; what was found before an error comes before it."""
    mine: list[tuple[int, dict[str, Cell], MeasurementError | None]] = []
    for index in indices[ranks.rank :: ranks.size]:
        done: dict[str, Cell] = {}
        error: MeasurementError | None = None
        try:
            for cell in measured(index):
                done[cell.key] = cell
        except MeasurementError as failure:
            error = failure
        mine.append((index, done, error))
    for index, done, error in sorted(ranks.gathered(mine), key=lambda entry: entry[0]):
        yield index, _replayed(done, error)


def _replayed(done: Mapping[str, Cell], error: MeasurementError | None) -> Iterator[Cell]:
    yield from done.values()
    if error is not None:
        raise error


def _unmeasured(faults: Mapping[float, MeasurementError], plan: Plan, journal: Journal) -> MeasurementError:
    """Return what is said of alphas without usable numbers; the others are finished by then."""
    first, others = next(iter(faults.values())), len(plan.alphas) - len(faults)
    listed = ", ".join(f"{alpha:g}" for alpha in faults)
    kept = f", {others} are" + (f" and kept in {journal.path}" if journal.path else "") if others else ""
    return MeasurementError(
        f"{first.problem}; {len(faults)} of {len(plan.alphas)} alphas ({listed}) could not be measured{kept}", first.fix
    )


def _measured(
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
        bar.say(job.describe(plan, len(journal)))
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


def scan(
    model_a: Any,
    model_b: Any,
    loader: Any,
    *,
    ood: Mapping[str, Any] | None = None,
    alphas: int | Sequence[float] = 11,
    measures: Sequence[str | Measure] = DEFAULT,
    sharpness_on: Any = None,
    objective: Towers = "image",
    loss: str | Loss = "cross_entropy",
    label_smoothing: float = 0.0,
    limit: int | None = 256,
    batch_size: int = 64,
    granularity: Granularity = "block",
    patterns: Mapping[str, str] | None = None,
    interventions: bool | Interventions | None = None,
    intervention_limit: int | None = 512,
    recipes: bool | RecipeSearch = False,
    seed: int = 0,
    out: str | FilePath | None = None,
    fresh: bool = False,
    device: str | None = None,
    precision: Precision = "highest",
    chains: int = 1,
    parallel: Parallel | None = None,
    progress: bool | None = None,
) -> ScanResult:
    """Return sharpness, per layer and global, and accuracy along the path from ``model_a`` to ``model_b``.

    Parameters
    ----------
    model_a, model_b
        The zero-shot and the fine-tuned model: any two ``torch.nn.Module`` of one architecture whose forward gives
        logits, in evaluation mode, or two CLIPs from :func:`sharpscope.load`, whose head is built from the class
        names of ``loader``. They are not modified.
    loader
        In-distribution data: batches ``(x, y)`` or dicts with image and label keys, in a fixed order.
    ood
        Name -> loader of each out-of-distribution set.
    alphas
        Number of evenly spaced points from 0 to 1, or the points. 0 is ``model_a``, 1 is ``model_b``.
    measures
        Names in :data:`sharpscope.measures.MEASURES`, or configured measures, e.g. ``Trace(relative=0.01)``.
    sharpness_on
        Data that sharpness is measured on, e.g. training images; default ``loader``.
    objective
        What of two CLIPs the loss is a function of. ``"image"``: the image tower and a head, fixed by the class names
        at either end and mixed between. ``"both"``: both towers, the head made by the text tower at every alpha.
        ``"contrastive"``: both towers under the loss of contrastive fine-tuning (FLYP, arXiv 2212.00638), CLIP's or
        SigLIP's, on images with their captions (a split that has them) or prompts of their classes. Accuracy is that
        of zero-shot classification always.
    loss, label_smoothing
        The loss whose sharpness is measured: ``cross_entropy`` or ``squared_error``, or a function of outputs and
        targets that returns the sum over examples. The evaluation always reports cross-entropy.
    limit
        Most images that sharpness is measured on, drawn by class with the seed; None: all. Evaluation uses all.
    batch_size
        Examples whose gradient graph is built at once; bounds memory. Each batch gets trace probes of its own, so small
        batches need fewer of them; other numbers change by rounding only. A contrastive loss is a mean over batches of
        exactly this size, which are the groups of its m-sharpness and are never cut.
    granularity, patterns
        What a layer is; see :func:`sharpscope.partition.partition`.
    interventions
        Whether each layer is also moved alone to the other end, beside random moves as long, and judged on all sets;
        or which, as :class:`sharpscope.intervention.Interventions`. Default: if there are OOD sets and it costs less
        than the scan itself.
    intervention_limit
        Most images per set that moves are judged on, drawn by class with the seed; None: all.
    recipes
        Whether recipes with an alpha per layer are searched for after that, or how
        (:class:`sharpscope.search.RecipeSearch`); by default 60 of them, each an evaluation of all images.
    seed
        Of all draws: probes, start vectors, the sample of images. Each draw depends on the seed, the measure, the
        layer and its number only, so curves over alpha are smooth and resuming changes nothing.
    out
        Folder that every finished cell is written to; a scan found there is resumed, if it is the same plan.
    fresh
        Discard what ``out`` holds.
    device
        Default: a GPU if there is one, else where ``model_a`` is.
    precision
        Of float32 matrix products on a GPU: ``highest`` (full float32) or ``high`` (TF32: faster; a block product
        differed by 4e-4). Set for the scan only, and recorded.
    chains
        Runs of neighbouring alphas that are measured independently of each other: the first alpha of each starts its
        eigenvector searches from the gradient, not from its neighbour's eigenvectors. Part of the plan.
    parallel
        What the processes of torch's default process group share, if there are several: ``"data"``, the batches of
        every product, or ``"alphas"``, the chains. Default: ``"alphas"`` if there is a chain for each, else
        ``"data"``. Neither changes a number. The first process writes and shows progress; all return the result.
    progress
        False for none; default a bar on a terminal, else a line per alpha, on stderr.

    Raises
    ------
    MismatchError
        If the models are not of one architecture.
    ModelError, DataError, MeasurementError
        Naming what cannot be measured on and the way out. Where an alpha has no usable numbers, e.g. a loss that is
        NaN, the others are measured first.
    OutputError
        If ``out`` cannot be written, or another scan is writing it.

    Notes
    -----
    Cost for a network of L layers: some 50 to 150 gradients over ``limit`` images per alpha with the default
    measures, plus one forward over all data sets.
    """
    plan = Plan(
        alphas=alphas_from(alphas),
        measures=measures_from(measures, batch_size if objective == "contrastive" else None),
        seed=seed,
        limit=limit,
        batch_size=batch_size,
        granularity=granularity,
        loss=loss_from(loss, label_smoothing) if isinstance(loss, str) else loss,
        loss_name=loss if isinstance(loss, str) else getattr(loss, "__qualname__", repr(loss)),
        label_smoothing=label_smoothing,
        precision=precision,
        chains=chains,
        objective=objective,
    )
    started = time.monotonic()
    with joined() as ranks, matmul_precision(precision):
        shared, show = parallel_from(parallel, plan.chains, ranks), progress if ranks.leads else False
        id_split = as_split(loader, "id", progress=show)
        ood_splits = [
            as_split(data, name, progress=show).named(name).numbered_as(id_split.classes)
            for name, data in (ood or {}).items()
        ]
        curvature = id_split
        if sharpness_on is not None:
            curvature = as_split(sharpness_on, "sharpness", progress=show).numbered_as(id_split.classes)
        job = prepare((model_a, model_b), id_split, ood_splits, curvature, plan, patterns, device, ranks, shared)
        searched = recipes_from(recipes, job, plan)
        moves = interventions_from(interventions, intervention_limit, job, plan)
        folder = None if out is None else FilePath(out)
        identity = job.identity(plan)
        ranks.check_equal({**identity, "device": str(job.provenance["device"])})
        with locked(folder if ranks.leads else None):
            journal = _journal(ranks, identity, folder, fresh)
            found = _measured(job, plan, moves, searched, journal, Memory(folder, job.team), show)
            if shared == "alphas":
                job.counts = sum(ranks.gathered([job.counts]), Counter())
            result = ScanResult(journal, {**job.meta(plan, journal.plan, time.monotonic() - started), **found})
            if folder is not None and ranks.leads:
                with writing(folder):
                    result.save(folder)
                Memory(folder).clear()
    return result


def _journal(ranks: Ranks, identity: Mapping[str, Any], folder: FilePath | None, fresh: bool) -> Journal:
    """Return the journal: on rank 0 the one in the folder, on others its cells in memory."""
    opened: list[Journal] = []

    def cells_there() -> list[Cell]:
        if folder is not None and fresh:
            _discard(folder)
        opened.append(Journal(folder and folder / "cells.jsonl", identity, fresh=fresh))
        return list(opened[0])

    known = ranks.led(cells_there)
    if opened:
        return opened[0]
    copy = Journal(None, identity)
    for cell in known:
        copy.append(cell)
    return copy


def _discard(folder: FilePath) -> None:
    """Remove what makes the folder a finished scan, so that none seems to be there until the new one is."""
    with writing(folder):
        (folder / "scan.json").unlink(missing_ok=True)
        Memory(folder).clear()
