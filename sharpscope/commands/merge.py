"""A scan and a recipe in, a merged checkpoint out: loaded again and judged on the data of the scan."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sharpscope.commands.report import classnames, read, templates
from sharpscope.config import FILE, Settings, flag, read_config, settings
from sharpscope.data import Split
from sharpscope.errors import DataError, SharpscopeError, UsageError
from sharpscope.evaluate import per_example
from sharpscope.home import at_home
from sharpscope.merging import MergePlan, check_output, merge_plan, read_weights, scanned_plan, write_plan
from sharpscope.models import load, load_pair, pair
from sharpscope.models.reference import placed
from sharpscope.network import network
from sharpscope.prediction import Check, check_accuracy, predicted_accuracy, scanned_answers
from sharpscope.recipe import Recipe
from sharpscope.recipe_file import Interval, RecipeFile, read_recipe
from sharpscope.result import ScanResult
from sharpscope.saved import open_result
from sharpscope.sources import is_folder
from sharpscope.table import Array

RECOMMENDED = "recommended"
_NAMED = "name the data with --id DIR and --ood NAME=DIR"


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
    id, ood, templates, classnames
        What to judge the result on and with, if not as the scan was.
    """

    recipe: str
    folder: str | None = None
    zero_shot: str | None = None
    fine_tuned: str | None = None
    keep_id: float | None = None
    per_layer: bool = False
    id: str | None = None
    ood: Mapping[str, str] = field(default_factory=dict)
    templates: str | None = None
    classnames: str | None = None

    @property
    def judged_on(self) -> dict[str, Any]:
        """What was said about the judging, as settings."""
        found = {name: getattr(self, name) for name in ("id", "ood", "templates", "classnames")}
        return {name: value for name, value in found.items() if value}


@dataclass(frozen=True)
class Prepared:
    """A merge that is planned, and what it should be worth."""

    plan: MergePlan
    predicted: Mapping[str, Interval]  # by the scan, for its images
    foretold: Mapping[str, Interval]  # by the recipe's file, for these two models
    answers: Mapping[str, Array]  # of the scan at this recipe, image by image
    result: ScanResult | None
    request: Request


def prepared(request: Request) -> Prepared:
    """Return the merge that was asked for, checked; nothing is written."""
    _check_flags(request)
    result = None if request.folder is None else open_result(request.folder)
    stored = _recipe(request, result)
    plan = _plan_of_two(request, stored) if result is None else _plan_of_scan(request, stored, result)
    answers = {} if result is None else scanned_answers(result, stored.recipe)
    return Prepared(plan, predicted_accuracy(answers), _foretold(stored, plan), answers, result, request)


def _check_flags(request: Request) -> None:
    """Raise for a flag that would change nothing."""
    given = {"keep_id": request.keep_id is not None, "per_layer": request.per_layer}
    if request.recipe != RECOMMENDED and (idle := next((name for name, there in given.items() if there), None)):
        raise UsageError(
            f"{flag(idle)} is about the recommendation, --recipe {request.recipe} is another recipe",
            f"{flag(idle)} or --recipe, not both",
        )


def _foretold(stored: RecipeFile, plan: MergePlan) -> Mapping[str, Interval]:
    """Return the file's predictions, unless it says that they are of other models."""
    known = plan.hashes.items() if stored.predicted else ()  # hashing reads both models
    return {} if any(stored.sources.get(key, mark) != mark for key, mark in known) else stored.predicted


def _plan_of_scan(request: Request, stored: RecipeFile, result: ScanResult) -> MergePlan:
    if missing := [name for name in ("models", "granularity") if name not in result.meta]:
        raise UsageError(
            f"{request.folder} does not say which {missing[0]} it is of",
            "--zero-shot and --fine-tuned without the scan",
        )
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
    return RecipeFile(recipe, "block" if result is None else result.meta.get("granularity", "block"))


@dataclass(frozen=True)
class Judge:
    """What reads the merge again and judges it; read itself before the merge is written.

    Attributes
    ----------
    zero_shot
        The loaded model, None if its library reads neither source.
    without
        Why there is no model, or nothing to judge on.
    settings
        The settings of the scan; None without data.
    splits
        ID data first.
    """

    zero_shot: Any
    without: str
    settings: Settings | None = None
    splits: tuple[Split, ...] = ()


def check_all(job: Prepared, out: str, *, overwrite: bool = False) -> None:
    """Raise for all that a merge refuses before it is written; nothing is.

    Models and data are read only if data were named; a merge goes on without those of the scan, and says why.
    """
    if job.request.judged_on:
        checked(job, out, overwrite=overwrite)
    else:
        check_output(job.plan, out, overwrite=overwrite)
        _settings(job.request, _references(job))


def checked(job: Prepared, out: str, *, overwrite: bool = False) -> Judge:
    """Return what the merge will be judged by, after all that can be refused before it is written; nothing is."""
    check_output(job.plan, out, overwrite=overwrite)
    ends = _references(job)
    chosen = _settings(job.request, ends)
    if isinstance(chosen, str):
        return _unjudged(ends, chosen)
    try:
        return _judge(chosen, ends)
    except (UsageError, DataError) as error:
        if job.request.judged_on:
            raise
        return _unjudged(ends, f"{error.problem}; {_NAMED}")  # a scan whose data are gone can be merged


def _judge(chosen: Settings, ends: tuple[str, str]) -> Judge:
    words, sentences = classnames(chosen), templates(chosen)
    models = _loaded(*ends, templates=sentences, convert=chosen.convert == "auto")
    if isinstance(models, str):
        return Judge(None, models)
    found = read(chosen, *models, words)
    pair(*models, found.id.classes)  # the merged model's head is made of the same words
    return Judge(found.zero_shot, "", chosen, (found.id, *found.ood.values()))


def _unjudged(ends: tuple[str, str], why: str) -> Judge:
    models = _loaded(*ends)
    return Judge(None, models) if isinstance(models, str) else Judge(models[0], why)


def _loaded(zero_shot: str, fine_tuned: str, **how: Any) -> tuple[Any, Any] | str:
    """Return both sources as their library reads them, or why it does not."""
    try:
        return load_pair(zero_shot, fine_tuned, **how)
    except SharpscopeError as error:
        return error.problem


def merged(job: Prepared, out: str, *, overwrite: bool = False) -> Iterator[str]:
    """Write the merge; yield what can be said of it, line by line.

    The checkpoint is loaded with its library, which must miss no weight and find none too many. Where there are data,
    its accuracy is compared with what was predicted; a warning names what is off.
    """
    judge = checked(job, out, overwrite=overwrite)
    write_plan(job.plan, out, predicted={**job.predicted, **job.foretold}, overwrite=overwrite)
    yield f"merged: {out}"
    if job.plan.mixes_text and job.result and job.result.meta.get("objective", "image") != "image":
        yield "text tower: mixed as the scan mixed it, its own alpha for each of its layers"
    if judge.zero_shot is None:
        yield f"not loaded again: {judge.without}"
        return
    model = _reloaded(job, judge, at_home(out).absolute())
    yield f"loaded again: {model!r}"
    if judge.settings is None:
        yield f"not evaluated: {judge.without}"
        return
    for check in _checks(job, judge, model):
        if check.as_predicted is False:
            warnings.warn(f"not as predicted: {check}", stacklevel=2)
        yield str(check)


def _references(job: Prepared) -> tuple[str, str]:
    """Return what loads both models."""
    known = job.result.meta["models"] if job.result else {}
    first = job.request.zero_shot or known["zero_shot"]["name"]
    second = job.request.fine_tuned or known["fine_tuned"]["name"]
    return placed(first, job.plan.zero_shot.root), placed(second, job.plan.fine_tuned.root)


def _reloaded(job: Prepared, judge: Judge, place: Path) -> Any:
    """Return the merged model as its library reads it; weights alone take the architecture of the zero-shot one."""
    how: dict[str, Any] = {} if judge.settings is None else {"convert": judge.settings.convert == "auto"}
    return load(
        placed(_references(job)[1], place),
        templates=judge.zero_shot.templates or None,
        like=judge.zero_shot,
        **how,
    )


def _settings(request: Request, ends: tuple[str, str]) -> Settings | str:
    """Return the settings of the scan with what was named anew, or why there is nothing to judge on."""
    file = at_home(request.folder) / FILE if request.folder else None
    known = read_config(file) if file is not None and file.is_file() else {}
    given = request.judged_on
    known |= {"ood": {}, **given} if "id" in given else given
    if "id" not in known:
        if given:
            raise UsageError(
                f"{flag(min(given))} without --id: there is no scan whose ID data could be taken", "--id DIR"
            )
        return "no data; name them with --id DIR and --ood NAME=DIR"
    if not given and (absent := _absent(known)):
        return f"{absent}; {_NAMED}"
    return settings({**known, "zero_shot": ends[0], "fine_tuned": ends[1], "sharpness_on": None, "captions": False})


def _absent(known: Mapping[str, Any]) -> str | None:
    """Return what is not there of the places that a scan was judged on."""
    data = [place for place in (known["id"], *known.get("ood", {}).values()) if is_folder(place)]
    words = [known[name] for name in ("templates", "classnames") if name in known]
    gone = next((place for place in map(at_home, (*data, *words)) if not place.exists()), None)
    if gone is None:
        return None
    if gone.is_absolute():
        return f"{gone} is no longer there"
    return f"{gone} is not found from this folder: the scan was made in another one, or it is no longer there"


def _checks(job: Prepared, judge: Judge, model: Any) -> Iterator[Check]:
    classes = judge.splits[0].classes
    assert classes is not None  # folders have names
    module = network(pair(judge.zero_shot, model, classes)[1], "the merged model")
    weights = {**module.buffers, **module.parameters}
    for i, split in enumerate(judge.splits):
        name = job.result.id_split if job.result and i == 0 else split.name
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
