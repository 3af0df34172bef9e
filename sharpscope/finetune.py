"""Robust fine-tuning of a classifier: a small loop with fixed seeds, progress as an iterator, and resume.

The image tower of a CLIP with its zero-shot head (:class:`sharpscope.models.ImageClassifier`), or any module that
gives logits; the head frozen or trained, alone first (LP-FT) or not at all; any optimiser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from sharpscope.data import Split
from sharpscope.errors import DataError, MeasurementError, MismatchError, UsageError
from sharpscope.home import at_home
from sharpscope.models.installed import first_line
from sharpscope.models.weight_files import UNREADABLE
from sharpscope.network import logits
from sharpscope.optim.anchor import checked_patterns, excluded
from sharpscope.optim.baselines import SAM

Named = list[tuple[str, nn.Parameter]]
Optimizer = torch.optim.Optimizer | SAM


@dataclass(frozen=True)
class Schedule:
    """How long and how.

    Parameters
    ----------
    steps
        Optimiser steps.
    batch_size
        Examples of a step; each epoch is a new permutation of all.
    warm_up
        Share of the steps in which the learning rate rises; it then falls to zero as a cosine.
    clip
        Largest norm of the gradient; None: any.
    seed
        Of the order of the examples. With dropout in the network, also of torch's generator.
    """

    steps: int
    batch_size: int = 128
    warm_up: float = 0.1
    clip: float | None = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if (
            self.steps < 1
            or self.batch_size < 1
            or not 0 <= self.warm_up < 1
            or (self.clip is not None and self.clip <= 0)
        ):
            raise UsageError(f"{self} cannot be meant", "steps, batch_size and clip above 0, warm_up in [0, 1)")

    def rate(self, step: int) -> float:
        """Return the share of the peak learning rate at a step, counted from 0.

        >>> [round(Schedule(steps=10, warm_up=0.2).rate(step), 3) for step in (0, 1, 2, 6, 9)]
        [0.5, 1.0, 1.0, 0.5, 0.038]
        """
        rise = self.warm_up * self.steps
        fall = max(step - rise, 0) / (self.steps - rise)
        return min((step + 1) / rise if rise else 1.0, 1.0) * (1 + math.cos(math.pi * fall)) / 2

    def chosen(self, step: int, examples: int) -> np.ndarray:
        """Return the numbers of the examples of a step; seed and step alone decide, so resuming needs no state."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = {e: np.random.default_rng([self.seed, e]).permutation(examples) for e in np.unique(places // examples)}
        return np.array([epochs[place // examples][place % examples] for place in places])


def trained(module: nn.Module, *, frozen: tuple[str, ...] = ()) -> Named:
    """Return the named parameters to train, those of ``frozen`` (regular expressions) switched off.

    Raises
    ------
    UsageError
        If a pattern matches nothing, or nothing is left.
    """
    names = [name for name, _ in module.named_parameters()]
    for pattern in checked_patterns(frozen):
        if not any(excluded(name, (pattern,)) for name in names):
            raise UsageError(f"frozen={pattern!r} matches no parameter", f"names such as {names[0]!r}")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not excluded(name, frozen))
    found = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    if not found:
        raise UsageError(f"frozen={frozen!r} leaves nothing to train", "fewer patterns")
    return found


@dataclass(frozen=True)
class Progress:
    """Where a run is: steps made, and the loss of the last, before it was made."""

    step: int
    loss: float


def finetune(
    module: nn.Module,
    data: Split,
    optimizer: Optimizer,
    schedule: Schedule,
    *,
    checkpoint: str | Path | None = None,
    every: int = 100,
    preprocess: Callable[[Tensor], Tensor] = lambda images: images,
) -> Iterator[Progress]:
    """Train in place, yielding after every step; nothing happens until the caller iterates.

    The module stays in the mode it is in: the towers of CLIP have no dropout. Learning rates are those of the
    optimiser's groups times :meth:`Schedule.rate`.

    Parameters
    ----------
    module, data, optimizer, schedule
        What is trained, on what, how.
    checkpoint, every
        A file to continue from if it is there, written every so many steps and at the end. The run that was
        interrupted then ends with the very weights of one that was not (on a GPU: unless it has dropout).
    preprocess
        Applied to each batch of inputs, e.g. an augmentation.

    Raises
    ------
    UsageError
        If the checkpoint is of another schedule or other data, or none.
    MismatchError
        If it is of another model or optimiser.
    MeasurementError
        If the loss is no finite number.
    """
    inputs, targets = _in_memory(data)
    place = None if checkpoint is None else at_home(checkpoint)
    start = _resumed(place, module, optimizer, schedule, data.fingerprint)
    peaks = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
    device = next(module.parameters()).device
    for step in range(start, schedule.steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule.rate(step)
        chosen = torch.from_numpy(schedule.chosen(step, len(targets)))
        x, y = preprocess(inputs[chosen].to(device)), targets[chosen].to(device)
        loss = _step(module, optimizer, schedule.clip, x, y)
        if not math.isfinite(loss):
            raise MeasurementError(f"the loss at step {step} is {loss}", "a smaller learning rate, or clip=1.0")
        if place is not None and ((step + 1) % every == 0 or step + 1 == schedule.steps):
            _save(place, module, optimizer, schedule, data.fingerprint, step + 1)
        yield Progress(step + 1, loss)


def _in_memory(data: Split) -> tuple[Tensor, Tensor]:
    batches = list(data)
    if not all(isinstance(batch.inputs, Tensor) for batch in batches):
        raise DataError(f"{data.name!r} has inputs of several parts", "images and class numbers")
    return torch.cat([batch.inputs for batch in batches]), data.targets


def _step(module: nn.Module, optimizer: Optimizer, clip: float | None, x: Tensor, y: Tensor) -> float:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def closure() -> float:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = cross_entropy(logits(module(x)), y)
        loss.backward()  # type: ignore[no-untyped-call]
        if clip is not None:
            clip_grad_norm_(parameters, clip)
        return float(loss.detach())

    return float(optimizer.step(closure))


def _save(path: Path, module: nn.Module, optimizer: Optimizer, schedule: Schedule, data: str, step: int) -> None:
    found = {
        "step": step,
        "schedule": asdict(schedule),
        "data": data,
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    torch.save(found, beside)
    beside.replace(path)


def _resumed(path: Path | None, module: nn.Module, optimizer: Optimizer, schedule: Schedule, data: str) -> int:
    """Return the number of steps made; with a checkpoint put module, optimiser and generator where they were."""
    if path is None or not path.exists():
        torch.manual_seed(schedule.seed)
        return 0
    found = _read(path)
    for what, mine in (("schedule", asdict(schedule)), ("data", data)):
        if found[what] != mine:
            raise UsageError(f"{path} is the checkpoint of another run: the {what} differs", "another checkpoint=...")
    try:
        optimizer.load_state_dict(found["optimizer"])
        module.load_state_dict(found["module"])
    except (RuntimeError, ValueError) as error:
        raise MismatchError(
            f"{path} is the checkpoint of another model or optimiser: {first_line(error)}", "another checkpoint=..."
        ) from error
    torch.set_rng_state(found["random"])
    return int(found["step"])


def _read(path: Path) -> dict[str, Any]:
    """Return what :func:`_save` wrote; ``UsageError`` if it is something else, or damaged."""
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")
        if not {"step", "schedule", "data", "module", "optimizer", "random"} <= found.keys():
            raise KeyError("step, schedule, data, module, optimizer or random is missing")
    except (*UNREADABLE, AttributeError) as error:
        raise UsageError(
            f"{path} is no checkpoint of finetune: {first_line(error)}", "another checkpoint=..., or move it away"
        ) from error
    return dict(found)
