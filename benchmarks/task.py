"""What is asked of every tool, in the same words, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from towers import Data, Size, Tower, images, tower

from sharpscope.curvature.estimate import mean_and_error
from sharpscope.partition import layers


@dataclass(frozen=True)
class Target:
    """Accuracy that ends a measurement; the same for all tools.

    A trace is done when its standard error is at most ``relative * |trace|`` or ``floor``; a rival looks from
    ``first`` draws on, as the variance of fewer says little (sharpscope has a better one and its own default).
    A top eigenvalue is done within ``eigenvalue`` of the reference.
    """

    floor: float
    relative: float = 0.05
    absolute: float = 0.005
    eigenvalue: float = 0.01
    first: int = 5
    most: int = 64

    def met(self, drawn: list[float]) -> bool:
        """Return whether the draws so far are enough."""
        mean, error = mean_and_error(drawn)
        return len(drawn) >= self.first and error <= max(self.relative * abs(mean), self.floor)


class Answer(NamedTuple):
    """One layer of one measure: value, standard error or residual, draws or steps, Hessian products paid."""

    stage: str  # "kernels", "setup", "trace", "lambda_max", "model"
    layer: str
    value: float = math.nan
    error: float = math.nan
    draws: int = 0
    products: int = 0
    met: bool = True
    history: tuple[float, ...] = ()


@dataclass(frozen=True)
class Task:
    """A network at its weights, the images, the layers, the target and the settings found for the rivals."""

    size: Size
    weights: dict[str, Tensor]
    data: Data
    target: Target
    device: str
    seed: int  # of start vectors, for which the settings were searched
    round: int  # of probes: repeats draw others, so that luck in stopping shows
    settings: dict[str, Any]  # layer -> smallest setting of this tool that meets the eigenvalue's target

    def module(self, attention: str = "eager", dtype: torch.dtype = torch.float32) -> Tower:
        """Return the network; rivals need unfused attention, which has a second derivative."""
        model = tower(self.size, attention)
        model.load_state_dict(self.weights)
        return model.to(self.device, dtype)

    @cached_property
    def layers(self) -> dict[str, tuple[str, ...]]:
        """Layer id -> tensor names."""
        return dict(layers(tower(self.size, "eager")).layers)

    @property
    def whole(self) -> tuple[Tensor, Tensor]:
        """All images as one batch."""
        return torch.cat([x for x, _ in self.data]), torch.cat([y for _, y in self.data])


Tool = Callable[[Task], Iterator[Answer]]


def task(size: Size, state: dict[str, Any], count: int, device: str, seed: int = 0) -> Task:
    """Return the task of a state: weights, and where known floor, round and settings."""
    data = tuple((x.to(device), y.to(device)) for x, y in images(size, count))
    target = Target(state.get("floor", math.nan))
    return Task(size, state["weights"], data, target, device, seed, state.get("round", 0), state.get("settings", {}))


def draw_until_met(draw: Callable[[], float], target: Target) -> tuple[list[float], bool]:
    """Return single probes of one layer, drawn one by one until they meet the target, and whether they did.

    What the rivals leave to their users: none of them stops at a standard error.
    """
    drawn: list[float] = []
    while len(drawn) < target.most and not (len(drawn) >= target.first and target.met(drawn)):
        drawn.append(draw())
    return drawn, target.met(drawn)


def trace_answer(layer: str, draw: Callable[[], float], target: Target) -> Answer:
    """Return the trace of a layer from own probes."""
    drawn, met = draw_until_met(draw, target)
    value, error = mean_and_error(drawn)
    return Answer("trace", layer, value, error, len(drawn), len(drawn), met, tuple(drawn))


class Flat:
    """The Hessian block of some tensors of a module as a product of flat vectors; plain double backward.

    Parameters
    ----------
    module, names, data
        The network, the tensors of the block, equal or unequal batches.
    keep
        Keep the graph of every batch's gradient, if they fit; else it is recomputed in each product.
    """

    def __init__(self, module: nn.Module, names: tuple[str, ...], data: Data, *, keep: bool) -> None:
        own = dict(module.named_parameters())
        self.parameters = [own[name] for name in names]
        for name, parameter in own.items():
            parameter.requires_grad_(name in names)
        self._module, self.data = module, data
        self._examples = sum(len(targets) for _, targets in data)
        self.size = sum(parameter.numel() for parameter in self.parameters)
        self.products = 0
        self._kept = self._graphs() if keep else None

    def _graphs(self) -> list[tuple[Tensor, ...]] | None:
        """Return the graphs of all batches, or None if products would have too little memory beside them."""
        try:
            graphs = [self.gradient(batch) for batch in self.data]
        except torch.OutOfMemoryError:
            return None
        if not graphs[0][0].is_cuda:
            return graphs
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return graphs if free > 0.4 * total else None

    def gradient(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Return the gradient of the batch's part of the mean loss, with its graph."""
        loss = nn.functional.cross_entropy(self._module(batch[0]), batch[1], reduction="sum") / self._examples
        return torch.autograd.grad(loss, self.parameters, create_graph=True)

    def __call__(self, v: Tensor) -> Tensor:
        """Return ``H_ll v``, flat."""
        self.products += 1
        total = torch.zeros_like(v)
        for gradient in self._kept or map(self.gradient, self.data):
            total += self._part(gradient, v)
        return total

    def probe(self, draw: Callable[[], Tensor]) -> float:
        """Return an unbiased guess of the trace: the sum over batches of ``v' H v``, with a draw of v for each."""
        self.products += 1
        found = []
        for gradient in self._kept or map(self.gradient, self.data):
            v = draw()
            found.append(float(v @ self._part(gradient, v)))
        return math.fsum(found)

    def _part(self, gradient: tuple[Tensor, ...], v: Tensor) -> Tensor:
        flat = v.split([parameter.numel() for parameter in self.parameters])
        pieces = [a.view_as(p) for a, p in zip(flat, self.parameters, strict=True)]
        image = torch.autograd.grad(gradient, self.parameters, pieces, retain_graph=self._kept is not None)
        return torch.cat([tensor.reshape(-1) for tensor in image])

    def numpy(self, v: np.ndarray) -> np.ndarray:
        """Return the product for scipy."""
        like = self.parameters[0]
        return self(torch.as_tensor(v.reshape(-1), dtype=like.dtype, device=like.device)).cpu().numpy()
