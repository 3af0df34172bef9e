"""Whether a scan in shards (FSDP2) fits where the scan of one GPU does not, and finds the same numbers.

Usage, from the root of the repository, on a machine with two or more GPUs::

    PYTHONPATH=. python benchmarks/sharded.py --size b32 --out benchmarks/results/sharded-b32-h200.json

One process scans with all the memory there is, then with a limit that torch's allocator keeps, which is lowered until
the scan runs out of memory whatever it does. Under that limit the model in shards over all processes must be scanned.
On a CPU nothing is limited and only the numbers are compared.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from machine import facts, versions
from scaling import gap, weights
from scaling_worker import ends, in_shards, loader
from towers import SIZES

import sharpscope
from sharpscope.curvature.lanczos import Eigenvalue
from sharpscope.curvature.trace import Trace
from sharpscope.errors import SharpscopeError
from sharpscope.perturbation import MSharpness
from sharpscope.ranks import joined, launched

STEP = 0.85  # of the limit that is lowered


def scan(chosen: argparse.Namespace, nets: Any, name: str, memory: int | None) -> dict[str, Any]:
    """Scan one alpha between the ends; return peaks of all processes, and what was said if it did not end well."""
    cuda, said, notes = chosen.device == "cuda", None, []
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    try:
        notes = measured(chosen, nets, name, memory).meta["warnings"]
    except (SharpscopeError, torch.OutOfMemoryError) as error:
        said = str(error).splitlines()[0]
    seconds = round(time.perf_counter() - begun, 2)
    with joined() as ranks:
        peaks = ranks.gathered([torch.cuda.max_memory_allocated() if cuda else None])
    found = {"run": name, "processes": len(peaks), "seconds": seconds, "peak_bytes": peaks, "error": said}
    return {**found, "budget_bytes": memory, "notes": notes}


def measured(chosen: argparse.Namespace, nets: Any, name: str, memory: int | None) -> Any:
    """Return the scan."""
    return sharpscope.scan(
        *nets,
        loader(SIZES[chosen.size], chosen.images, 1),
        alphas=[0.5],
        measures=[Trace(most=2), Eigenvalue(most=3), MSharpness(m=8)],
        limit=chosen.images,
        batch_size=chosen.images // 2,
        precision="highest",
        device=chosen.device,
        memory=memory,
        out=chosen.work / name,
        fresh=True,
        progress=False,
    )


def worker(chosen: argparse.Namespace) -> None:
    """Do the runs of this torchrun; the first process writes what came out."""
    processes = int(os.environ["WORLD_SIZE"])
    with launched(chosen.device) as leads:
        nets = ends(SIZES[chosen.size], chosen)
        if processes == 1:
            rows = alone(chosen, nets)
        else:
            limit = json.loads(done(chosen, 1).read_text())[-1]["budget_bytes"]
            nets = [in_shards(net, chosen.device, on_host=i > 0) for i, net in enumerate(nets)]
            rows = [scan(chosen, nets, "in shards", limit)]
        if leads:
            done(chosen, processes).write_text(json.dumps(rows))


def alone(chosen: argparse.Namespace, nets: Any) -> list[dict[str, Any]]:
    """Return the runs of one process: without a limit, then with ever lower ones, down to the first that is too low."""
    rows = [scan(chosen, nets, "alone", None)]
    limit = chosen.sizes * sum(tensor.nbytes for tensor in nets[0].parameters())
    while chosen.device == "cuda" and rows[-1]["error"] is None and len(rows) < 9:
        rows.append(scan(chosen, nets, "alone, limited", int(limit)))
        limit *= STEP
    return rows


def done(chosen: argparse.Namespace, processes: int) -> Path:
    """Return the file with the runs of a torchrun."""
    return Path(chosen.work / f"sharded-{processes}.json")


def main() -> None:
    """Run and compare, or be one of the processes that do it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=max(torch.cuda.device_count(), 2))
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--sizes", type=float, default=9.5, help="the first limit, in the size of the weights")
    parser.add_argument("--trained", type=int, nargs=2, default=(30, 60), help="optimiser steps of the two ends")
    parser.add_argument("--work", type=Path, default=Path("work/sharded"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        worker(chosen)
        return
    weights(chosen)
    rows = []
    for count in (1, chosen.processes):
        if done(chosen, count).exists():  # a call of these settings that was cut goes on here
            rows += json.loads(done(chosen, count).read_text())
            continue
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command = [sys.executable, *torchrun, __file__, *sys.argv[1:], "--worker", "--work", str(chosen.work)]
        subprocess.run(command, check=True)
        rows += json.loads(done(chosen, count).read_text())
    said = {k: v for k, v in vars(chosen).items() if k not in ("out", "work", "worker")}
    there = rows[-1]["error"] is None
    found = {"settings": said, "rows": rows, "gap": gap(chosen.work, "alone", "in shards") if there else None}
    print(json.dumps(found, indent=1))
    if chosen.out:
        found |= {"versions": versions(), "machine": facts(chosen.device, torch.get_num_threads())}
        chosen.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
