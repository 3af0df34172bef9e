"""One of the processes of ``scaling.py``: the networks, the images and the timed scans."""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from towers import SIZES, Size, Tower, draw, tower

import sharpscope
from sharpscope.curvature.lanczos import Eigenvalue
from sharpscope.curvature.trace import Trace
from sharpscope.perturbation import MSharpness
from sharpscope.ranks import joined, launched

STATES = ("start", "end")
MODES = ("data", "alphas", "weights")
Loader = list[tuple[torch.Tensor, torch.Tensor]]


def ends(size: Size, chosen: argparse.Namespace) -> list[Tower]:
    """Return the two networks whose weights are in the folder, on the device of this process."""
    place = torch.device(chosen.device, int(os.environ["LOCAL_RANK"])) if chosen.device == "cuda" else "cpu"
    found = []
    for state in STATES:
        with torch.device(place):  # random weights of 300 M take a CPU seconds
            net = tower(size, "sdpa")
        net.load_state_dict(load_file(trained(chosen, state)))
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


def trained(chosen: argparse.Namespace, state: str) -> Path:
    """Return the file with the weights of one end."""
    return Path(chosen.work / f"{chosen.size}-{state}-{chosen.trained[STATES.index(state)]}.safetensors")


def done(chosen: argparse.Namespace, mode: str, processes: int) -> Path:
    """Return the file that says what a scan took, there when it has ended."""
    return folder(chosen, mode, processes).with_suffix(".json")
