"""Sharpness of a network while it trains, measured without leaving a trace in the training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sharpscope.batches import as_batch, check_range, check_taken, unread
from sharpscope.curvature.estimate import Estimate, Estimates
from sharpscope.curvature.point import Point
from sharpscope.curvature.trace import Trace
from sharpscope.errors import DataError, MeasurementError, ModelError
from sharpscope.evaluate import class_count
from sharpscope.losses import cross_entropy
from sharpscope.network import Network
from sharpscope.objective import Batch, Objective, check_finite, check_finite_gradient, unfused
from sharpscope.optim.activity import finite
from sharpscope.optim.anchor import plain_name
from sharpscope.optim.projection import widened
from sharpscope.partition import Partition
from sharpscope.soundness import check_gradient
from sharpscope.tree import Tree

Measure = Callable[[Point, Partition, int], Estimates]
FEW = Trace(relative=0.2, absolute=0.02, most=16)  # a look in passing: a tenth of what a scan spends
_IGNORED = -100  # a label that torch's cross-entropy leaves out
_NAME = "batches"  # as messages call them


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Put the module into evaluation mode with gradients on; afterwards mode, grad mode and RNG are as they were.

    Inference mode is left too: inside it ``enable_grad`` alone does nothing (Lightning evaluates that way).
    """
    modes = [(sub, sub.training) for sub in module.modules()]
    devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
        try:
            module.eval()
            yield
        finally:
            for sub, training in modes:
                sub.training = training


@contextmanager
def unpatched(module: nn.Module) -> Iterator[None]:
    """Undo accelerate's patch of forwards meanwhile: an autocast within, which none around it can end."""
    patched = [sub for sub in module.modules() if {"forward", "_original_forward"} <= vars(sub).keys()]
    replaced = [(sub, sub.forward) for sub in patched]
    try:
        for sub in patched:
            sub.forward = vars(sub)["_original_forward"]
        yield
    finally:
        for sub, forward in replaced:
            sub.forward = forward


class SharpnessProbe:
    """A measure of curvature on fixed batches.

    Parameters
    ----------
    batches
        Labelled data, read and copied now: pairs or mappings, see :func:`sharpscope.batches.as_batch`.
    measure
        Default: the Hessian trace of every layer with few probes.

    Raises
    ------
    DataError
        If there is no batch or one has no labels.
    """

    def __init__(self, batches: Iterable[Any], measure: Measure = FEW, *, seed: int = 0) -> None:
        # A clone made outside inference mode can be saved for backward whatever mode the loader ran in.
        with torch.inference_mode(False), torch.random.fork_rng([]):  # a DataLoader draws a seed when it is read
            found = [(as_batch(item, _NAME, index), unread(item)) for index, item in enumerate(batches)]
            self.batches = tuple(Batch(x.clone(), y.clone()) for (x, y), _ in found if len(y))
        self._unread = frozenset(key for _, keys in found for key in keys)
        labelled = sum(int((batch.targets != _IGNORED).sum()) for batch in self.batches)
        if not labelled:
            raise DataError(f"{_NAME} holds no example to measure sharpness on", "at least one labelled batch")
        self._labelled = sum(len(batch.targets) for batch in self.batches) / labelled
        self._measure = measure
        self._seed = seed

    def check(self, module: nn.Module) -> None:
        """Raise what :meth:`__call__` would, before a training rather than in it.

        Cost: a forward of each batch, and two gradients of the first.

        Raises
        ------
        ModelError, DataError
            If weights are sharded, the model cannot take a batch or has no gradient there, or a label is none of its
            outputs.
        """
        module = _inside(module)
        check_taken(self._unread, module, _NAME)
        with self._measured(module) as (objective, weights):
            for batch in objective.batches:
                classes = class_count(objective, weights, batch.inputs, "the model", _NAME, None)
                labels = batch.targets[batch.targets != _IGNORED]
                if len(labels):
                    check_range(labels, classes, _NAME)
            names = [name for name, tensor in module.named_parameters() if tensor.is_floating_point()]
            first = replace(objective, batches=objective.batches[:1])  # whole: a forward may know its batch
            check_gradient(first, Network(module, weights, {}), weights, names)

    def __call__(self, module: nn.Module, layers: Partition) -> list[tuple[str, Estimate]]:
        """Return an estimate per layer, of the module's present weights in float32, dropout off.

        Never touches ``.grad``. The module's batch statistics, mode, grad mode and all random states are restored.

        Raises
        ------
        ModelError
            If weights are sharded.
        MeasurementError
            If the loss or a derivative is no finite number, as of a run that diverged.
        """
        module = _inside(module)
        names = _named(module, layers)
        with self._measured(module) as (objective, weights):
            point = Point(objective, weights, names.names)
            check_finite(point.loss, "the present weights")
            check_finite_gradient(point.gradient, "the present weights")
            try:
                return list(self._measure(point, names, self._seed))
            except ValueError:  # of NaN
                point.check_finite("the present weights")
                raise

    @contextmanager
    def _measured(self, module: nn.Module) -> Iterator[tuple[Objective, Tree]]:
        """Yield the loss on the batches, in the type of the weights, and copies of these; meanwhile all is still."""
        named = module.named_parameters()
        if sharded := next((plain_name(name) for name, tensor in named if hasattr(tensor, "placements")), None):
            raise ModelError(f"{sharded!r} is sharded: its curvature needs the whole network", "leave out batches=...")
        device = next(module.parameters()).device
        with undisturbed(module), unpatched(module), torch.autocast(device.type, enabled=False), unfused():
            weights = {name: _single(tensor) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
            dtype = next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
            moved = (batch.to(device) for batch in self.batches)
            batches = tuple(Batch(x.to(dtype) if x.is_floating_point() else x, y) for x, y in moved)
            yield Objective(Network(module, weights, {}).forward, self._loss, batches), weights

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the summed loss, as much larger as labels are fewer than examples: the mean is over the labels.

        No example is left out in place of that: a forward may know its batch.
        """
        return cross_entropy(outputs, targets) * self._labelled

    def lines(self, module: nn.Module, layers: Partition, step: int) -> Iterator[dict[str, Any]]:
        """Yield one line of an audit log per layer; without a value where there is none, as of a run that diverged."""
        name = getattr(self._measure, "name", "sharpness")
        try:
            rows = self(module, layers)
        except MeasurementError:  # a look in passing must not end the training
            rows = [(layer, Estimate(math.nan, math.inf, 0, False, np.zeros(0))) for layer in layers.layers]
        for layer, found in rows:
            yield {
                "kind": "sharpness",
                "step": step,
                "layer": layer,
                "measure": name,
                "value": finite(found.value),
                "stderr": finite(found.stderr),
                "draws": found.draws,
                "converged": found.converged,
            }


def _inside(module: nn.Module) -> nn.Module:
    """Return the module that was wrapped for several processes.

    The wrapper's forward sends buffers: a process with more batches than others, or the only one that measures, would
    wait for them for ever.
    """
    wrapper = type(module).__name__ == "DistributedDataParallel"
    return module.get_submodule("module") if wrapper else module


def _named(module: nn.Module, layers: Partition) -> Partition:
    """Return the layers by the names that the module, wrapped or not, has for what it has of their parameters."""
    named = {plain_name(name): name for name, _ in module.named_parameters()}
    known = {
        layer: tuple(named[plain] for plain in map(plain_name, names) if plain in named)
        for layer, names in layers.layers.items()
    }
    return Partition({layer: names for layer, names in known.items() if names})


def _single(tensor: Tensor) -> Tensor:
    """Return a copy that nothing else writes to, half precision as float32; counters keep their type."""
    copy = tensor.detach().clone()
    return widened([copy])[0]
