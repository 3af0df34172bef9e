"""The search for an alpha per layer: recipes are tried on all images, each step depends on the choosing half only."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sharpscope.counts import whole
from sharpscope.errors import UsageError
from sharpscope.evaluate import per_example
from sharpscope.job import Job
from sharpscope.journal import Journal
from sharpscope.plan import Plan
from sharpscope.recipe import Recipe
from sharpscope.sparsity import sparsify
from sharpscope.stragglers.recipes import recipe_key
from sharpscope.stragglers.recommendation import halves, recommend, score
from sharpscope.table import Cell, cell_key
from sharpscope.tree import Tree, norm, select
from sharpscope.trials import Trial, around, projections, ramps, sparse

GRID = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class RecipeSearch:
    """How many recipes are tried.

    In this order, beside the uniform alphas of the scan: LiNeS ramps over depth, ``alpha_l = a + b (l - 1) / (L - 1)``
    (arXiv 2410.17146); projections of every layer's delta to one radius, absolute or relative to the layer (as TPGM,
    arXiv 2303.10720, does with learned radii); each layer back to zero-shot; the layer that this helps most, made
    sparse, beside its shrink control; then one layer after the other over the alphas 0, .25, .5, .75, 1, those
    first that mattered most, keeping what helps, round by round until nothing does.

    Parameters
    ----------
    evaluations
        Most that are tried; each costs what the evaluation of one alpha does, a forward over all images.
    sparse
        Layers that are made sparse instead, e.g. stragglers. Their running statistics stay those of the mix; the shrink
        control is a recipe, as any, and takes them along.

    Notes
    -----
    A recipe whose loss is not finite on some set is set aside with a warning: no candidate, but one of those tried.
    """

    evaluations: int = 60
    sparse: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        fix = "recipes that are tried, e.g. RecipeSearch(evaluations=60)"
        object.__setattr__(self, "evaluations", whole("evaluations", self.evaluations, fix=fix))


Tried = Generator[Cell, None, float]  # yields the cells of a trial, returns its score


class Search:
    """A recipe search on a job whose path has been evaluated.

    Parameters
    ----------
    settings, job, plan, journal
        Cells must be in the journal before the next is asked for.
    tick
        Called with the name of a trial for each of its sets.
    """

    def __init__(
        self, settings: RecipeSearch, job: Job, plan: Plan, journal: Journal, tick: Callable[[str], None]
    ) -> None:
        self._settings, self._left = settings, settings.evaluations
        self._job, self._plan, self._journal, self._tick = job, plan, journal, tick
        names = [split.name for split in job.splits]
        self._target = names[1:] or names
        self._first = {split.name: halves(len(split), plan.seed)[0] for split in job.splits}
        correct = {(a, name): self._answers(cell_key(a, name, "evaluation")) for a in plan.alphas for name in names}
        self.alpha = recommend(correct, names[0], names[1:], seed=plan.seed).alpha
        self._uniform = score({name: correct[self.alpha, name] for name in names}, self._target, self._first)
        # A layer that did not move changes nothing at any alpha.
        moving = {layer: names for layer, names in job.path_layers.layers.items() if layer in job.layers.layers}
        self._layers = [layer for layer, names in moving.items() if self._moved(names)]
        self.trials: dict[str, Trial] = {}
        self._aside: dict[str, str] = {}  # key of a trial -> set on which its loss is not finite

    def _moved(self, names: Sequence[str]) -> bool:
        start, end = self._job.path.start, self._job.path.end
        return any(not start[name].equal(end[name]) for name in names)

    def _answers(self, key: str) -> np.ndarray:
        return self._journal[key].arrays["correct"]

    def cells(self) -> Iterator[Cell]:
        """Yield the cells that are not in the journal yet, until nothing is left to try; then warn of trials set aside.

        A cell without answers is that of a trial whose loss is not finite.
        """
        if self._layers:
            yield from self._all_cells()
        if self._aside:
            key, split = next(iter(self._aside.items()))
            self._job.warnings.append(
                f"recipes set aside, as their loss is not finite: {len(self._aside)} "
                f"({self.trials[key].name}, on {split!r}, ...)"
            )

    def _all_cells(self) -> Iterator[Cell]:
        for trial in [*ramps(self.alpha, self._layers), *self._projections()]:
            yield from self._tried(trial)
        changes: dict[str, float] = dict.fromkeys(self._layers, 0.0)
        if self.alpha != 0:
            for layer in self._layers:
                found = yield from self._tried(around(self.alpha, {layer: 0.0}, "leave-one-out"))
                changes[layer] = found - self._uniform
        order = sorted(changes, key=lambda layer: -abs(changes[layer]))
        # Parameters are made sparse: where only running statistics moved that would be the mix under another name.
        thick = [layer for layer in changes if self._moved(self._job.layers.layers[layer])]
        if self.alpha != 0 and thick:
            best = max(thick, key=lambda layer: changes[layer])
            for layer in (best,) if self._settings.sparse is None else self._settings.sparse:
                for trial in sparse(layer, self.alpha):
                    yield from self._tried(trial)
        yield from self._coordinates(order)

    def meta(self) -> dict[str, Any]:
        """Return the alpha to beat and all trials that were not set aside as JSON values."""
        kept = [trial.facts for key, trial in self.trials.items() if key not in self._aside]
        return {"alpha": self.alpha, "trials": kept}

    def _coordinates(self, order: list[str]) -> Iterator[Cell]:
        """Try the alphas of one layer after the other, keeping the best so far, until a round changes nothing."""
        best, chosen, before = self._uniform, dict.fromkeys(self._layers, self.alpha), None
        while self._left and chosen != before:
            before = chosen
            for layer, alpha in ((layer, alpha) for layer in order for alpha in (*GRID, self.alpha)):
                trial = around(self.alpha, {**chosen, layer: alpha}, "per-layer")
                if alpha == chosen[layer] or trial.recipe == Recipe.uniform(self.alpha):
                    continue
                found = yield from self._tried(trial)
                if found > best:
                    best, chosen = found, {**chosen, layer: alpha}

    def _tried(self, trial: Trial) -> Tried:
        """Yield what is missing of a trial; return its score on the choosing half, -inf where there is none."""
        if trial.key not in self.trials:
            if not self._left:
                return -np.inf
            self._left -= 1
            self.trials[trial.key] = trial
        weights: Tree | None = None
        for split in self._job.splits:
            key = recipe_key(split.name, trial.key)
            if key not in self._journal:
                weights = weights or self._weights(trial)
                forward, ranks = self._job.network.forward, self._job.evaluators
                batches = self._job.batches(split, ranks)
                found = per_example(forward, weights, batches, self._job.columns(split), ranks)
                self._tick(f"{trial.name} · {split.name}")
                finite = np.isfinite(found["loss"]).all()
                yield Cell(key, (), {"correct": found["correct"]} if finite else {})
            if not self._journal[key].arrays:
                self._aside[trial.key] = split.name
                return -np.inf
        answers = {name: self._answers(recipe_key(name, trial.key)) for name in self._first}
        return score(answers, self._target, self._first)

    def _weights(self, trial: Trial) -> Tree:
        job = self._job
        mixed = job.path.mixed(trial.recipe.alphas(job.path_layers.layers), job.path_layers)
        if trial.sparse:
            # Parameters only: a running variance that is dropped and rescaled may be negative.
            names = job.layers.layers[trial.sparse.layer]
            start, here = select(job.path.start, names), select(mixed, names)
            mixed |= sparsify(start, here, trial.sparse.p, rescale=trial.sparse.rescale, seed=self._plan.seed)
        return {**job.constants, **mixed}

    def _projections(self) -> list[Trial]:
        # Over parameters, as delta_norm: how far running statistics went is no distance between weights.
        start, delta = self._job.path.start, self._job.path.delta
        names = {layer: self._job.layers.layers[layer] for layer in self._layers}
        distances = {layer: norm(select(delta, mine)) for layer, mine in names.items()}
        norms = {layer: norm(select(start, mine)) for layer, mine in names.items()}
        return projections(distances, norms, self.alpha)


def recipes_from(chosen: bool | RecipeSearch | None, job: Job, plan: Plan) -> RecipeSearch | None:
    """Return the search meant, None for none.

    Raises
    ------
    UsageError
        If what is chosen is neither yes nor no nor a search, the path lacks an end, as there is then no uniform alpha
        to beat, or a layer to be made sparse is unknown.
    """
    if not isinstance(chosen, bool | RecipeSearch | None):  # a number or "no" would be taken for True
        raise UsageError(
            f"recipes={chosen!r}: neither yes nor no", "True, False, or settings: RecipeSearch(evaluations=60)"
        )
    found = RecipeSearch() if chosen is True else chosen or None
    if found and not {0.0, 1.0} <= set(plan.alphas):
        raise UsageError(
            f"alphas {list(plan.alphas)} lack an end point: there is no best uniform alpha that recipes could beat",
            "scan both ends, or recipes=False",
        )
    if unknown := next((layer for layer in (found and found.sparse) or () if layer not in job.layers.layers), None):
        raise UsageError(f"there is no layer {unknown!r} to make sparse", f"layers: {', '.join(job.layers.layers)}")
    return found
