"""Interventions: one layer moved to the other end of the path, all others where they are; and random moves as long."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from sharpscope.counts import whole
from sharpscope.data import Split
from sharpscope.errors import UsageError
from sharpscope.job import Job
from sharpscope.journal import Journal
from sharpscope.moves import Judge, Move
from sharpscope.plan import Plan
from sharpscope.stragglers.recommendation import recommend
from sharpscope.stragglers.standing import FEWEST, NECESSARY, SUFFICIENT, Base, Moves, moved_key
from sharpscope.table import Cell, cell_key

GRADIENTS = 100  # that a scan takes per alpha and measured image, roughly; a gradient is worth three forwards

GROWTH = 4  # of the random moves from round to round: few readings of the images, few moves that cannot decide


@dataclass(frozen=True)
class Interventions:
    """Which moves are made and how they are judged.

    Every layer goes back to zero-shot from the fine-tuned model (is it necessary), and alone to fine-tuned from
    zero-shot (is it sufficient); each move beside moves of the same layer in random directions, every tensor as far as
    it really goes, so that a norm's few weights are not hit by the whole layer's length. All layers get ``draws``
    random moves. Those whose own move changes accuracy get four times as many, and so on up to ``most``, for as long as
    so few go as far that the real one can still be supported. The ID set decides that for itself, the OOD sets by their
    mean.

    Parameters
    ----------
    limit
        Most images per set, drawn by class with the scan's seed; None: all.
    draws
        Random directions per layer, 2 or more.
    most
        Random directions of a layer whose move changes accuracy, 39 or more: of fewer, even the farthest move is no
        evidence, see :func:`~sharpscope.stragglers.effects.effects`. Twice as many find little more (79: three layers
        in a hundred).
    recommended
        Whether layers also go back to zero-shot from the recommended alpha.
    cumulative
        Whether the first 2, 3, ... and the last 2, 3, ... layers are moved together as well.

    Notes
    -----
    Cost: 1 + draws to 1 + most forwards over ``limit`` images of every set, for every layer and base; only from the
    moved layer on where the network allows it.
    """

    limit: int | None = 512
    draws: int = 3
    most: int = FEWEST
    recommended: bool = False
    cumulative: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None:
            fix = "images of a set that moves are judged on: an interval needs 2; None: all"
            object.__setattr__(self, "limit", whole("intervention_limit", self.limit, 2, fix))
        if self.draws < 2:
            raise UsageError(
                f"interventions with draws={self.draws}: the spread of random moves needs 2 or more", "draws=3"
            )
        if self.most < FEWEST:
            raise UsageError(
                f"interventions with most={self.most}: of fewer than {FEWEST} random moves even the farthest is no "
                f"evidence",
                f"most={FEWEST}",
            )

    def check(self, plan: Plan) -> None:
        """Raise ``UsageError`` if the plan lacks what the moves start from."""
        if self.recommended and not {0.0, 1.0} <= set(plan.alphas):
            raise UsageError(
                f"alphas {list(plan.alphas)} lack an end point: there is no recommended alpha to start from",
                "scan both ends, or recommended=False",
            )

    def moves(self, job: Job) -> list[Move]:
        """Return the moves from a base that are made in any case."""
        layers = tuple(job.layers.layers)
        found = [Move("base")]
        for layer in layers:
            found += [Move("layer", layer, (layer,)), *_random(layer, 0, self.draws)]
        if self.cumulative:
            found += [Move("first", layers[i], layers[: i + 1]) for i in range(1, len(layers) - 1)]
            found += [Move("last", layers[i], layers[i:]) for i in range(1, len(layers) - 1)]
        return found

    def steps(self, job: Job) -> int:
        """Return the number of cells that are measured in any case."""
        return (2 + self.recommended) * len(job.splits) * len(self.moves(job))

    def forwards(self, job: Job) -> tuple[int, int]:
        """Return how many images are put through the network at least and at most, counted as whole forwards."""
        images = (2 + self.recommended) * sum(min(len(split), self.limit or len(split)) for split in job.splits)
        least = len(self.moves(job))
        more = len(job.layers.layers) * max(self.most - self.draws, 0)
        return images * least, images * (least + more)

    def describe(self, job: Job) -> str:
        """Return what will be done in one line."""
        least, most = self.forwards(job)
        return (
            f"interventions: {len(job.layers.layers)} layers moved one at a time, each beside {self.draws} random "
            f"moves, {max(self.draws, self.most)} where it matters: {least} to {most} forwards of one image"
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
        """Yield the cells that are not in the journal yet, one for each base, set and move; they hold no rows.

        The moves depend on the cells before them, which have to be in the journal when the next one is asked for.
        """
        judge = Judge(job, plan, self.limit)
        for base, splits in product(self.bases(job, plan, journal), _together(job)):
            for moves in self._rounds(job, base, splits, journal):
                for split in splits:
                    keys = {moved_key(base, split.name, self.limit, move.what, move.layer): move for move in moves}
                    missing = {key: move for key, move in keys.items() if key not in journal}
                    for cell in judge.cells(base, split, missing) if missing else ():
                        tick(f"{base.question} · {split.name} · {missing[cell.key].layer or base.name}")
                        yield cell

    def _rounds(self, job: Job, base: Base, splits: Sequence[Split], journal: Journal) -> Iterator[list[Move]]:
        """Yield the moves that all layers make, then more random ones of the layers for which they can decide."""
        yield self.moves(job)
        names, found = [split.name for split in splits], Moves(journal, base, self.limit)
        drawn, layers = self.draws, list(job.layers.layers)
        while drawn < self.most:
            goal = min(GROWTH * drawn, self.most)
            layers = [layer for layer in layers if found.standing(names, layer).hopeful(self.most)]
            yield [move for layer in layers for move in _random(layer, drawn, goal)]
            drawn = goal

    def meta(self, job: Job, plan: Plan, journal: Journal) -> dict[str, Any]:
        """Return the settings and bases as JSON values."""
        return {**asdict(self), "bases": [list(base) for base in self.bases(job, plan, journal)]}


def _random(layer: str, first: int, last: int) -> list[Move]:
    return [Move(f"control {draw}", layer, (layer,)) for draw in range(first, last)]


def _together(job: Job) -> list[tuple[Split, ...]]:
    """Return the sets whose mean decides how many random moves are made: the ID set alone, the OOD sets together."""
    id_split, *ood = job.splits
    return [(id_split,), tuple(ood)] if ood else [(id_split,)]


def interventions_from(
    chosen: bool | Interventions | None, limit: int | None, job: Job, plan: Plan
) -> Interventions | None:
    """Return the interventions meant; with None those on ``limit`` images, where they cost less than the scan itself.

    The scan is taken to cost 100 gradients, worth three forwards each, over the images that sharpness is measured
    on, and a forward over all sets, at every alpha; the interventions a sixth of their most: a third of the random
    moves is made, as on the embedded pair, through half of the network. Without OOD sets there are none by default.

    Raises
    ------
    UsageError
        If what is chosen is none of these, or starts from a recommended alpha on a path without both ends.
    """
    if isinstance(chosen, Interventions):
        chosen.check(plan)
        return chosen
    if isinstance(chosen, bool):
        return Interventions(limit) if chosen else None
    if chosen is not None:  # a number or "no" would be taken for True
        raise UsageError(
            f"interventions={chosen!r}: neither yes nor no",
            "True, False, or settings: Interventions(draws=3)",
        )
    found = Interventions(limit)
    sharpness = 3 * GRADIENTS * job.curvature_images if plan.measures else 0
    scan = len(plan.alphas) * (sharpness + sum(map(len, job.splits)))
    return found if len(job.splits) > 1 and found.forwards(job)[1] / 6 <= scan else None
