"""The scan: two models and data in, cells out, one alpha after the other, resumable."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

from sharpscope.budget import limited
from sharpscope.data import Split, as_split
from sharpscope.errors import UsageError
from sharpscope.home import at_home
from sharpscope.intervention import Interventions, interventions_from
from sharpscope.journal import Journal
from sharpscope.leftovers import meta_in, remove_page
from sharpscope.losses import Loss, Towers, loss_from, name_of
from sharpscope.measurement import measured
from sharpscope.measures import DEFAULT, Measure, measures_from
from sharpscope.memory import Memory
from sharpscope.partition import Granularity
from sharpscope.plan import Plan, alphas_from
from sharpscope.precision import Precision, differentiable, matmul_precision
from sharpscope.preparation import in_shards, prepare
from sharpscope.ranks import Parallel, Ranks, joined, parallel_from
from sharpscope.result import ScanResult
from sharpscope.search import RecipeSearch, recipes_from
from sharpscope.storage import locked, writing
from sharpscope.table import Cell


@differentiable()
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
    memory: int | None = None,
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
        Examples whose gradient graph is built at once; bounds memory. Groups of 8 or more examples in a batch have
        trace probes of their own, so the size of batches changes traces within their errors; other numbers by rounding
        only. A contrastive loss is a mean over batches of exactly this size, which are the groups of its m-sharpness
        and are never cut.
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
        Of float32 matrix products on a GPU: ``highest`` (full float32) or ``high`` (TF32, and activations in float16
        where a trial finds derivatives right: several times faster; a product of ViT-B/32 was off by 7e-4). Set for the
        scan only, and recorded.
    chains
        Runs of neighbouring alphas that are measured independently of each other: the first alpha of each starts its
        eigenvector searches from the gradient, not from its neighbour's eigenvectors. Part of the plan.
    parallel
        What the processes of torch's default process group share, if there are several: ``"data"``, the batches of
        every product, or ``"alphas"``, the chains. Default: ``"alphas"`` if there is a chain for each, else
        ``"data"``. Neither changes a number. The first process writes and shows progress; all return the result.
    memory
        Bytes that the scan may take of the device, in every process; None: what is free. What graphs are kept and in
        how many pieces a batch is computed follows from it and changes numbers by rounding only. On a GPU the limit is
        kept by torch's allocator and holds what the models take there already; on a CPU it is what is planned with.
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
    if label_smoothing and not isinstance(loss, str):
        raise UsageError(f"label_smoothing={label_smoothing} beside a loss of your own", "smooth within the function")
    if progress not in (None, True, False):
        raise UsageError(f"progress={progress!r}: needs True, False or None", "progress=False for none")
    plan = Plan(
        alphas=alphas_from(alphas),
        measures=measures_from(measures, batch_size if objective == "contrastive" else None),
        seed=seed,
        limit=limit,
        batch_size=batch_size,
        granularity=granularity,
        loss=loss_from(loss, label_smoothing) if isinstance(loss, str) else loss,
        loss_name=loss if isinstance(loss, str) else name_of(loss),
        label_smoothing=label_smoothing,
        precision=precision,
        chains=chains,
        objective=objective,
    )
    started = time.monotonic()
    with joined() as ranks, matmul_precision(precision), limited(memory, device):
        shared = parallel_from(parallel, plan.chains, ranks, in_shards=in_shards(model_a, model_b))
        show = progress if ranks.leads else False
        splits = _splits(loader, _sets(ood), sharpness_on, show)
        job = prepare((model_a, model_b), *splits, plan, patterns, device, ranks, shared, memory)
        searched = recipes_from(recipes, job, plan)
        moves = interventions_from(interventions, intervention_limit, job, plan)
        folder = None if out is None else at_home(out)
        identity = job.identity(plan)
        ranks.check_equal({**identity, "device": str(job.provenance["device"])})
        with locked(folder if ranks.leads else None):
            journal = _journal(ranks, identity, folder, fresh)
            kept = Memory(folder, ranks if shared == "weights" else job.team)
            there = len(journal)
            found = measured(job, plan, moves, searched, journal, kept, show)
            if shared == "alphas":
                job.tell_all()
            meta = {**job.meta(plan, journal.plan, time.monotonic() - started), **found}
            result = ScanResult(journal, ranks.led(lambda: _in_all(meta, folder, there, len(journal))))
            if folder is not None and ranks.leads:
                with writing(folder):
                    result.save(folder)
                Memory(folder).clear()
    return result


def _sets(ood: Any) -> Mapping[str, Any]:
    """Return the OOD sets by name, none for None."""
    if ood is None:
        return {}
    if not isinstance(ood, Mapping):
        raise UsageError(f"ood is a {type(ood).__name__}: needs loaders by name", "ood={'sketch': loader}")
    if odd := [name for name in ood if not isinstance(name, str) or not name.strip()]:
        raise UsageError(f"ood has a set called {odd[0]!r}: needs names in text", "ood={'sketch': loader}")
    return ood


def _splits(
    loader: Any, ood: Mapping[str, Any], sharpness_on: Any, show: bool | None
) -> tuple[Split, list[Split], Split]:
    """Return the ID split, the OOD splits with its class numbers, and the one that sharpness is measured on."""
    id_split = as_split(loader, "id", progress=show)
    others = [
        as_split(data, name, progress=show).named(name).numbered_as(id_split.classes) for name, data in ood.items()
    ]
    if sharpness_on is None:
        return id_split, others, id_split
    return id_split, others, as_split(sharpness_on, "sharpness", progress=show).numbered_as(id_split.classes)


def _journal(ranks: Ranks, identity: Mapping[str, Any], folder: FilePath | None, fresh: bool) -> Journal:
    """Return the journal: on rank 0 the one in the folder, on others its cells in memory."""
    opened: list[Journal] = []

    def cells_there() -> list[Cell]:
        if folder is not None and (fresh or not (folder / "cells.jsonl").exists()):
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
        remove_page(folder)
        Memory(folder).clear()


def _in_all(meta: dict[str, Any], folder: FilePath | None, there: int, now: int) -> dict[str, Any]:
    """Return the meta with what cells that were there before had cost, or how many they were, and their warnings."""
    if not there:
        return meta
    old, cost = {} if folder is None else meta_in(folder), meta["cost"]
    if old.get("plan") != meta["plan"] or "cost" not in old:  # not ended then
        return {**meta, "cost": {**cost, "cells_found_before": there}}
    summed = {name: old["cost"].get(name, 0) + cost.get(name, 0) for name in {**old["cost"], **cost}}
    whole = old["cost"] if now == there else {**summed, "processes": cost["processes"]}
    warnings = list(dict.fromkeys([*old.get("warnings", []), *meta["warnings"]]))
    return {**meta, "cost": whole, "warnings": warnings}
