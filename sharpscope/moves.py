"""One layer, or several, moved from a base on the path: to the other end, or in a random direction as far."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sharpscope.data import Split
from sharpscope.evaluate import joined, judged
from sharpscope.job import Job
from sharpscope.objective import Batch, check_finite
from sharpscope.plan import Plan
from sharpscope.replay import Replay
from sharpscope.stragglers.standing import Base
from sharpscope.table import Cell
from sharpscope.tree import Tree, gaussian, norm, select

BATCHES = 2  # of a plan's size at once: a forward without a graph takes less memory


@dataclass(frozen=True)
class Move:
    """What is moved: nothing (``"base"``), a layer, a layer in a random direction (``"control 0"``), or several."""

    what: str
    layer: str = ""
    layers: tuple[str, ...] = ()

    @property
    def draw(self) -> int | None:
        """Number of the random direction, None for a move to the other end."""
        return int(self.what.removeprefix("control ")) if self.what.startswith("control ") else None


def in_words(base: Base, move: Move) -> str:
    """Return the move as messages name it."""
    end = "a random direction" if move.draw is not None else "zero-shot" if base.target == 0 else "fine-tuned"
    return f"{base.name}, {move.layer!r} moved to {end}" if move.layers else base.name


def moved(job: Job, base: Base, weights: Tree, move: Move, seed: int) -> Tree:
    """Return the tensors that a move changes, as they are after it.

    Parameters
    ----------
    job, base, weights
        The path, the base and all weights there.
    move, seed
        A random direction is normal, determined by the seed, its number and each tensor's name, and scaled so that
        every tensor goes as far as in the real move. Running statistics are left alone by it.
    """
    end = job.path.start if base.target == 0.0 else job.path.end
    if move.draw is None:
        return select(end, [name for layer in move.layers for name in job.path_layers.layers[layer]])
    here = select(weights, [name for layer in move.layers for name in job.layers.layers[layer]])
    directions = gaussian(here, "control", seed, move.draw)
    return {name: _stepped(tensor, end[name], directions[name]) for name, tensor in here.items()}


def _stepped(here: torch.Tensor, end: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    length = norm({"": end - here})
    return here if length == 0 else here + direction * (length / norm({"": direction}))


def replays_exactly(job: Job, batch: Batch) -> bool:
    """Return whether forwards from a moved layer on give the bits of full ones; tried for every layer on a batch."""
    replay, weights = Replay(job.network), job.weights(0.0)
    replay.record(weights, batch.inputs)
    return all(
        replay.agrees({**weights, **select(job.path.end, names)}, batch.inputs, names)
        for layer, names in job.path_layers.layers.items()
        if layer in job.layers.layers
    )


class Judge:
    """What the network answers at moved weights, image by image.

    Parameters
    ----------
    job, plan
        Network, path and data; size of the batches, and the seed of images and random directions.
    limit
        Most images per set, drawn by class; None: all.
    """

    def __init__(self, job: Job, plan: Plan, limit: int | None) -> None:
        self._job, self._plan, self._limit = job, plan, limit
        self._forward: _Forward | None = None

    def cells(self, base: Base, split: Split, moves: Mapping[str, Move]) -> Iterator[Cell]:
        """Yield a cell for every move, by its key: correctness; of moves to the other end confidence and loss as well.

        Raises
        ------
        MeasurementError
            If the loss after a move is not finite.
        """
        sample = split.sample(self._limit, self._plan.seed, BATCHES * self._plan.batch_size)
        batches = [batch.to(self._job.device) for batch in sample]
        self._forward = self._forward or _Forward(self._job, batches[0])
        found = self._answers(self._forward, base, moves, batches, self._job.columns(split))
        for key, move in moves.items():
            check_finite(float(found[key]["loss"].mean()), f"{in_words(base, move)} on {split.name!r}")
            yield Cell(key, (), found[key] if move.draw is None else {"correct": found[key]["correct"]})

    @torch.no_grad()
    def _answers(
        self,
        forward: _Forward,
        base: Base,
        moves: Mapping[str, Move],
        batches: list[Batch],
        columns: torch.Tensor | None,
    ) -> dict[str, dict[str, Any]]:
        """Return correctness, confidence and loss of every move, by its key."""
        job, weights = self._job, self._job.weights(base.alpha)
        found: list[dict[str, dict[str, torch.Tensor]]] = []
        for inputs, targets in job.evaluators.mine(batches, len(batches)):
            logits = forward.at_base(weights, inputs)
            answers = {}
            for key, move in moves.items():
                if move.layers:
                    changed = moved(job, base, weights, move, self._plan.seed)
                    logits_there = forward.at({**weights, **changed}, inputs, changed.keys())
                else:
                    logits_there = logits
                answers[key] = judged(logits_there, targets, columns)
            found.append(answers)
        parts = job.evaluators.gathered(found)
        return {key: joined([answers[key] for answers in parts]) for key in moves}


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
