"""Sharpness of a network while it trains, measured without leaving a trace in the training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sharpscope.batches import as_batch
from sharpscope.curvature.estimate import Estimate, Estimates
from sharpscope.curvature.point import Point
from sharpscope.curvature.trace import Trace
from sharpscope.errors import DataError, ModelError
from sharpscope.losses import cross_entropy
from sharpscope.network import Network
from sharpscope.objective import Batch, Objective
from sharpscope.optim.anchor import plain_name
from sharpscope.optim.projection import widened
from sharpscope.partition import Partition

Measure = Callable[[Point, Partition, int], Estimates]
FEW = Trace(relative=0.2, absolute=0.02, most=16)  # a look in passing: a tenth of what a scan spends


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
            found = [as_batch(item, "batches", index) for index, item in enumerate(batches)]
            self.batches = tuple(Batch(x.clone(), y.clone()) for x, y in found if len(y))
        if not self.batches:
            raise DataError("batches holds no example to measure sharpness on", "at least one labelled batch")
        self._measure = measure
        self._seed = seed

    def __call__(self, module: nn.Module, layers: Partition) -> list[tuple[str, Estimate]]:
        """Return an estimate per layer, of the module's present weights in float32, dropout off.

        Never touches ``.grad``. The module's batch statistics, mode, grad mode and all random states are restored.

        Raises
        ------
        ModelError
            If weights are sharded.
        """
        named = {plain_name(name): (name, tensor) for name, tensor in module.named_parameters()}
        if sharded := next((name for name, (_, tensor) in named.items() if hasattr(tensor, "placements")), None):
            raise ModelError(f"{sharded!r} is sharded: its curvature needs the whole network", "leave out batches=...")
        wanted = layers.only([name for name in layers.names if name in named])
        device = next(module.parameters()).device.type
        with undisturbed(module), unpatched(module), torch.autocast(device, enabled=False):
            weights = {name: _single(tensor) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
            names = Partition({layer: tuple(named[n][0] for n in mine) for layer, mine in wanted.layers.items()})
            point = Point(self._objective(module, weights), weights, names.names)
            return list(self._measure(point, names, self._seed))

    def _objective(self, module: nn.Module, weights: dict[str, Tensor]) -> Objective:
        first = next(iter(weights.values()))
        batches: Sequence[Batch] = [batch.to(first.device) for batch in self.batches]
        network = Network(module, weights, {})
        return Objective(network.forward, cross_entropy, tuple(batches))

    def lines(self, module: nn.Module, layers: Partition, step: int) -> Iterator[dict[str, Any]]:
        """Yield one line of an audit log per layer."""
        name = getattr(self._measure, "name", "sharpness")
        for layer, found in self(module, layers):
            yield {
                "kind": "sharpness",
                "step": step,
                "layer": layer,
                "measure": name,
                "value": found.value,
                "stderr": found.stderr if found.stderr < float("inf") else None,
                "draws": found.draws,
                "converged": found.converged,
            }


def _single(tensor: Tensor) -> Tensor:
    """Return a copy that nothing else writes to, half precision as float32; counters keep their type."""
    copy = tensor.detach().clone()
    return widened([copy])[0]
