"""How much sooner a scan of eleven alphas ends on several GPUs, and that its numbers are those of one.

Usage, from the root of the repository, on a machine with any number of GPUs::

    PYTHONPATH=. python benchmarks/scaling.py --size b32 --out benchmarks/results/scaling-b32-h200.json

Every run is a ``torchrun`` of its own over the same weights and images: ``data`` shares the batches of every product,
``alphas`` the chains of the path (as many as the largest number of processes, in every run). Efficiency is the time
of one process over the time of all of them together, for the same plan: strong scaling. Timed is a whole
``sharpscope.scan`` into an empty folder, from reading the data to the result on disk, after a short scan that compiles
kernels; the start of the processes and the loading of weights are not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from machine import facts, versions
from safetensors.torch import load_file, save_file
from towers import SIZES, Size, Tower, draw, tower, train

import sharpscope
from sharpscope.ranks import joined, launched
from sharpscope.result import open_result

MODES = ("data", "alphas")
Loader = list[tuple[torch.Tensor, torch.Tensor]]


def ends(size: Size, work: Path) -> list[Tower]:
    """Return the two networks whose weights are in the folder."""
    found = []
    for state in ("start", "end"):
        net = tower(size, "sdpa")
        net.load_state_dict(load_file(work / f"{state}.safetensors"))
        found.append(net)
    return found


def loader(size: Size, count: int, seed: int) -> Loader:
    """Return images in batches."""
    x, y = draw(size, count, seed)
    return list(zip(x.split(size.batch), y.split(size.batch), strict=True))


def scan(chosen: argparse.Namespace, mode: str, out: Path | None, alphas: Any, limit: int) -> Any:
    """Scan the path between the two networks."""
    size = SIZES[chosen.size]
    chains = 1 if mode == "data" or out is None else max(chosen.processes)
    return sharpscope.scan(
        *ends(size, chosen.work),
        loader(size, chosen.evaluated, 1),
        ood={"other": loader(size, chosen.evaluated, 2)},
        alphas=alphas,
        limit=limit,
        batch_size=chosen.batch,
        interventions=False,
        chains=chains,
        # One process does the same plan whatever it shares.
        parallel=None if out is None else mode,
        precision=chosen.precision,
        device=chosen.device,
        out=out,
        fresh=True,
        progress=None if out else False,
    )


def worker(chosen: argparse.Namespace) -> None:
    """Time one scan in every process of this torchrun; the first one writes what it took."""
    mode, out = chosen.worker, chosen.work / f"{chosen.worker}-{os.environ['WORLD_SIZE']}"
    with launched(chosen.device) as leads:
        scan(chosen, mode, None, [0.0], 2 * chosen.batch)
        if chosen.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with joined() as ranks:
            ranks.gathered([0])  # begin together
        begun = time.perf_counter()
        result = scan(chosen, mode, out, chosen.alphas, chosen.limit)
        seconds = time.perf_counter() - begun
        peak = torch.cuda.max_memory_allocated() if chosen.device == "cuda" else None
        with joined() as ranks:
            peaks = ranks.gathered([peak])
        if leads:
            unmet = int((~result.layers["converged"]).sum())
            cost = {**result.meta["cost"], "seconds": round(seconds, 2), "peak_bytes": peaks, "unconverged": unmet}
            (out / "cost.json").write_text(json.dumps(cost))


def weights(chosen: argparse.Namespace) -> None:
    """Train the two ends, unless they are there."""
    chosen.work.mkdir(parents=True, exist_ok=True)
    for name, state in (("start", "trained"), ("end", "converged")):
        path = chosen.work / f"{name}.safetensors"
        if not path.exists():
            found, _ = train(SIZES[chosen.size], state, chosen.device)
            save_file({key: tensor.contiguous() for key, tensor in found.items()}, path)


def run(chosen: argparse.Namespace, mode: str, processes: int) -> dict[str, Any]:
    """Return what the scan took with so many processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *torchrun, __file__, *sys.argv[1:], "--worker", mode, "--work", str(chosen.work)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return json.loads((chosen.work / f"{mode}-{processes}" / "cost.json").read_text())


def gap(work: Path, mode: str, processes: int, base: int) -> dict[str, float]:
    """Return per measure how far the values lie from those of fewer processes, at most, over the largest value."""
    one, other = (open_result(work / f"{mode}-{count}").layers for count in (base, processes))
    found = {}
    for measure, rows in one.groupby("measure"):
        theirs = other[other["measure"] == measure]["value"].to_numpy()
        mine = rows["value"].to_numpy()
        found[str(measure)] = float(abs(mine - theirs).max() / abs(mine).max())
    return found


def table(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Run everything; return a row per mode and number of processes, written after each."""
    rows: list[dict[str, Any]] = []
    counts = sorted(chosen.processes)
    for mode in chosen.modes:
        base: dict[str, Any] = {}
        for count in counts:
            cost = run(chosen, mode, count)
            base = base or cost
            speedup = base["seconds"] / cost["seconds"]
            efficiency = speedup * counts[0] / count
            difference = gap(chosen.work, mode, count, counts[0])
            rows.append({"parallel": mode, "speedup": speedup, "efficiency": efficiency, "gap": difference, **cost})
            print(f"{mode} {count}: {cost['seconds']} s, {speedup:.2f} times as fast, {efficiency:.0%}", flush=True)
            write(chosen, rows)
    return rows


def write(chosen: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the rows with all that is needed to judge them."""
    if chosen.out is None:
        return
    said = {k: v for k, v in vars(chosen).items() if k not in ("out", "work", "worker")}
    machine = {**facts(chosen.device, torch.get_num_threads()), "gpus": torch.cuda.device_count()}
    report = {"settings": said, "rows": rows, "versions": versions(), "machine": machine}
    chosen.out.write_text(json.dumps(report, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    """Return the settings, defaults filled in from the size and the machine."""
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpus else "cpu")
    parser.add_argument("--processes", type=int, nargs="+", help="default: 1, 2, 4, ... up to the number of GPUs")
    parser.add_argument("--modes", choices=MODES, nargs="+", default=MODES)
    parser.add_argument("--alphas", type=int, default=11)
    parser.add_argument("--limit", type=int, help="images that sharpness is measured on; default those of the size")
    parser.add_argument("--evaluated", type=int, help="images of each of the two evaluated sets; default as many")
    parser.add_argument("--batch", type=int, help="images whose gradient graph is built at once; default an 8th")
    parser.add_argument("--precision", choices=("highest", "high"), default="high")
    parser.add_argument("--work", type=Path, default=None, help="weights and scans are kept here")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", choices=MODES, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    chosen.processes = chosen.processes or [2**i for i in range(gpus.bit_length())] or [1, 2]
    chosen.limit = chosen.limit or SIZES[chosen.size].images
    chosen.evaluated = chosen.evaluated or chosen.limit
    chosen.batch = chosen.batch or max(chosen.limit // 8, 1)
    chosen.work = chosen.work or Path("work") / f"scaling-{chosen.size}"
    return chosen


def main() -> None:
    """Train the ends, run and compare; or be one of the processes that do it."""
    chosen = arguments()
    if chosen.worker:
        worker(chosen)
        return
    weights(chosen)
    table(chosen)


if __name__ == "__main__":
    main()
