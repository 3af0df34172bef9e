"""The truth that every tool is compared with: float64, plain double backward, nothing of sharpscope's."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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
    ``most`` probes a layer; ``keep`` graphs (memory) or recompute them in each product.
    """

    finer: float
    most: int
    keep: bool


def reference(task: Task, effort: Effort, progress: Path) -> dict[str, Any]:
    """Return per layer the trace with its standard error, and the largest eigenvalue by ARPACK.

    Layers that are done are kept in ``progress``, so that a killed run goes on where it was.
    """
    module = task.module("sdpa", torch.float64)
    data = tuple((x.double(), y) for x, y in task.data)
    found: dict[str, Any] = json.loads(progress.read_text()) if progress.exists() else {}
    with sdpa_kernel(SDPBackend.MATH):
        for layer, names in task.layers.items():
            if layer not in found:
                gap = _difference(Flat(module, names, data, keep=False))  # moves the weights: before graphs are kept
                found[layer] = {"difference": gap, "draws": _draws(Flat(module, names, data, keep=effort.keep), 8)}
                progress.write_text(json.dumps(found))
        floor = task.target.absolute * math.fsum(_size(entry) for entry in found.values())
        for layer, names in task.layers.items():
            if "trace" not in found[layer]:
                block = Flat(module, names, data, keep=effort.keep)
                found[layer] |= _trace(block, found[layer].pop("draws"), floor, effort) | _largest(block)
                progress.write_text(json.dumps(found))
    return found


def _size(entry: dict[str, Any]) -> float:
    """Return the size of a layer's trace: of a finished layer, or from the first draws of one to be done."""
    return abs(entry["trace"] if "trace" in entry else mean_and_error(entry["draws"])[0])


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
