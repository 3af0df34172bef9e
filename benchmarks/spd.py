"""What a step of AdamSPD costs beside AdamW, on the 148 tensors (88 M weights) of a ViT-B/32 image tower.

Usage, from the root of the repository (needs torch and numpy only)::

    PYTHONPATH=. python benchmarks/spd.py --device cuda --out benchmarks/results/spd-h200.json
    PYTHONPATH=. python benchmarks/spd.py --threads 1 --out benchmarks/results/spd-cpu.json

Rounds go over all variants in turn, so that a busy minute hits all alike; the median round counts. Times on a GPU are
of events around many steps without a wait between them, as in training. On a GPU it is also checked that no step waits
for the device, and that a captured graph makes the same steps as calls do.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import facts, versions
from torch import Tensor, nn

from sharpscope.optim import AdamSPD, chunk

Named = list[tuple[str, nn.Parameter]]
Make = Callable[[Named], torch.optim.Optimizer]

VARIANTS: dict[str, Callable[[Named, dict[str, Tensor]], torch.optim.Optimizer]] = {
    "adamw foreach": lambda w, _: torch.optim.AdamW([p for _, p in w], 1e-5, foreach=True),
    "adamw fused": lambda w, _: torch.optim.AdamW([p for _, p in w], 1e-5, fused=True),
    "spd foreach": lambda w, a: AdamSPD(w, 1e-5, anchor=a, foreach=True),
    "spd fused": lambda w, a: AdamSPD(w, 1e-5, anchor=a, fused=True),
    "spd fused, recorded": lambda w, a: _recorded(AdamSPD(w, 1e-5, anchor=a, fused=True)),
    "spd fused, by layer": lambda w, a: AdamSPD(w, 1e-5, anchor=a, fused=True, granularity="layer"),
    "spd fused, anchor zero": lambda w, _: AdamSPD(w, 1e-5, anchor=None, fused=True),
    "spd fused, update gate": lambda w, a: AdamSPD(w, 1e-5, anchor=a, fused=True, gate="update"),
    "spd fused, lambda 0": lambda w, a: AdamSPD(w, 1e-5, anchor=a, fused=True, decay=0.0),
}


def _recorded(optimizer: AdamSPD) -> AdamSPD:
    optimizer.record()
    return optimizer


def shapes(width: int, blocks: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of an image tower with fused query, key and value, by open_clip's names."""
    found: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (50, width),
        "visual.conv1.weight": (width, 3, 32, 32),
        "visual.proj": (width, 2 * width // 3),
    }
    for i in range(blocks):
        block = f"visual.transformer.resblocks.{i}"
        for name, out, inner in (
            ("attn.in_proj_", 3 * width, width),
            ("attn.out_proj.", width, width),
            ("mlp.c_fc.", 4 * width, width),
            ("mlp.c_proj.", width, 4 * width),
        ):
            found |= {f"{block}.{name}weight": (out, inner), f"{block}.{name}bias": (out,)}
        found |= {f"{block}.ln_{k}.{what}": (width,) for k in (1, 2) for what in ("weight", "bias")}
    return found


def weights(size: dict[str, tuple[int, ...]], device: str, dtype: torch.dtype) -> tuple[Named, dict[str, Tensor]]:
    """Return parameters with gradients, and an anchor at the distance of a fine-tune."""
    torch.manual_seed(0)
    named, anchor = [], {}
    for name, shape in size.items():
        anchor[name] = 0.02 * torch.randn(shape, device=device)
        parameter = nn.Parameter((anchor[name] + 1e-3 * torch.randn(shape, device=device)).to(dtype))
        parameter.grad = 1e-3 * torch.randn(shape, device=device).to(dtype)
        named.append((name, parameter))
    return named, anchor


def seconds(optimizer: torch.optim.Optimizer, steps: int, cuda: bool) -> float:
    """Return the time of a step, the mean of so many in a row."""
    if not cuda:
        begin = time.perf_counter()
        for _ in range(steps):
            optimizer.step()
        return (time.perf_counter() - begin) / steps
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(steps):
        optimizer.step()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / steps


def timed(chosen: argparse.Namespace) -> dict[str, Any]:
    """Return time and, on a GPU, memory of every variant."""
    cuda = chosen.device.startswith("cuda")
    size = shapes(*((768, 12) if chosen.size == "b32" else (48, 2)))
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    memory: dict[str, Any] = {}
    for _ in range(chosen.rounds):
        for name, make in VARIANTS.items():
            named, anchor = weights(size, chosen.device, getattr(torch, chosen.dtype))
            if cuda:
                torch.cuda.synchronize()
                base = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            optimizer = make(named, anchor)
            for _ in range(chosen.warm):
                optimizer.step()
            found[name].append(seconds(optimizer, chosen.steps, cuda))
            if cuda:
                kept, peak = torch.cuda.memory_allocated() - base, torch.cuda.max_memory_allocated() - base
                memory[name] = {"kept_mib": kept / 2**20, "peak_mib": peak / 2**20}
            del optimizer, named, anchor
    reference = median(found["adamw foreach"])
    return {
        name: {
            "milliseconds": 1e3 * median(times),
            "rounds": [1e3 * t for t in times],
            "over_adamw_foreach": median(times) / reference,
            **memory.get(name, {}),
        }
        for name, times in found.items()
    }


def sweep(chosen: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return milliseconds of a fused and a foreach step by the size of a chunk in numbers."""
    cuda, usual = chosen.device.startswith("cuda"), chunk.LIMIT
    size = shapes(*((768, 12) if chosen.size == "b32" else (48, 2)))
    found: dict[str, dict[str, float]] = {}
    for power in chosen.limits:
        chunk.LIMIT = 1 << power
        found[f"2^{power}"] = {}
        for name in ("spd foreach", "spd fused"):
            named, anchor = weights(size, chosen.device, getattr(torch, chosen.dtype))
            optimizer = VARIANTS[name](named, anchor)
            for _ in range(chosen.warm):
                optimizer.step()
            times = [seconds(optimizer, chosen.steps, cuda) for _ in range(chosen.rounds)]
            found[f"2^{power}"][name] = 1e3 * median(times)
    chunk.LIMIT = usual
    return found


def waits(device: str) -> dict[str, str]:
    """Return for each kind of step whether it waits for the GPU: torch raises at the first wait."""
    found = {}
    for name, options in {
        "foreach": {"foreach": True, "capturable": True},
        "fused": {"fused": True},
        "layer": {"fused": True, "granularity": "layer"},
        "update": {"fused": True, "gate": "update"},
        "rows": {"fused": True, "row_norms": True},
    }.items():
        named, anchor = weights(shapes(48, 2), device, torch.float32)
        groups = [{"params": named[:7], "decay": 0.5}, {"params": named[7:]}]
        optimizer = _recorded(AdamSPD(groups, 1e-3, anchor=anchor, **options))
        optimizer.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
            found[name] = "never waits"
        except RuntimeError as problem:
            found[name] = f"waits: {problem}"
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found


def captured(device: str) -> dict[str, Any]:
    """Return whether replays of a captured step give the weights and counts of called steps."""

    def start() -> tuple[Named, AdamSPD]:
        named, anchor = weights(shapes(48, 2), device, torch.float32)
        optimizer = _recorded(AdamSPD(named, 1e-2, anchor=anchor, capturable=True, foreach=True))
        optimizer.step()  # states and plan are made outside the graph
        return named, optimizer

    called, one = start()
    for _ in range(6):
        one.step()
    replayed, other = start()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        other.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        other.step()
    for _ in range(5):
        graph.replay()
    torch.cuda.synchronize()
    distance = max(float((a - b).abs().max().detach()) for (_, a), (_, b) in zip(called, replayed, strict=True))
    counts = [sum(u.decisions for u in o.activity()) for o in (one, other)]
    return {"largest_difference": distance, "decisions_called": counts[0], "decisions_replayed": counts[1]}


def agreement(device: str) -> float:
    """Return the largest difference after 20 steps between this device and the CPU, both in float64."""
    ends = []
    for where in ("cpu", device):
        named, anchor = weights(shapes(48, 2), "cpu", torch.float64)
        moved = [(name, nn.Parameter(p.detach().to(where))) for name, p in named]
        optimizer = AdamSPD(moved, 1e-3, anchor=anchor)
        generator = torch.Generator().manual_seed(1)
        for _ in range(20):
            for _, p in moved:
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(where)
            optimizer.step()
        ends.append([p.detach().cpu() for _, p in moved])
    return max(float((a - b).abs().max()) for a, b in zip(*ends, strict=True))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("b32", "tiny"), default="b32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, help="in a row; 50 on a GPU, 3 on a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm", type=int, default=3, help="steps before the clock starts")
    parser.add_argument("--limits", type=int, nargs="*", default=[18, 20, 21, 22, 23, 24, 27], help="powers of two")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU run")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    torch.set_num_threads(chosen.threads)
    chosen.steps = chosen.steps or (50 if chosen.device.startswith("cuda") else 3)
    size = shapes(*((768, 12) if chosen.size == "b32" else (48, 2)))
    result: dict[str, Any] = {
        "settings": {key: value for key, value in vars(chosen).items() if key != "out"},
        "tensors": len(size),
        "weights": sum(torch.Size(shape).numel() for shape in size.values()),
        "versions": {name: version for name, version in versions().items() if name in ("torch", "numpy", "sharpscope")},
        "machine": facts(chosen.device, chosen.threads),
        "variants": timed(chosen),
        "chunk_limit": sweep(chosen) if chosen.limits else {},
    }
    if chosen.device.startswith("cuda"):
        result["cuda"] = {
            "waits": waits(chosen.device),
            "captured": captured(chosen.device),
            "largest_difference_to_cpu": agreement(chosen.device),
        }
    for name, row in result["variants"].items():
        memory = f"  kept {row['kept_mib']:7.0f} MiB, peak {row['peak_mib']:7.0f}" if "kept_mib" in row else ""
        print(f"{name:<24} {row['milliseconds']:8.3f} ms  {row['over_adamw_foreach']:5.2f} x foreach AdamW{memory}")
    print(json.dumps({key: result[key] for key in ("chunk_limit", "cuda") if key in result}, indent=1))
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
