"""The truth that every tool is compared with: float64, plain double backward, nothing of sharpscope's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from task import Flat, Task
from torch.nn.attention import SDPBackend, sdpa_kernel

from sharpscope.curvature.estimate import mean_and_error


@dataclass(frozen=True)
class Effort:
    """How much work the truth is worth.

    ``finer`` times smaller than the tools' target is the standard error of a reference trace to be, with at most
    ``most`` draws a layer, each a probe of every batch of ``batch`` images.
    """

    finer: float
    most: int
    batch: int


FIRST = 8  # draws of every layer, from which the sum of all traces is known well enough
Found = dict[str, Any]


def first(task: Task, effort: Effort, layers: Sequence[str]) -> Found:
    """Return for each of the layers the check of a product and the first draws of the trace."""
    found: Found = {}
    for layer, block in _blocks(task, effort, layers, keep=False):
        found[layer] = {"difference": _difference(block), "draws": _draws(block, FIRST)}
    return found


def rest(task: Task, effort: Effort, layers: Sequence[str], known: Found) -> Found:
    """Return for each of the layers the trace with its standard error, and the largest eigenvalue by ARPACK.

    ``known`` has the first draws of all layers, of which the smallest error that is of use follows.
    """
    floor = task.target.absolute * math.fsum(abs(mean_and_error(entry["draws"])[0]) for entry in known.values())
    found: Found = {}
    for layer, block in _blocks(task, effort, layers, keep=True):
        gap, draws = known[layer]["difference"], known[layer]["draws"]
        found[layer] = {"difference": gap, **_trace(block, draws, floor, effort), **_largest(block)}
    return found


def _blocks(task: Task, effort: Effort, layers: Sequence[str], *, keep: bool) -> Iterator[tuple[str, Flat]]:
    """Yield each layer's block, in float64; no two at a time."""
    module = task.module("sdpa", torch.float64)
    x, y = task.whole
    data = tuple(zip(x.double().split(effort.batch), y.split(effort.batch), strict=True))
    with sdpa_kernel(SDPBackend.MATH):
        for layer in layers:
            yield layer, Flat(module, task.layers[layer], data, keep=keep)


def _rademacher(block: Flat, generator: torch.Generator) -> torch.Tensor:
    like = block.parameters[0]
    signs = torch.randint(0, 2, (block.size,), generator=generator, device=like.device)
    return (2 * signs - 1).to(like.dtype)


def _draws(block: Flat, count: int, seed: int = 77) -> list[float]:
    generator = torch.Generator(block.parameters[0].device).manual_seed(seed)
    return [block.probe(partial(_rademacher, block, generator)) for _ in range(count)]


def _trace(block: Flat, drawn: list[float], floor: float, effort: Effort) -> dict[str, Any]:
    value, error = mean_and_error(drawn)
    while error > max(0.05 * abs(value), floor) / effort.finer and len(drawn) < effort.most:
        drawn = drawn + _draws(block, 8, seed=77 + len(drawn))
        value, error = mean_and_error(drawn)
    return {"trace": value, "trace_error": error, "trace_draws": len(drawn)}


def _largest(block: Flat) -> dict[str, Any]:
    before = block.products
    start = np.random.default_rng(5).standard_normal(block.size)
    operator = LinearOperator((block.size, block.size), matvec=block.numpy, dtype=np.float64)
    width = min(16, block.size)
    values, vectors = eigsh(operator, k=1, which="LA", tol=1e-4, v0=start, ncv=width)
    residual = np.linalg.norm(block.numpy(vectors[:, 0]) - values[0] * vectors[:, 0])
    return {
        "lambda_max": float(values[0]),
        "lambda_residual": float(residual),
        "lambda_products": block.products - before,
    }


def _difference(block: Flat) -> float:
    """Return the relative gap between a product and a central difference of gradients: the reference's own check."""
    generator = torch.Generator(block.parameters[0].device).manual_seed(3)
    v = _rademacher(block, generator) / math.sqrt(block.size)
    step, sides = 1e-5, []
    pieces = v.split([p.numel() for p in block.parameters])
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, piece in zip(block.parameters, pieces, strict=True):
                parameter += sign * step * piece.view_as(parameter)
        batches = [block.gradient(batch) for batch in block.data]
        sides.append(sum(torch.cat([g.detach().reshape(-1) for g in batch]) for batch in batches))
    with torch.no_grad():
        for parameter, piece in zip(block.parameters, pieces, strict=True):
            parameter += step * piece.view_as(parameter)
    difference = (sides[0] - sides[1]) / (2 * step)
    image = block(v)
    return float((difference - image).norm() / image.norm())
