"""Two CLIPs and folders of images in, a scan and its page out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sharpscope.config import Settings, write_config
from sharpscope.curvature.lanczos import Eigenvalue
from sharpscope.curvature.trace import Trace
from sharpscope.data import Split
from sharpscope.folders import class_folders, folder, read_classnames
from sharpscope.measures import Measure, measures_from
from sharpscope.models import ClipModel, load, read_templates
from sharpscope.plan import Plan, alphas_from, prepare
from sharpscope.precision import deterministic_algorithms
from sharpscope.report.page import write
from sharpscope.result import ScanResult
from sharpscope.scanner import scan


@dataclass(frozen=True)
class Material:
    """What the references of the settings stand for."""

    zero_shot: ClipModel
    fine_tuned: ClipModel
    id: Split
    ood: dict[str, Split]
    sharpness_on: Split | None


def material(chosen: Settings) -> Material:
    """Return models and data, read as the settings say; every folder is preprocessed as the zero-shot model wants."""
    templates = None if chosen.templates is None else read_templates(chosen.templates)
    # One map for all sets: a file with a line per folder names the ID folders, and a subset has fewer.
    words = None if chosen.classnames is None else read_classnames(chosen.classnames, [*class_folders(chosen.id)])
    zero_shot = load(chosen.zero_shot, templates=templates)

    def read(place: str, name: str, classes: Sequence[str] | None = None) -> Split:
        subset = chosen.subset and classes is not None
        return folder(place, zero_shot, name=name, classes=classes, classnames=words, subset=subset)

    id_split = read(chosen.id, "id")
    return Material(
        zero_shot=zero_shot,
        fine_tuned=load(chosen.fine_tuned, templates=templates),
        id=id_split,
        ood={name: read(place, name, id_split.classes) for name, place in chosen.ood.items()},
        sharpness_on=read(chosen.sharpness_on, "sharpness", id_split.classes) if chosen.sharpness_on else None,
    )


def measures(chosen: Settings) -> tuple[Measure, ...]:
    """Return the measures, the target errors of those that stop at one times the settings' tolerance."""
    return tuple(_coarser(measure, chosen.tolerance) for measure in measures_from(chosen.measures))


def _coarser(measure: Measure, times: float) -> Measure:
    if isinstance(measure, Trace):
        return replace(measure, relative=measure.relative * times, absolute=measure.absolute * times)
    if isinstance(measure, Eigenvalue):
        return replace(measure, tolerance=measure.tolerance * times)
    return measure


def plan_line(chosen: Settings) -> str:
    """Return what :func:`measure` would do, after checking models and data; nothing is measured or written."""
    found = material(chosen)
    plan = Plan(
        alphas_from(chosen.alphas),
        measures(chosen),
        chosen.seed,
        chosen.limit,
        chosen.batch_size,
        chosen.granularity,
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
    return job.describe(plan, 0)


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
        limit=chosen.limit,
        batch_size=chosen.batch_size,
        granularity=chosen.granularity,
        seed=chosen.seed,
        out=chosen.out,
        fresh=fresh,
        device=chosen.device,
        progress=progress,
    )


def measure(chosen: Settings, *, fresh: bool = False, progress: bool | None = None) -> ScanResult:
    """Return the scan of the settings and write it to ``out``: its cells as they finish, then page and settings.

    Parameters
    ----------
    chosen
        See :class:`sharpscope.config.Settings`.
    fresh
        Discard what ``out`` holds; else a scan found there is resumed.
    progress
        See :func:`sharpscope.scan`.
    """
    with _threads(chosen.threads), deterministic_algorithms(chosen.deterministic):
        result = _scanned(chosen, material(chosen), fresh, progress)
    write_config(chosen, chosen.out)
    write(result, Path(chosen.out))
    return result
