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
import cProfile
import json
import os
import pstats
import shutil
import subprocess
import sys
import time
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
        chosen, processes = self._chosen, int(os.environ["WORLD_SIZE"])
        if mode == "weights":  # the last mode: there is no way back
            self._ends = [in_shards(net, chosen.device, on_host=i > 0) for i, net in enumerate(self._ends)]
        draws, steps = (chosen.draws, chosen.steps) if out else (2, 2)
        return sharpscope.scan(
            *self._ends,
            self._sets[0],
            ood={"other": self._sets[1]},
            alphas=alphas,
            limit=chosen.limit if out else min(chosen.batch * processes, chosen.limit),
            measures=[Trace(most=draws), Eigenvalue(most=steps), MSharpness(m=min(32, chosen.batch))],
            batch_size=chosen.batch,
            interventions=False,
            chains=chosen.chains if out else 1,
            # One process does the same plan whatever it shares.
            parallel=mode if out else None,
            precision=chosen.precision,
            device=chosen.device,
            memory=chosen.memory and int(chosen.memory * 1e9),
            out=out,
            fresh=True,
            progress=None if out else False,
        )


def timed(work: Work, chosen: argparse.Namespace, mode: str) -> dict[str, Any]:
    """Return what one scan took in these processes."""
    out = folder(chosen, mode, int(os.environ["WORLD_SIZE"]))
    cuda = chosen.device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with joined() as ranks:
        ranks.led(lambda: shutil.rmtree(out, ignore_errors=True))  # all begin together
    begun = time.perf_counter()
    result = work.scan(mode, out, chosen.alphas)
    seconds = time.perf_counter() - begun
    with joined() as ranks:
        peaks = ranks.gathered([torch.cuda.max_memory_allocated() if cuda else None])
    whole = torch.cuda.get_device_properties(0).total_memory if cuda else None
    unmet = int((~result.layers["converged"]).sum())
    found = {"seconds": round(seconds, 2), "peak_bytes": peaks, "unconverged": unmet}
    found["budget_bytes"] = int(chosen.memory * 1e9) if chosen.memory else whole
    return {"parallel": mode, **result.meta["cost"], **found, "notes": result.meta["warnings"]}


def worker(chosen: argparse.Namespace) -> None:
    """Time the scans of every mode in every process of this torchrun; the first one writes what they took."""
    processes = int(os.environ["WORLD_SIZE"])
    with launched(chosen.device) as leads:
        work = Work(chosen)
        work.scan("", None, [0.0])
        start = {"start_seconds": round(time.time() - float(os.environ["SCALING_BEGUN"]), 1)}
        for mode in modes(chosen, processes):
            cost = timed(work, chosen, mode)
            if leads:
                done(chosen, mode, processes).write_text(json.dumps({**cost, **start}))
        if chosen.profile and processes == max(chosen.processes):
            profile(work, chosen)


def profile(work: Work, chosen: argparse.Namespace) -> None:
    """Write where the time of a shared scan of a few alphas goes, call by call, for every process."""
    with cProfile.Profile() as profiler:
        work.scan("data", chosen.work / "profile", [0.1 * i for i in range(max(2, *chosen.processes))])
    with Path(f"{chosen.profile}-{os.environ['RANK']}.txt").open("w") as file:
        pstats.Stats(profiler, stream=file).sort_stats("tottime").print_stats(45).sort_stats("cumtime").print_stats(70)


def modes(chosen: argparse.Namespace, processes: int) -> list[str]:
    """Return the modes that are run; those of one process are all the same."""
    return list(chosen.modes[: None if processes > 1 else 1])


def folder(chosen: argparse.Namespace, mode: str, processes: int) -> Path:
    """Return where a scan is kept."""
    return Path(chosen.work / f"{mode}-{processes}")


def done(chosen: argparse.Namespace, mode: str, processes: int) -> Path:
    """Return the file that says what a scan took, there when it has ended."""
    return folder(chosen, mode, processes).with_suffix(".json")


def weights(chosen: argparse.Namespace) -> None:
    """Train the two ends for a few steps, unless they are there."""
    chosen.work.mkdir(parents=True, exist_ok=True)
    size = replace(SIZES[chosen.size], steps=dict(zip(("start", "end"), chosen.trained, strict=True)))
    for name in size.steps:
        path = chosen.work / f"{name}.safetensors"
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
    forget_others(chosen)
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


def forget_others(chosen: argparse.Namespace) -> None:
    """Remove what scans of other settings took."""
    kept = (
        "size",
        "device",
        "alphas",
        "chains",
        "limit",
        "evaluated",
        "batch",
        "draws",
        "steps",
        "precision",
        "memory",
    )
    said, file = json.dumps({name: getattr(chosen, name) for name in kept}), chosen.work / "settings.txt"
    if not file.exists() or file.read_text() != said:
        for cost in chosen.work.glob("*-*.json"):
            cost.unlink()
    file.write_text(said)


def written(chosen: argparse.Namespace, known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write the rows with all that is needed to judge them, if there are more than are known; return them."""
    found = rows(chosen)
    for row in found[len(known) :] if len(found) > len(known) else ():
        said = f"{row['seconds']} s, {row['speedup']:.2f} times as fast, {row['efficiency']:.0%}"
        print(f"{row['parallel']} {row['processes']}: {said}, {row['start_seconds']} s to start", flush=True)
    if chosen.out is not None and len(found) > len(known):
        said = {k: v for k, v in vars(chosen).items() if k not in ("out", "work", "worker", "profile")}
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
