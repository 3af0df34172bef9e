"""Interventions: one layer moved to the other end of the path, all others where they are; and random moves as long."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sharpscope.errors import UsageError
from sharpscope.evaluate import joined, judged
from sharpscope.job import Job
from sharpscope.journal import Journal
from sharpscope.moves import Move, in_words, moved, replays_exactly
from sharpscope.objective import Batch, check_finite
from sharpscope.plan import Plan
from sharpscope.replay import Replay
from sharpscope.stragglers.effects import NECESSARY, SUFFICIENT, Base, moved_key
from sharpscope.stragglers.recommendation import recommend
from sharpscope.table import Cell, cell_key
from sharpscope.tree import Tree

GRADIENTS = 100  # that a scan takes per alpha and measured image, roughly; a gradient is worth three forwards

BATCHES = 2  # of a plan's size at once: a forward without a graph takes less memory


@dataclass(frozen=True)
class Interventions:
    """Which moves are made and how they are judged.

    Every layer goes back to zero-shot from the fine-tuned model (is it necessary), and alone to fine-tuned from
    zero-shot (is it sufficient); each move beside ``draws`` moves of the same layer in random directions, every tensor
    as far as it really goes, so that a norm's few weights are not hit by the whole layer's length.

    Parameters
    ----------
    limit
        Most images per set, drawn by class with the scan's seed; None: all.
    draws
        Random directions per layer, 2 or more.
    recommended
        Whether layers also go back to zero-shot from the recommended alpha.
    cumulative
        Whether the first 2, 3, ... and the last 2, 3, ... layers are moved together as well.

    Notes
    -----
    Cost: 1 + draws forwards over ``limit`` images of every set, for every layer and base; only from the moved layer
    on where the network allows it.
    """

    limit: int | None = 512
    draws: int = 3
    recommended: bool = False
    cumulative: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 2:
            raise UsageError(f"interventions on limit={self.limit} images: an interval needs 2 or more")
        if self.draws < 2:
            raise UsageError(
                f"interventions with draws={self.draws}: the spread of random moves needs 2 or more", "draws=3"
            )

    def check(self, plan: Plan) -> None:
        """Raise ``UsageError`` if the plan lacks what the moves start from."""
        if self.recommended and not {0.0, 1.0} <= set(plan.alphas):
            raise UsageError(
                f"alphas {list(plan.alphas)} lack an end point: there is no recommended alpha to start from",
                "scan both ends, or recommended=False",
            )

    def moves(self, job: Job) -> list[Move]:
        """Return the moves from a base."""
        layers = tuple(job.layers.layers)
        found = [Move("base")]
        for layer in layers:
            found += [
                Move("layer", layer, (layer,)),
                *(Move(f"control {i}", layer, (layer,)) for i in range(self.draws)),
            ]
        if self.cumulative:
            found += [Move("first", layers[i], layers[: i + 1]) for i in range(1, len(layers) - 1)]
            found += [Move("last", layers[i], layers[i:]) for i in range(1, len(layers) - 1)]
        return found

    def steps(self, job: Job) -> int:
        """Return the number of cells."""
        return (2 + self.recommended) * len(job.splits) * len(self.moves(job))

    def forwards(self, job: Job) -> int:
        """Return how many images are put through the network, counted as whole forwards."""
        images = sum(min(len(split), self.limit or len(split)) for split in job.splits)
        return (2 + self.recommended) * images * len(self.moves(job))

    def describe(self, job: Job) -> str:
        """Return what will be done in one line."""
        return (
            f"interventions: {len(job.layers.layers)} layers moved one at a time, each beside {self.draws} random "
            f"moves, {self.forwards(job)} forwards of one image at most"
        )

    def bases(self, job: Job, plan: Plan, journal: Journal) -> list[Base]:
        """Return where the moves start."""
        found = [Base(NECESSARY, 1.0), Base(SUFFICIENT, 0.0)]
        if self.recommended:
            correct = {
                (alpha, split.name): journal[cell_key(alpha, split.name, "evaluation")].arrays["correct"]
                for alpha in plan.alphas
                for split in job.splits
            }
            names = [split.name for split in job.splits]
            alpha = recommend(correct, names[0], names[1:], seed=plan.seed).alpha
            found += [] if alpha in (0.0, 1.0) else [Base(NECESSARY, alpha)]
        return found

    def cells(self, job: Job, plan: Plan, journal: Journal, tick: Callable[[str], None]) -> Iterator[Cell]:
        """Yield the cells that are not in the journal yet, one for each base, set and move; they hold no rows."""
        forward: _Forward | None = None
        moves = self.moves(job)
        for base in self.bases(job, plan, journal):
            for split in job.splits:
                keys = {moved_key(base, split.name, self.limit, move.what, move.layer): move for move in moves}
                missing = {key: move for key, move in keys.items() if key not in journal}
                if not missing:
                    continue
                batches = [b.to(job.device) for b in split.sample(self.limit, plan.seed, BATCHES * plan.batch_size)]
                forward = forward or _Forward(job, batches[0])
                found = _judged(job, forward, base, plan.seed, missing, batches, job.columns(split))
                for key, move in missing.items():
                    check_finite(float(found[key]["loss"].mean()), f"{in_words(base, move)} on {split.name!r}")
                    tick(f"{base.question} · {split.name} · {move.layer or base.name}")
                    kept = found[key] if move.draw is None else {"correct": found[key]["correct"]}
                    yield Cell(key, (), kept)

    def meta(self, job: Job, plan: Plan, journal: Journal) -> dict[str, Any]:
        """Return the settings and bases as JSON values."""
        return {**asdict(self), "bases": [list(base) for base in self.bases(job, plan, journal)]}


class _Forward:
    """Logits at moved weights: from the moved layer on if that gives the bits of a full forward, else in full."""

    def __init__(self, job: Job, batch: Batch) -> None:
        self._full = job.network.forward
        # In shards what one process could skip another may have to compute, and they would wait for each other.
        apart = job.parallel != "weights"
        self._replay = Replay(job.network) if apart and replays_exactly(job, batch) else None
        if self._replay is None and apart:
            job.warnings.append("interventions computed in full: forwards from a moved layer on differ from full ones")

    def at_base(self, weights: Tree, inputs: Any) -> torch.Tensor:
        return self._replay.record(weights, inputs) if self._replay else self._full(weights, inputs)

    def at(self, weights: Tree, inputs: Any, names: Collection[str]) -> torch.Tensor:
        return self._replay(weights, inputs, names) if self._replay else self._full(weights, inputs)


@torch.no_grad()
def _judged(
    job: Job,
    forward: _Forward,
    base: Base,
    seed: int,
    moves: Mapping[str, Move],
    batches: list[Batch],
    columns: torch.Tensor | None,
) -> dict[str, dict[str, Any]]:
    """Return correctness, confidence and loss of every move, by its key."""
    weights = job.weights(base.alpha)
    found: list[dict[str, dict[str, torch.Tensor]]] = []
    for inputs, targets in job.evaluators.mine(batches, len(batches)):
        logits = forward.at_base(weights, inputs)
        answers = {}
        for key, move in moves.items():
            if move.layers:
                changed = moved(job, base, weights, move, seed)
                logits_there = forward.at({**weights, **changed}, inputs, changed.keys())
            else:
                logits_there = logits
            answers[key] = judged(logits_there, targets, columns)
        found.append(answers)
    parts = job.evaluators.gathered(found)
    return {key: joined([answers[key] for answers in parts]) for key in moves}


def interventions_from(
    chosen: bool | Interventions | None, limit: int | None, job: Job, plan: Plan
) -> Interventions | None:
    """Return the interventions meant; with None those on ``limit`` images, where they cost less than the scan itself.

    The scan is taken to cost 100 gradients, worth three forwards each, over the images that sharpness is measured
    on, and a forward over all sets, at every alpha. Without OOD sets there are none by default.
    """
    if isinstance(chosen, Interventions):
        chosen.check(plan)
        return chosen
    if chosen is not None:
        return Interventions(limit) if chosen else None
    found = Interventions(limit)
    sharpness = 3 * GRADIENTS * job.curvature_images if plan.measures else 0
    scan = len(plan.alphas) * (sharpness + sum(map(len, job.splits)))
    return found if len(job.splits) > 1 and found.forwards(job) <= scan else None
