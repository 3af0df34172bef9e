"""The search for an alpha per layer: recipes are tried on all images, each step depends on the choosing half only."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass
from glob import escape
from typing import Any

import numpy as np

from sharpscope.errors import UsageError
from sharpscope.evaluate import per_example
from sharpscope.journal import Journal
from sharpscope.objective import check_finite
from sharpscope.plan import Job, Plan
from sharpscope.recipe import Recipe
from sharpscope.sparsity import sparsify
from sharpscope.stragglers.recipes import recipe_key, score
from sharpscope.stragglers.recommendation import halves, recommend
from sharpscope.table import Cell, cell_key
from sharpscope.tree import Tree, select

GRID = (0.0, 0.25, 0.5, 0.75, 1.0)
SHARES = (0.5, 0.9)


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
        Layers that are made sparse instead, e.g. stragglers.
    """

    evaluations: int = 60
    sparse: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.evaluations < 1:
            raise UsageError(f"a recipe search of {self.evaluations} evaluations: 1 or more")


@dataclass(frozen=True)
class Sparse:
    """A layer of the best uniform mix made sparse, see :func:`sharpscope.sparsity.sparsify`."""

    layer: str
    p: float
    rescale: bool


@dataclass(frozen=True)
class Trial:
    """Weights to be tried: a recipe, and a layer of it that is made sparse."""

    name: str
    kind: str
    recipe: Recipe
    sparse: Sparse | None = None

    @property
    def key(self) -> str:
        """What determines the weights."""
        return json.dumps([self.recipe.rules, asdict(self.sparse) if self.sparse else None])

    @property
    def facts(self) -> dict[str, Any]:
        """The trial as JSON values."""
        rules = None if self.sparse else [list(rule) for rule in self.recipe.rules]
        return {"name": self.name, "kind": self.kind, "rules": rules, "key": self.key}


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
        start, end = job.path.start, job.path.end
        self._layers = {
            layer: names
            for layer, names in job.path_layers.layers.items()
            if layer in job.layers.layers and any(not start[n].equal(end[n]) for n in names)
        }
        self.trials: dict[str, Trial] = {}

    def _answers(self, key: str) -> np.ndarray:
        return self._journal[key].arrays["correct"]

    def cells(self) -> Iterator[Cell]:
        """Yield the cells that are not in the journal yet, until nothing is left to try."""
        if not self._layers:
            return
        for trial in [*_ramps(self.alpha, list(self._layers)), *self._projections()]:
            yield from self._tried(trial)
        changes: dict[str, float] = dict.fromkeys(self._layers, 0.0)
        if self.alpha != 0:
            for layer in self._layers:
                changes[layer] = (yield from self._tried(self._mixed({layer: 0.0}, "leave-one-out"))) - self._uniform
        order = sorted(changes, key=lambda layer: -abs(changes[layer]))
        if self.alpha != 0 and order:
            best = max(changes, key=lambda layer: changes[layer])
            for layer in (best,) if self._settings.sparse is None else self._settings.sparse:
                for trial in self._sparse(layer):
                    yield from self._tried(trial)
        yield from self._coordinates(order)

    def meta(self) -> dict[str, Any]:
        """Return the alpha to beat and all trials as JSON values."""
        return {"alpha": self.alpha, "trials": [trial.facts for trial in self.trials.values()]}

    def _coordinates(self, order: list[str]) -> Iterator[Cell]:
        """Try the alphas of one layer after the other, keeping the best so far, until a round changes nothing."""
        best, chosen, before = self._uniform, dict.fromkeys(order, self.alpha), None
        while self._left and chosen != before:
            before = chosen
            for layer, alpha in ((layer, alpha) for layer in order for alpha in (*GRID, self.alpha)):
                trial = self._mixed({**chosen, layer: alpha}, "per-layer")
                if alpha == chosen[layer] or trial.recipe == Recipe.uniform(self.alpha):
                    continue
                found = yield from self._tried(trial)
                if found > best:
                    best, chosen = found, {**chosen, layer: alpha}

    def _tried(self, trial: Trial) -> Tried:
        """Yield what is missing of a trial; return its score on the choosing half, -inf when none is left to try."""
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
                batches = (batch.to(self._job.device) for batch in split)
                found = per_example(self._job.network.forward, weights, batches, self._job.columns(split))
                check_finite(float(found["loss"].mean()), f"{trial.name} on {split.name!r}")
                self._tick(f"{trial.name} · {split.name}")
                yield Cell(key, (), {"correct": found["correct"]})
        answers = {name: self._answers(recipe_key(name, trial.key)) for name in self._first}
        return score(answers, self._target, self._first)

    def _weights(self, trial: Trial) -> Tree:
        job = self._job
        mixed = job.path.mixed(trial.recipe.alphas(job.path_layers.layers), job.path_layers)
        if trial.sparse:
            names = job.path_layers.layers[trial.sparse.layer]
            start, here = select(job.path.start, names), select(mixed, names)
            mixed |= sparsify(start, here, trial.sparse.p, rescale=trial.sparse.rescale, seed=self._plan.seed)
        return {**job.constants, **mixed}

    def _mixed(self, alphas: Mapping[str, float], kind: str) -> Trial:
        """Return the trial of some layers at their own alphas, all others at the best uniform one."""
        own = {layer: alpha for layer, alpha in alphas.items() if alpha != self.alpha}
        recipe = Recipe((*((escape(layer), own[layer]) for layer in self._layers if layer in own), ("*", self.alpha)))
        words = ", ".join(f"{layer} {alpha:g}" for layer, alpha in own.items())
        return Trial(f"{words}, rest {self.alpha:g}" if own else f"alpha {self.alpha:g}", kind, recipe)

    def _projections(self) -> list[Trial]:
        """Return two projections whose mean alpha is the best uniform one."""
        if self.alpha in (0.0, 1.0):
            return []
        facts = self._job.layer_facts()
        norms = {layer: facts[layer]["delta_norm"] for layer in self._layers}
        relative = {layer: found / (facts[layer]["start_norm"] or 1.0) for layer, found in norms.items()}
        return [
            _by_layer(f"projected to one {word}", "projection", projected(distances, self.alpha), self.alpha)
            for word, distances in (("radius", norms), ("relative radius", relative))
        ]

    def _sparse(self, layer: str) -> Iterator[Trial]:
        """Yield the layer made sparse, plain and rescaled, and its shrink control."""
        base = Recipe.uniform(self.alpha)
        for p in SHARES:
            for rescale, word in ((False, ""), (True, ", rescaled")):
                name = f"{layer}: {p:.0%} of its delta dropped{word}, alpha {self.alpha:g}"
                yield Trial(name, "sparsified", base, Sparse(layer, p, rescale))
            yield self._mixed({layer: round(self.alpha * (1 - p), 12)}, "shrunk")


def projected(distances: Mapping[str, float], mean: float) -> dict[str, float]:
    """Return ``min(1, radius / distance)`` per layer, the radius such that the alphas have the given mean.

    >>> projected({"near": 1.0, "far": 3.0}, 0.5)
    {'near': 0.75, 'far': 0.25}
    """
    far = np.array([d for d in distances.values() if d > 0])
    low, high = 0.0, float(far.max(initial=0.0))
    for _ in range(100):
        radius = (low + high) / 2
        low, high = (radius, high) if np.minimum(1, radius / far).mean() < mean else (low, radius)
    return {layer: round(min(1.0, high / d), 6) if d > 0 else mean for layer, d in distances.items()}


def _by_layer(name: str, kind: str, alphas: Mapping[str, float], rest: float) -> Trial:
    return Trial(name, kind, Recipe((*((escape(layer), alpha) for layer, alpha in alphas.items()), ("*", rest))))


def _ramps(alpha: float, layers: list[str]) -> list[Trial]:
    """Return LiNeS ramps that rise and fall about the alpha, gently and from end to end."""
    reach = min(0.25, max(alpha, 0.0), max(1 - alpha, 0.0)) or 0.25
    ends = dict.fromkeys(
        (min(max(first, 0.0), 1.0), min(max(last, 0.0), 1.0))
        for first, last in ((alpha - reach, alpha + reach), (alpha + reach, alpha - reach), (0.0, 1.0), (1.0, 0.0))
    )
    return [
        _by_layer(
            f"LiNeS {first:g} to {last:g}",
            "LiNeS",
            dict(zip(layers, _ramp(first, last, len(layers)), strict=True)),
            alpha,
        )
        for first, last in ends
    ]


def _ramp(first: float, last: float, count: int) -> list[float]:
    return [round(float(alpha), 6) for alpha in np.linspace(first, last, count)]


def recipes_from(chosen: bool | RecipeSearch, job: Job, plan: Plan) -> RecipeSearch | None:
    """Return the search meant.

    Raises
    ------
    UsageError
        If the path lacks an end, as there is then no uniform alpha to beat, or a layer to be made sparse is unknown.
    """
    found = chosen if isinstance(chosen, RecipeSearch) else RecipeSearch() if chosen else None
    if found and not {0.0, 1.0} <= set(plan.alphas):
        raise UsageError(
            f"alphas {list(plan.alphas)} lack an end point: there is no best uniform alpha that recipes could beat",
            "scan both ends, or recipes=False",
        )
    if unknown := next((layer for layer in (found and found.sparse) or () if layer not in job.layers.layers), None):
        raise UsageError(f"there is no layer {unknown!r} to make sparse", f"layers: {', '.join(job.layers.layers)}")
    return found
