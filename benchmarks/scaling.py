"""How much sooner a scan of eleven alphas ends on several GPUs, and that its numbers are those of one.

Usage, from the root of the repository, on a machine with any number of GPUs::

    PYTHONPATH=. python benchmarks/scaling.py --size b32 --out benchmarks/results/scaling-b32-h200.json

Every number of processes is a ``torchrun`` of its own over the same weights and images, and every run does the same
plan, with as many chains of alphas as the largest number of processes: ``data`` shares the batches of every product,
``alphas`` the chains, ``weights`` the weights, as ``fully_shard`` leaves them (slow; for models that do not fit,
not among the default modes). Efficiency is the time of one process over the time of all together: strong scaling.
Timed is a whole ``sharpscope.scan`` into an empty folder, from reading the data to the result on disk, after a short
scan that compiles kernels; the start of the processes and the loading of weights are not in it.
"""

from __future__ import annotations

import argparse
import cProfile
import fcntl
import json
import os
import pstats
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import facts, versions
from safetensors.torch import load_file, save_file
from towers import SIZES, Size, Tower, draw, tower, train

import sharpscope
from sharpscope.curvature.lanczos import Eigenvalue
from sharpscope.curvature.trace import Trace
from sharpscope.perturbation import MSharpness
from sharpscope.ranks import joined, launched
from sharpscope.result import open_result

MODES = ("data", "alphas", "weights")
Loader = list[tuple[torch.Tensor, torch.Tensor]]


def ends(size: Size, chosen: argparse.Namespace) -> list[Tower]:
    """Return the two networks whose weights are in the folder, on the device of this process."""
    place = torch.device(chosen.device, int(os.environ["LOCAL_RANK"])) if chosen.device == "cuda" else "cpu"
    found = []
    for state in ("start", "end"):
        with torch.device(place):  # random weights of 300 M take a CPU seconds
            net = tower(size, "sdpa")
        net.load_state_dict(load_file(chosen.work / f"{state}.safetensors"))
        found.append(net.requires_grad_(False))
    return found


def in_shards(net: Tower, device: str, *, on_host: bool) -> Tower:
    """Return the network after ``fully_shard``, block by block."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))
    policy = CPUOffloadPolicy() if on_host and device == "cuda" else OffloadPolicy()
    blocks = next(sub for sub in net.modules() if isinstance(sub, torch.nn.ModuleList))
    for module in (*blocks, net):
        fully_shard(module, mesh=mesh, offload_policy=policy)
    return net


def loader(size: Size, count: int, seed: int) -> Loader:
    """Return images in batches."""
    x, y = draw(size, count, seed)
    return list(zip(x.split(size.batch), y.split(size.batch), strict=True))


class Work:
    """The networks and images of a size, made once in a process."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        size = SIZES[chosen.size]
        self._chosen = chosen
        self._ends = ends(size, chosen)
        self._sets = [loader(size, chosen.evaluated, seed) for seed in (1, 2)]

    def scan(self, mode: str, out: Path | None, alphas: int | list[float]) -> Any:
        """Scan the path between the two networks; with ``out`` None a short scan that compiles all kernels."""
        chosen = self._chosen
        if mode == "weights":  # the last mode: there is no way back
            self._ends = [in_shards(net, chosen.device, on_host=i > 0) for i, net in enumerate(self._ends)]
        return sharpscope.scan(
            *self._ends,
            self._sets[0],
            ood={"other": self._sets[1]},
            alphas=alphas,
            limit=chosen.limit,
            measures=[Trace(most=chosen.draws), Eigenvalue(most=chosen.steps), MSharpness(m=min(32, chosen.batch))],
            batch_size=chosen.batch,
            interventions=False,
            chains=max(chosen.processes) if out else 1,
            # One process does the same plan whatever it shares.
            parallel=mode if out else None,
            precision=chosen.precision,
            device=chosen.device,
            out=out,
            fresh=True,
            progress=None if out else False,
        )


@contextmanager
def turn(chosen: argparse.Namespace) -> Iterator[None]:
    """Have the machine for this torchrun's processes; those of others that were started wait, or have other GPUs."""
    with joined() as ranks, (chosen.work / "turn.lock").open("w") as file:
        alone = fcntl.LOCK_EX if "SHARED_MACHINE" not in os.environ else fcntl.LOCK_SH
        ranks.led(lambda: fcntl.flock(file, alone))
        yield
        ranks.gathered([0])


def timed(work: Work, chosen: argparse.Namespace, mode: str) -> dict[str, Any]:
    """Return what one scan took in these processes."""
    out = chosen.work / f"{mode}-{os.environ['WORLD_SIZE']}"
    cuda = chosen.device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with turn(chosen):
        begun = time.perf_counter()
        result = work.scan(mode, out, chosen.alphas)
        seconds = time.perf_counter() - begun
    with joined() as ranks:
        peaks = ranks.gathered([torch.cuda.max_memory_allocated() if cuda else None])
    budgets = torch.cuda.get_device_properties(0).total_memory if cuda else None
    unmet = int((~result.layers["converged"]).sum())
    found = {"seconds": round(seconds, 2), "peak_bytes": peaks, "budget_bytes": budgets, "unconverged": unmet}
    return {"parallel": mode, **result.meta["cost"], **found}


def worker(chosen: argparse.Namespace) -> None:
    """Time the scans of every mode in every process of this torchrun; the first one writes what they took."""
    with launched(chosen.device) as leads:
        work = Work(chosen)
        work.scan("", None, [0.0])
        for mode in chosen.modes if int(os.environ["WORLD_SIZE"]) > 1 else chosen.modes[:1]:
            cost = timed(work, chosen, mode)
            if leads:
                (chosen.work / f"{mode}-{os.environ['WORLD_SIZE']}" / "cost.json").write_text(json.dumps(cost))
        if chosen.profile and int(os.environ["WORLD_SIZE"]) == max(chosen.processes):
            profile(work, chosen)


def profile(work: Work, chosen: argparse.Namespace) -> None:
    """Write where the time of a shared scan of two alphas goes, call by call, for every process."""
    with cProfile.Profile() as profiler:
        work.scan("data", chosen.work / "profile", [0.0, 0.1, 0.2, 0.3][: max(2, max(chosen.processes))])
    with Path(f"{chosen.profile}-{os.environ['RANK']}.txt").open("w") as file:
        pstats.Stats(profiler, stream=file).sort_stats("tottime").print_stats(45).sort_stats("cumtime").print_stats(70)


def weights(chosen: argparse.Namespace) -> None:
    """Train the two ends for a few steps, unless they are there."""
    chosen.work.mkdir(parents=True, exist_ok=True)
    size = replace(SIZES[chosen.size], steps=dict(zip(("start", "end"), chosen.trained, strict=True)))
    for name in size.steps:
        path = chosen.work / f"{name}.safetensors"
        if not path.exists():
            found, _ = train(size, name, chosen.device)
            save_file({key: tensor.contiguous() for key, tensor in found.items()}, path)


def started(chosen: argparse.Namespace, processes: int) -> subprocess.Popen[bytes]:
    """Return a torchrun of so many processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *torchrun, __file__, *sys.argv[1:], "--worker", "--work", str(chosen.work)]
    for mode in chosen.modes:
        (chosen.work / f"{mode}-{processes}" / "cost.json").unlink(missing_ok=True)
    environment = {**os.environ}
    if chosen.at_once and processes < max(chosen.processes):
        before = sum(count for count in chosen.processes if count < processes)
        gpus = ",".join(map(str, range(before, before + processes)))
        environment |= {"CUDA_VISIBLE_DEVICES": gpus, "SHARED_MACHINE": "1"}
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment)


def ended(chosen: argparse.Namespace, processes: int, process: subprocess.Popen[bytes], by: float) -> list[Any]:
    """Return what the scans of a torchrun took, a row for each mode that came to its end; one process has one."""
    try:
        process.wait(max(by - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # torchrun ends its processes
        process.wait()
    if process.returncode:
        print(f"{processes} processes ended with {process.returncode}", flush=True)
    files = [chosen.work / f"{mode}-{processes}" / "cost.json" for mode in chosen.modes]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def gap(work: Path, base: str, other: str) -> dict[str, float]:
    """Return per measure how far the values of two scans lie apart, at most, over the largest value."""
    one, two = (open_result(work / name).layers for name in (base, other))
    found = {}
    for measure, rows in one.groupby("measure"):
        theirs = two[two["measure"] == measure]["value"].to_numpy()
        mine = rows["value"].to_numpy()
        found[str(measure)] = float(abs(mine - theirs).max() / abs(mine).max())
    return found


def table(chosen: argparse.Namespace) -> None:
    """Run everything, the fewest processes first; write a row per number of processes and mode after each."""
    rows: list[dict[str, Any]] = []
    first, by = min(chosen.processes), time.monotonic() + chosen.most_seconds
    counts = sorted(chosen.processes)
    begun = {count: started(chosen, count) for count in counts} if chosen.at_once else {}
    for count in counts:
        for cost in ended(chosen, count, begun.get(count) or started(chosen, count), by):
            base = rows[0] if rows else cost
            speedup = base["seconds"] / cost["seconds"]
            efficiency = speedup * first / count
            difference = gap(chosen.work, f"{chosen.modes[0]}-{first}", f"{cost['parallel']}-{count}")
            rows.append({**cost, "speedup": speedup, "efficiency": efficiency, "gap": difference})
            said = f"{cost['seconds']} s, {speedup:.2f} times as fast, {efficiency:.0%}"
            print(f"{cost['parallel']} {count}: {said}", flush=True)
            write(chosen, rows)


def write(chosen: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the rows with all that is needed to judge them."""
    if chosen.out is None:
        return
    said = {k: v for k, v in vars(chosen).items() if k not in ("out", "work", "worker", "profile")}
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
    # Each has GPUs of its own; the largest starts up meanwhile and scans when they are done.
    parser.add_argument("--at-once", action="store_true", help="all runs but the largest side by side")
    parser.add_argument("--work", type=Path, default=None, help="weights and scans are kept here")
    parser.add_argument("--profile", type=Path, help="beginning of the names of profiles of the largest run")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
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
