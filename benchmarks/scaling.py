"""How much sooner a scan of eleven alphas ends on several GPUs, and that its numbers are those of one.

Usage, from the root of the repository, on a machine with any number of GPUs::

    PYTHONPATH=. python benchmarks/scaling.py --size b32 --out benchmarks/results/scaling-b32-h200.json

Every number of processes is a ``torchrun`` of its own over the same weights and images, and every run does the same
plan, with as many chains of alphas as the largest number of processes: ``data`` shares the batches of every product,
``alphas`` the chains, ``weights`` the weights, as ``fully_shard`` leaves them (slow; for models that do not fit,
not among the default modes). Efficiency is the time of one process over the time of all together: strong scaling.
Timed is a whole ``sharpscope.scan`` into an empty folder, from reading the data to the result on disk, after a short
scan that compiles kernels; the start of the processes until then (imports, weights, images, kernels) is given beside
it. The results are written after every scan, and scans of the same settings that are in ``--work`` are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from claim import claim
from machine import facts, versions
from safetensors.torch import save_file
from scaling_worker import MODES, STATES, done, folder, modes, trained, worker
from towers import SIZES, train

from sharpscope.curvature.lanczos import Eigenvalue
from sharpscope.curvature.trace import Trace
from sharpscope.saved import open_result

PLACES = ("out", "work", "worker", "profile")
SCHEDULE = ("processes", "modes", "most_seconds", "at_once")


def weights(chosen: argparse.Namespace) -> None:
    """Train the two ends for a few steps, unless they are there."""
    claim(chosen.work, {k: v for k, v in vars(chosen).items() if k not in (*PLACES, *SCHEDULE)})
    size = replace(SIZES[chosen.size], steps=dict(zip(STATES, chosen.trained, strict=True)))
    for name in STATES:
        path = trained(chosen, name)
        if not path.exists():
            found, _ = train(size, name, chosen.device)
            save_file({key: tensor.contiguous() for key, tensor in found.items()}, path)
    if chosen.device == "cuda":
        torch.cuda.empty_cache()


def started(chosen: argparse.Namespace, processes: int, first: int) -> subprocess.Popen[bytes]:
    """Return a torchrun of so many processes, on the GPUs from the first one on."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *torchrun, __file__, *sys.argv[1:], "--worker", "--work", str(chosen.work)]
    threads = max((os.cpu_count() or 1) // max(chosen.processes), 1)
    environment = {"OMP_NUM_THREADS": str(threads), "SCALING_BEGUN": str(time.time()), **os.environ}
    if chosen.at_once:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(first, first + processes)))
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment)


def gap(work: Path, base: str, other: str) -> dict[str, float]:
    """Return per measure how far the values of two scans lie apart, at most, over the largest value."""
    one, two = (open_result(work / name).layers for name in (base, other))
    found = {}
    for measure, rows in one.groupby("measure"):
        theirs = two[two["measure"] == measure]["value"].to_numpy()
        mine = rows["value"].to_numpy()
        found[str(measure)] = float(abs(mine - theirs).max() / abs(mine).max())
    return found


def rows(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each scan that has ended, against the first one of the fewest processes."""
    ran = [(mode, n) for n in sorted(chosen.processes) for mode in modes(chosen, n) if done(chosen, mode, n).exists()]
    costs = [json.loads(done(chosen, mode, n).read_text()) for mode, n in ran]
    found = []
    for (mode, n), cost in zip(ran, costs, strict=True):
        speedup = costs[0]["seconds"] / cost["seconds"]
        efficiency = speedup * costs[0]["processes"] / n
        difference = gap(chosen.work, folder(chosen, *ran[0]).name, folder(chosen, mode, n).name)
        found.append({**cost, "speedup": speedup, "efficiency": efficiency, "gap": difference})
    return found


def table(chosen: argparse.Namespace) -> None:
    """Run all numbers of processes that have not been run, and write the rows whenever a scan has ended."""
    by, known = time.monotonic() + chosen.most_seconds, list[dict[str, Any]]()
    counts = sorted(chosen.processes)
    for group in [counts[:-1], counts[-1:]] if chosen.at_once else [[n] for n in counts]:
        missing = [n for n in group if not all(done(chosen, mode, n).exists() for mode in modes(chosen, n))]
        running = [started(chosen, n, sum(k for k in group if k < n)) for n in missing]
        while any(process.poll() is None for process in running) and time.monotonic() < by:
            time.sleep(0.5)
            known = written(chosen, known)
        for process, n in zip(running, missing, strict=True):
            if ended(process):
                print(f"{n} processes ended with {process.returncode}", flush=True)
    written(chosen, known)


def ended(process: subprocess.Popen[bytes]) -> int:
    """Return the exit code of a torchrun, which is ended if it goes on."""
    if process.poll() is None:
        process.terminate()  # torchrun ends its processes
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


def written(chosen: argparse.Namespace, known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write the rows with all that is needed to judge them, if there are more than are known; return them."""
    found = rows(chosen)
    for row in found[len(known) :] if len(found) > len(known) else ():
        said = f"{row['seconds']} s, {row['speedup']:.2f} times as fast, {row['efficiency']:.0%}"
        print(f"{row['parallel']} {row['processes']}: {said}, {row['start_seconds']} s to start", flush=True)
    if chosen.out is not None and len(found) > len(known):
        said = {k: v for k, v in vars(chosen).items() if k not in PLACES}
        machine = {**facts(chosen.device, torch.get_num_threads()), "gpus": torch.cuda.device_count()}
        report = {"settings": said, "rows": found, "versions": versions(), "machine": machine}
        chosen.out.write_text(json.dumps(report, indent=1) + "\n")
    return found


def arguments() -> argparse.Namespace:
    """Return the settings, defaults filled in from the size and the machine."""
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpus else "cpu")
    parser.add_argument("--processes", type=int, nargs="+", help="default: 1, 2, 4, ... up to the number of GPUs")
    parser.add_argument("--modes", choices=MODES, nargs="+", default=MODES[:2])
    parser.add_argument("--alphas", type=int, default=11)
    parser.add_argument("--limit", type=int, help="images that sharpness is measured on; default those of the size")
    parser.add_argument("--evaluated", type=int, help="images of each of the two evaluated sets; default as many")
    parser.add_argument("--batch", type=int, help="images whose gradient graph is built at once; default an 8th")
    parser.add_argument("--draws", type=int, default=Trace().most, help="most draws of the trace")
    parser.add_argument("--steps", type=int, default=Eigenvalue().most, help="most products for an eigenvalue")
    parser.add_argument("--trained", type=int, nargs=2, default=(30, 60), help="optimiser steps of the two ends")
    parser.add_argument("--precision", choices=("highest", "high"), default="high")
    parser.add_argument("--most-seconds", type=float, default=3600, help="after which what has not ended is given up")
    parser.add_argument("--at-once", action="store_true", help="all but the most processes side by side, then those")
    parser.add_argument("--chains", type=int, help="of alphas; default as many as the most processes")
    parser.add_argument("--memory", type=float, help="GB that a process may take of its GPU; default all")
    parser.add_argument("--work", type=Path, default=None, help="weights and scans are kept here")
    parser.add_argument("--profile", type=Path, help="beginning of the names of profiles of the largest run")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    chosen.processes = chosen.processes or [2**i for i in range(gpus.bit_length())] or [1, 2]
    chosen.chains = chosen.chains or max(chosen.processes)
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
