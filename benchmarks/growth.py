r"""What products cost as images, network and number of layers grow, in gradients over the same images; peak memory.

Usage, from the root of the repository::

    PYTHONPATH=. python benchmarks/growth.py --device cuda --out benchmarks/results/growth-h200.json \
        --case b32,512,128 b32,2048,128 b32,8192,128 b16,512,64 l14,256,32

A case is a size of ``towers.py``, a number of images, and the images of a batch. Weights and images are random, as the
cost does not depend on them. Timed is what a scan repeats: the move to a new point, a product of the whole matrix, and
one of all layers' blocks, as a step of all their eigenvector searches takes. The unit is one gradient over the same
images in the same batches or in batches of 512, whichever is quicker.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import facts, versions
from path import seconds
from towers import SIZES, tower

from sharpscope.budget import limited
from sharpscope.capacity import free_bytes
from sharpscope.curvature.graphs import HEADROOM
from sharpscope.curvature.point import Point
from sharpscope.curvature.workspace import Workspace
from sharpscope.losses import cross_entropy
from sharpscope.network import network
from sharpscope.objective import Batch, Objective
from sharpscope.partition import Granularity, partition
from sharpscope.precision import matmul_precision
from sharpscope.tree import Tree, rademacher, select

LARGE = 512


def timed(work: Any, repeats: int = 3) -> float:
    """Return the median time of the work after it was done once."""
    work()
    return median(seconds(work)[0] for _ in range(repeats))


def unit(forward: Any, images: torch.Tensor, labels: torch.Tensor, batch: int, weights: Tree, names: Any) -> float:
    """Return the time of the quickest plain gradient."""
    found = []
    for size in {batch, max(batch, min(LARGE, 4 * batch))}:
        plain = Objective(forward, cross_entropy, tuple(map(Batch, images.split(size), labels.split(size))))
        found.append(timed(lambda plain=plain: plain.gradient(weights, names), 2))
    return min(found)


def case(text: str, device: torch.device, granularity: Granularity) -> dict[str, Any]:
    """Return the costs of one case."""
    name, count, batch = text.split(",")
    size, images_count, in_batch = SIZES[name], int(count), int(batch)
    net = network(tower(size, "sdpa").to(device), "the tower")
    layers, weights = partition(tuple(net.parameters), granularity=granularity), {**net.parameters, **net.buffers}
    drawn = torch.Generator(device=device).manual_seed(0)
    images = torch.randn(images_count, 3, size.pixels, size.pixels, device=device, generator=drawn)
    labels = torch.randint(size.classes, (images_count,), device=device, generator=drawn)
    one = unit(net.forward, images, labels, in_batch, weights, layers.names)
    batches = tuple(map(Batch, images.split(in_batch), labels.split(in_batch)))
    objective, workspace = Objective(net.forward, cross_entropy, batches), Workspace()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    budget = int(free_bytes(device) * HEADROOM)
    first, point = seconds(lambda: Point(objective, weights, layers.names, workspace=workspace))
    move = timed(lambda: Point(objective, weights, layers.names, workspace=workspace), 2)
    v = rademacher(point.gradient, 0)
    vectors = {layer: select(v, names) for layer, names in layers.layers.items()}
    recording, _ = seconds(lambda: (point.product(v), point.block_products(vectors)))
    spent = {
        "move": move,
        "whole_product": timed(lambda: point.product(v), 2),
        "all_blocks": timed(lambda: point.block_products(vectors), 2),
    }
    return {
        "size": name, "images": images_count, "batch": in_batch,
        "layers": len(layers.layers), "granularity": granularity,
        "weights": sum(w.numel() for w in net.parameters.values()), "batches": len(batches),
        "kept_graphs": len(point._graphs.kept), "kept_bytes": point._graphs.kept_bytes, "graph_budget": budget,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "gradient_seconds": one, "gradients": {what: took / one for what, took in spent.items()},
        "once": {"first_point": first / one, "recording": recording / one},
    }  # fmt: skip


def main() -> None:
    """Measure every case, write what there is after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", default=["tiny,64,32", "tiny,128,32"])
    parser.add_argument("--granularity", choices=("block", "tensor"), default="block")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("highest", "high"), default="high")
    parser.add_argument("--memory", type=int, help="GiB of the GPU that may be taken; default: all")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    rows: list[dict[str, Any]] = []
    about = {"machine": facts(chosen.device, torch.get_num_threads()), "versions": versions()}
    with matmul_precision(chosen.precision), limited(chosen.memory and chosen.memory * 2**30, chosen.device):
        for text in chosen.case:
            rows.append(case(text, torch.device(chosen.device), chosen.granularity))
            if chosen.device == "cuda":
                torch.cuda.empty_cache()
            print(rows[-1], flush=True)
            if chosen.out:
                settings = {**vars(chosen), "out": None}
                chosen.out.write_text(json.dumps({"settings": settings, "rows": rows, **about}, indent=1) + "\n")


if __name__ == "__main__":
    main()
