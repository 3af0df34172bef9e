"""Whether a scan in shards (FSDP2) fits where the scan of one GPU does not, and finds the same numbers.

Usage, from the root of the repository, on a machine with two or more GPUs::

    PYTHONPATH=. python benchmarks/sharded.py --size b32 --out benchmarks/results/sharded-b32-h200.json

One process scans with all the memory there is. Two runs have a limit: one process, which must run out of memory, and
the model in shards over all processes, which must not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from machine import facts, versions
from scaling import ends, gap, in_shards, loader, turn, weights
from towers import SIZES

import sharpscope
from sharpscope.curvature.lanczos import Eigenvalue
from sharpscope.curvature.trace import Trace
from sharpscope.errors import SharpscopeError
from sharpscope.perturbation import MSharpness
from sharpscope.ranks import joined, launched


def scan(chosen: argparse.Namespace, nets: Any, name: str, memory: int | None) -> dict[str, Any]:
    """Scan one alpha between the ends; return peaks of all processes, or what was said instead."""
    if chosen.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    said = None
    try:
        with turn(chosen):
            result = measured(chosen, nets, name, memory)
        notes = result.meta["warnings"]
    except SharpscopeError as error:
        said, notes = str(error), []
    with joined() as ranks:
        peaks = ranks.gathered([torch.cuda.max_memory_allocated() if chosen.device == "cuda" else 0])
    return {"run": name, "processes": len(peaks), "limit": memory, "peak_bytes": peaks, "error": said, "notes": notes}


def measured(chosen: argparse.Namespace, nets: Any, name: str, memory: int | None) -> Any:
    """Return the scan."""
    return sharpscope.scan(
        *nets,
        loader(SIZES[chosen.size], chosen.images, 1),
        alphas=[0.5],
        measures=[Trace(most=2), Eigenvalue(most=3), MSharpness(m=8)],
        limit=chosen.images,
        batch_size=chosen.images // 2,
        precision="high",
        device=chosen.device,
        memory=memory,
        out=chosen.work / name,
        fresh=True,
        progress=False,
    )


def worker(chosen: argparse.Namespace) -> None:
    """Do the runs of this torchrun; the first process writes what came out."""
    with launched(chosen.device) as leads:
        nets = ends(SIZES[chosen.size], chosen)
        if int(os.environ["WORLD_SIZE"]) == 1:
            rows = [scan(chosen, nets, "alone", None)]
            size = sum(tensor.nbytes for tensor in nets[0].parameters())
            limit = int(chosen.sizes * size) if chosen.device == "cuda" else None
            rows.append(scan(chosen, nets, "alone, limited", limit))
        else:
            alone = json.loads((chosen.work / "sharded-1.json").read_text())
            nets = [in_shards(net, chosen.device, on_host=i > 0) for i, net in enumerate(nets)]
            rows = [scan(chosen, nets, "in shards, limited", alone[1]["limit"])]
        if leads:
            (chosen.work / f"sharded-{os.environ['WORLD_SIZE']}.json").write_text(json.dumps(rows))


def main() -> None:
    """Run and compare, or be one of the processes that do it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=max(torch.cuda.device_count(), 2))
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--sizes", type=float, default=9.5, help="the limit, in bytes of the model's weights")
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
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command = [sys.executable, *torchrun, __file__, *sys.argv[1:], "--worker", "--work", str(chosen.work)]
        spare, own = torch.cuda.device_count() - 1, {}
        if count == 1 and spare >= chosen.processes:  # beside what else runs on this machine, see scaling.py
            own = {"CUDA_VISIBLE_DEVICES": str(spare), "SHARED_MACHINE": "1"}
        subprocess.run(command, check=True, env={**os.environ, **own})
        rows += json.loads((chosen.work / f"sharded-{count}.json").read_text())
    found = {"rows": rows, "gap": gap(chosen.work, "alone", "in shards, limited"), "versions": versions()}
    found |= {"settings": {k: v for k, v in vars(chosen).items() if k not in ("out", "work", "worker")}}
    print(json.dumps([rows, found["gap"]], indent=1))
    if chosen.out:
        chosen.out.write_text(json.dumps({**found, "machine": facts(chosen.device, 1)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
