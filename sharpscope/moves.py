"""One layer, or several, moved from a base on the path: to the other end, or in a random direction as far."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sharpscope.job import Job
from sharpscope.objective import Batch
from sharpscope.replay import Replay
from sharpscope.stragglers.effects import Base
from sharpscope.tree import Tree, gaussian, norm, select


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
