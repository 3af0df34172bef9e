"""What the measures of a scan cost at the first alpha and at the next ones, where eigenvectors are known from before.

Usage, from the root of the repository::

    PYTHONPATH=. python benchmarks/path.py --size b32 --device cuda --out benchmarks/results/path-b32-h200.json

The start is the network of ``towers.py`` in a state of training, the end the same trained on. The unit is one gradient
over the same examples, timed before and after each point in the quickest way: in batches as large as ``--unit``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path as FilePath
from statistics import median
from typing import Any

import torch
from machine import facts, versions
from towers import SIZES, STATES, images, tower, train

from sharpscope.budget import limited
from sharpscope.curvature.point import Point
from sharpscope.curvature.workspace import Workspace
from sharpscope.losses import cross_entropy
from sharpscope.measures import measures_from
from sharpscope.memory import Memory
from sharpscope.network import network
from sharpscope.objective import Batch, Objective
from sharpscope.partition import layers
from sharpscope.path import Path
from sharpscope.precision import matmul_precision
from sharpscope.tree import norm

MEASURES = ("trace", "lambda_max", "m_sharpness")


def seconds(work: Any) -> tuple[float, Any]:
    """Return how long the work took, the device idle before and after, and its result."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begun = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun, result


def at(
    objective: Objective, plain: Objective, weights: Any, partition: Any, memory: Any, workspace: Workspace
) -> tuple[dict[str, Any], Any]:
    """Return the cost of each measure at one point, and what the next point may start from."""
    names = partition.names
    plain.gradient(weights, names)
    gradients = [seconds(lambda: plain.gradient(weights, names))[0] for _ in range(2)]
    setup, point = seconds(lambda: Point(objective, weights, names, memory=memory, workspace=workspace))
    found: dict[str, Any] = {"seconds": {"setup": setup}, "products": {}, "unconverged": {}}
    for measure in measures_from(MEASURES):
        before = dict(point.counts)
        took, estimates = seconds(lambda measure=measure: dict(measure(point, partition, 0)))
        found["seconds"][measure.name] = took
        found["products"][measure.name] = {k: n - before.get(k, 0) for k, n in point.counts.items()}
        found["unconverged"][measure.name] = [layer for layer, e in estimates.items() if not e.converged]
    gradients += [seconds(lambda: plain.gradient(weights, names))[0] for _ in range(2)]
    found["gradient_seconds_in_its_batches"] = min(
        seconds(lambda: objective.gradient(weights, names))[0] for _ in range(2)
    )
    unit = median(gradients)
    found["gradient_seconds"] = unit
    found["gradients"] = {name: took / unit for name, took in found["seconds"].items()}
    cuda = point.gradient[names[0]].is_cuda
    found["kept_graphs"], found["graph_budget"] = len(point._graphs.kept), point._place.budget
    found["peak_bytes"] = torch.cuda.max_memory_allocated() if cuda else None
    return found, point.found


def main() -> None:
    """Measure, print a line per alpha, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--state", choices=STATES, default="trained")
    parser.add_argument("--granularity", choices=("block", "tensor"), default="block")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("highest", "high"), default="high")
    parser.add_argument("--alphas", type=int, default=3, help="how many, from 0 in steps of a tenth or of --move")
    parser.add_argument("--move", type=float, nargs="+", help="from alpha to alpha, over the weights' norm")
    parser.add_argument("--images", type=int, nargs="+", help="measured images; default: as in towers.py")
    parser.add_argument("--batch", type=int, nargs="+", help="images in a batch, for each number of images")
    parser.add_argument("--unit", type=int, default=512, help="images in a batch of the gradient that is the unit")
    parser.add_argument("--memory", type=int, help="GiB of the GPU that may be taken; default: all")
    parser.add_argument("--out", type=FilePath)
    chosen = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with matmul_precision(chosen.precision), limited(chosen.memory and chosen.memory * 2**30, chosen.device):
        ends = [train(SIZES[chosen.size], state, chosen.device)[0] for state in (chosen.state, "converged")]
        counts = chosen.images or [SIZES[chosen.size].images]
        cases = zip(counts, chosen.batch or [SIZES[chosen.size].batch] * len(counts), strict=True)
        for (count, batch), move in product(cases, chosen.move or [None]):
            for row in along(chosen, ends, count, batch, move):
                rows.append(row)
                print(row, flush=True)
                if chosen.out:
                    write(chosen, rows)


def along(
    chosen: argparse.Namespace, ends: list[dict[str, torch.Tensor]], count: int, batch: int, move: float | None
) -> Iterator[dict[str, Any]]:
    """Yield what each alpha costs, for so many images."""
    size, device = SIZES[chosen.size], torch.device(chosen.device)
    net = network(tower(size, "sdpa"), "the tower")
    path = Path(*({n: w[n].to(device) for n in net.parameters} for w in ends))
    buffers, parted = {n: b.to(device) for n, b in net.buffers.items()}, layers(net.module, chosen.granularity)
    x, y = (torch.cat(both).to(device) for both in zip(*images(size, count), strict=True))
    batches = {b: tuple(map(Batch, x.split(b), y.split(b))) for b in (batch, chosen.unit)}
    objective = Objective(net.forward, cross_entropy, batches[batch])
    plain = Objective(net.forward, cross_entropy, batches[chosen.unit])
    memory, workspace = Memory(None), Workspace()
    warm = Point(Objective(net.forward, cross_entropy, objective.batches[:1]), {**buffers, **path(0.0)}, parted.names)
    warm.product(warm.gradient)  # kernels are compiled once in a process; that is no cost of an alpha
    warm.block_product(parted.names[:1], warm.gradient)
    del warm
    length = norm(path.delta) / norm(path.start)
    stride = 0.1 if move is None else move / length
    for index in range(chosen.alphas):
        alpha = index * stride
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        guesses = memory.before(index, path.start, 1.0 if index > 1 else 0.0)
        row, kept = at(objective, plain, {**buffers, **path(alpha)}, parted, guesses, workspace)
        memory.keep(index, kept)
        yield {"images": count, "batch": batch, "alpha": alpha, "move": stride * length, **row}


def write(chosen: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write what there is so far."""
    settings = {**vars(chosen), "out": None}
    report = {"settings": settings, "rows": rows, "versions": versions()}
    machine = facts(chosen.device, torch.get_num_threads())
    chosen.out.write_text(json.dumps({**report, "machine": machine}, indent=1) + "\n")


if __name__ == "__main__":
    main()
