"""A scan and a recipe in, a merged checkpoint out: loaded again and judged on the data of the scan."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sharpscope.commands.report import Material, material
from sharpscope.config import FILE, Settings, read_config, settings
from sharpscope.data import Split
from sharpscope.errors import SharpscopeError, UsageError
from sharpscope.evaluate import per_example
from sharpscope.merging import MergePlan, merge_plan, read_weights, scanned_plan, write_plan
from sharpscope.models import load_pair, pair
from sharpscope.models.reference import placed
from sharpscope.network import network
from sharpscope.prediction import Check, check_accuracy, predicted_accuracy, scanned_answers
from sharpscope.recipe import Recipe
from sharpscope.recipe_file import Interval, RecipeFile, read_recipe
from sharpscope.result import ScanResult, open_result
from sharpscope.table import Array

RECOMMENDED = "recommended"


@dataclass(frozen=True)
class Request:
    """What the command was asked for.

    Attributes
    ----------
    recipe
        ``"recommended"``, a number, or a TOML file.
    folder
        A saved scan, None to merge two checkpoints as they are.
    zero_shot, fine_tuned
        Where the checkpoints are, if not where the scan read them.
    keep_id
        Points of ID accuracy that the recommendation may give up.
    per_layer
        Whether it may have an alpha per layer, if the scan tried such recipes and the best one beats a single alpha.
    id, ood
        Data to judge the result on, if not those of the scan.
    """

    recipe: str
    folder: str | None = None
    zero_shot: str | None = None
    fine_tuned: str | None = None
    keep_id: float | None = None
    per_layer: bool = False
    id: str | None = None
    ood: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """A merge that is ready to be written, and what it should be worth."""

    plan: MergePlan
    predicted: Mapping[str, Interval]  # by the scan, for its images
    foretold: Mapping[str, Interval]  # by the recipe's file, for these two models
    answers: Mapping[str, Array]  # of the scan at this recipe, image by image
    result: ScanResult | None
    request: Request


def prepared(request: Request) -> Prepared:
    """Return the merge that was asked for, checked; nothing is written."""
    result = None if request.folder is None else open_result(request.folder)
    stored = _recipe(request, result)
    plan = _plan_of_two(request, stored) if result is None else _plan_of_scan(request, stored, result)
    answers = {} if result is None else scanned_answers(result, stored.recipe)
    return Prepared(plan, predicted_accuracy(answers), _foretold(stored, plan), answers, result, request)


def _foretold(stored: RecipeFile, plan: MergePlan) -> Mapping[str, Interval]:
    """Return the file's predictions, unless it says that they are of other models."""
    known = plan.hashes.items() if stored.predicted else ()  # hashing reads both models
    return {} if any(stored.sources.get(key, mark) != mark for key, mark in known) else stored.predicted


def _plan_of_scan(request: Request, stored: RecipeFile, result: ScanResult) -> MergePlan:
    known = result.meta["granularity"]
    if len(stored.recipe.rules) > 1 and stored.granularity != known:
        raise UsageError(
            f"the recipe is for layers at granularity {stored.granularity!r}, the scan has {known!r}",
            "a recipe for the scan's layers, or --zero-shot and --fine-tuned without the scan",
        )
    return scanned_plan(result.meta, stored.recipe, zero_shot=request.zero_shot, fine_tuned=request.fine_tuned)


def _plan_of_two(request: Request, stored: RecipeFile) -> MergePlan:
    if request.zero_shot is None or request.fine_tuned is None:
        raise UsageError("there is nothing to merge", "name a saved scan, or --zero-shot REF and --fine-tuned REF")
    ends = read_weights(request.zero_shot), read_weights(request.fine_tuned)
    return merge_plan(*ends, stored.recipe, granularity=stored.granularity)


def _recipe(request: Request, result: ScanResult | None) -> RecipeFile:
    if request.recipe == RECOMMENDED:
        if result is None:
            raise UsageError("only a scan recommends a recipe", "name its folder, or --recipe NUMBER or FILE")
        recipe = result.recommend(request.keep_id, per_layer=request.per_layer).recipe
    else:
        try:
            recipe = Recipe.uniform(float(request.recipe))
        except ValueError:
            return read_recipe(request.recipe)
    return RecipeFile(recipe, "block" if result is None else result.meta["granularity"])


def merged(job: Prepared, out: str, *, overwrite: bool = False) -> Iterator[str]:
    """Write the merge; yield what can be said of it, line by line.

    The checkpoint is loaded with its library, which must miss no weight and find none too many. Where there are data,
    its accuracy is compared with what was predicted; a warning names what is off.
    """
    write_plan(job.plan, out, predicted={**job.predicted, **job.foretold}, overwrite=overwrite)
    yield f"merged: {out}"
    if job.plan.mixes_text and job.result and job.result.meta.get("objective", "image") != "image":
        yield "text tower: mixed as the scan mixed it, its own alpha for each of its layers"
    ends = _references(job, Path(out).expanduser().absolute())
    model = _reloaded(job, ends)
    if isinstance(model, str):
        yield f"not loaded again: {model}"
        return
    yield f"loaded again: {model!r}"
    chosen = _data(job, ends)
    if isinstance(chosen, str):
        yield f"not evaluated: {chosen}"
        return
    del model
    for check in _checks(job, material(chosen)):
        if check.as_predicted is False:
            warnings.warn(f"not as predicted: {check}", stacklevel=2)
        yield str(check)


def _references(job: Prepared, end: Path | None = None) -> tuple[str, str]:
    """Return what loads both models, with the weights at ``end`` in the place of the fine-tuned ones."""
    known = job.result.meta["models"] if job.result else {}
    first = job.request.zero_shot or known["zero_shot"]["name"]
    second = job.request.fine_tuned or known["fine_tuned"]["name"]
    return placed(first, job.plan.zero_shot.root), placed(second, end or job.plan.fine_tuned.root)


def _reloaded(job: Prepared, ends: tuple[str, str]) -> Any:
    """Return the merged model as its library reads it, or why that cannot be: the sources cannot be loaded, either."""
    try:
        return load_pair(*ends)[1]
    except SharpscopeError as error:
        try:
            load_pair(*_references(job))
        except SharpscopeError:
            return str(error).splitlines()[0]
        raise


def _data(job: Prepared, ends: tuple[str, str]) -> Settings | str:
    """Return the settings of the scan with the merge in the place of the fine-tuned model, or why there are none."""
    known: dict[str, Any] = {}
    file = Path(job.request.folder) / FILE if job.request.folder else None
    if file is not None and file.is_file():
        known = read_config(file)
    if job.request.id is not None:
        known |= {"id": job.request.id, "ood": {}}
    if job.request.ood:
        known["ood"] = dict(job.request.ood)
    if "id" not in known:
        return "no data; name them with --id DIR and --ood NAME=DIR"
    places = [known["id"], *known.get("ood", {}).values()]
    if absent := next((place for place in places if ":" not in place and not Path(place).exists()), None):
        return f"{absent} is no longer there; name the data with --id DIR and --ood NAME=DIR"
    return settings({**known, "zero_shot": ends[0], "fine_tuned": ends[1], "sharpness_on": None, "captions": False})


def _checks(job: Prepared, found: Material) -> Iterator[Check]:
    assert found.id.classes is not None  # folders have names
    module = network(pair(found.zero_shot, found.fine_tuned, found.id.classes)[1], "the merged model")
    weights = {**module.buffers, **module.parameters}
    for split in [found.id, *found.ood.values()]:
        name = job.result.id_split if job.result and split is found.id else split.name
        columns = None if split.columns is None else torch.tensor(split.columns)
        correct = per_example(module.forward, weights, split, columns)["correct"]
        same = _same(job, name, split)
        predicted = {**(job.predicted if same else {}), **job.foretold}
        own = same and predicted.get(name) == job.predicted.get(name)  # a file may foretell of other images
        yield check_accuracy(name, correct, predicted, job.answers.get(name) if same else None, same=own)


def _same(job: Prepared, name: str, split: Split) -> bool:
    """Return whether the scan was of the same images."""
    facts = job.result.meta["splits"].get(name, {}) if job.result else {}
    return bool(facts.get("fingerprint") == split.fingerprint)
