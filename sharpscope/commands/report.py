"""Two CLIPs and folders of images in, a scan and its page out."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from sharpscope.classnames import ClassNames, read_classnames
from sharpscope.config import Settings, flag, write_config
from sharpscope.curvature.lanczos import Eigenvalue
from sharpscope.curvature.trace import Trace
from sharpscope.data import Split
from sharpscope.device import own_device
from sharpscope.errors import UsageError
from sharpscope.folders import class_folders, is_text
from sharpscope.intervention import interventions_from
from sharpscope.journal import resumed
from sharpscope.measures import Measure, measures_from
from sharpscope.models import ClipModel, LogitsModel, load_pair, read_templates
from sharpscope.optim.activity import read_audit
from sharpscope.perturbation import MSharpness
from sharpscope.plan import Plan, alphas_from, path_notes
from sharpscope.precision import deterministic_algorithms
from sharpscope.preparation import prepare
from sharpscope.ranks import launched
from sharpscope.report.page import write
from sharpscope.result import ScanResult
from sharpscope.scanner import scan
from sharpscope.search import RecipeSearch
from sharpscope.sources import WEBDATASET, images, is_folder
from sharpscope.storage import check_writable, writing
from sharpscope.webdataset import archive_templates

Words = tuple[ClassNames | None, ClassNames | None]  # of the ID set, of every other folder


@dataclass(frozen=True)
class Material:
    """What the references of the settings stand for."""

    zero_shot: ClipModel | LogitsModel
    fine_tuned: ClipModel | LogitsModel
    id: Split
    ood: dict[str, Split]
    sharpness_on: Split | None


def material(chosen: Settings, *, progress: bool | None = None) -> Material:
    """Return models and data, read as the settings say; all images are preprocessed as the zero-shot model wants."""
    sentences, words = templates(chosen), classnames(chosen)
    ends = load_pair(chosen.zero_shot, chosen.fine_tuned, templates=sentences, convert=chosen.convert == "auto")
    return read(chosen, *ends, words, progress=progress)


def read(
    chosen: Settings,
    zero_shot: ClipModel | LogitsModel,
    fine_tuned: ClipModel | LogitsModel,
    words: Words,
    *,
    progress: bool | None = None,
) -> Material:
    """Return both models with the data of the settings; see :func:`material`."""
    if chosen.templates is not None and isinstance(zero_shot, LogitsModel):
        warnings.warn(f"--templates changes nothing: {zero_shot.name} is a classifier with its own head", stacklevel=2)
    id_names, names = words
    split = partial(images, model=zero_shot, limit=chosen.images, seed=chosen.seed, progress=progress)
    id_split = split(
        chosen.id,
        name="id",
        classnames=id_names,
        classes=getattr(zero_shot, "classes", None) or getattr(fine_tuned, "classes", None),
        subset=chosen.subset,
        captions=chosen.captions and chosen.sharpness_on is None,
    )

    def read_other(place: str, name: str, captions: bool = False) -> Split:
        own = names if is_folder(place) else None
        known = id_split.classes
        return split(place, name=name, classes=known, classnames=own, subset=chosen.subset, captions=captions)

    return Material(
        zero_shot=zero_shot,
        fine_tuned=fine_tuned,
        id=id_split,
        ood={name: read_other(place, name) for name, place in chosen.ood.items()},
        sharpness_on=read_other(chosen.sharpness_on, "sharpness", chosen.captions) if chosen.sharpness_on else None,
    )


def templates(chosen: Settings) -> Iterable[str] | None:
    """Return the templates of the settings, else those that an ID webdataset brings along."""
    if chosen.templates is not None:
        return read_templates(chosen.templates)
    found = archive_templates(chosen.id.removeprefix(WEBDATASET)) if chosen.id.startswith(WEBDATASET) else None
    if found is not None:
        warnings.warn(
            f"the ID webdataset brings {len(found)} templates, which are used; else --templates", stacklevel=2
        )
    return found


def classnames(chosen: Settings) -> Words:
    """Return the words of the ID set and those of every folder: a file with a line each names the ID folders only."""
    if chosen.classnames is None or not is_folder(chosen.id):
        return chosen.classnames, None
    words = read_classnames(chosen.classnames, [*class_folders(chosen.id).images], partial=chosen.subset)
    return words, words


def measures(chosen: Settings) -> tuple[Measure, ...]:
    """Return the measures, with the settings' target errors and size of groups."""
    group = chosen.batch_size if chosen.objective == "contrastive" else None
    return tuple(_as_set(measure, chosen) for measure in measures_from(chosen.measures, group))


def _as_set(measure: Measure, chosen: Settings) -> Measure:
    times = chosen.tolerance
    if isinstance(measure, Trace):
        return replace(measure, relative=measure.relative * times, absolute=measure.absolute * times)
    if isinstance(measure, Eigenvalue):
        return replace(measure, tolerance=measure.tolerance * times)
    if isinstance(measure, MSharpness) and chosen.m is not None:
        return replace(measure, m=chosen.m)
    return measure


def _check_out(chosen: Settings) -> None:
    """Raise for what cannot be written, before images are read and hours measured: settings, and the folder."""
    for name, value in chosen:
        texts = [*value, *value.values()] if isinstance(value, dict) else [value]
        if odd := [text for text in texts if isinstance(text, str) and not is_text(text)]:
            raise UsageError(
                f"{flag(name)}: {odd[0]!r} is no UTF-8, in which settings and results are written", "another name"
            )
    with writing(Path(chosen.out)):
        check_writable(Path(chosen.out))


def plan_line(chosen: Settings, *, fresh: bool = False, audit: str | None = None) -> str:
    """Return what :func:`measure` would do, after all that it refuses; nothing is measured or written."""
    own_device(chosen.device)  # refused before images are read
    if audit is not None:
        read_audit(audit)
    _check_out(chosen)
    found = material(chosen)
    plan = Plan(
        alphas_from(chosen.alphas),
        measures(chosen),
        chosen.seed,
        chosen.limit,
        chosen.batch_size,
        chosen.granularity,
        chains=chosen.chains,
        objective=chosen.objective,
    )
    job = prepare(
        (found.zero_shot, found.fine_tuned),
        found.id,
        [*found.ood.values()],
        found.sharpness_on or found.id,
        plan,
        None,
        chosen.device,
    )
    moves = interventions_from(chosen.interventions, chosen.intervention_limit, job, plan)
    done = [] if fresh else resumed(Path(chosen.out) / "cells.jsonl", job.identity(plan))[0]
    notes = [f"  note: {note}" for note in path_notes(plan.alphas)]
    return "\n".join([job.describe(plan, len(done)), *notes, *([moves.describe(job)] if moves else [])])


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Run torch on so many CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _scanned(chosen: Settings, found: Material, fresh: bool, progress: bool | None) -> ScanResult:
    return scan(
        found.zero_shot,
        found.fine_tuned,
        found.id,
        ood=found.ood,
        alphas=chosen.alphas,
        measures=measures(chosen),
        sharpness_on=found.sharpness_on,
        objective=chosen.objective,
        limit=chosen.limit,
        batch_size=chosen.batch_size,
        granularity=chosen.granularity,
        chains=chosen.chains,
        parallel=chosen.parallel,
        memory=chosen.memory,
        interventions=chosen.interventions,
        intervention_limit=chosen.intervention_limit,
        recipes=RecipeSearch(chosen.recipe_limit) if chosen.recipes else False,
        seed=chosen.seed,
        out=chosen.out,
        fresh=fresh,
        device=chosen.device,
        progress=progress,
    )


def measure(
    chosen: Settings, *, fresh: bool = False, progress: bool | None = None, audit: str | None = None
) -> ScanResult:
    """Return the scan of the settings and write it to ``out``: its cells as they finish, then page and settings.

    Parameters
    ----------
    chosen
        See :class:`sharpscope.config.Settings`.
    fresh
        Discard what ``out`` holds; else a scan found there is resumed.
    progress
        See :func:`sharpscope.scan`.
    audit
        Log of an SPD training, shown in the page; None: ``spd.jsonl`` in ``out``, if there is one.

    Notes
    -----
    In the processes that ``torchrun`` started all measure together, see ``parallel`` of :func:`sharpscope.scan`, and
    the first one writes.
    """
    if audit is not None:
        read_audit(audit)  # before hours of measuring
    with (
        _threads(chosen.threads),
        deterministic_algorithms(chosen.deterministic),
        launched(chosen.device) as leads,
    ):
        if leads:
            _check_out(chosen)
        found = material(chosen, progress=progress if leads else False)
        result = _scanned(chosen, found, fresh, progress)
        if leads:
            with writing(Path(chosen.out)):
                write_config(chosen, chosen.out)
            write(result, Path(chosen.out), audit=audit)
    return result
