"""What layer-wise curvature costs with sharpscope and with its peers, at equal accuracy; see README.md beside this.

Usage::

    python benchmarks/layerwise.py --size tiny --state random trained converged --out results/layerwise-tiny-cpu.json
    python benchmarks/layerwise.py --size b32 --device cuda --state trained --repeats 1 --work work/b32
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from machine import facts, versions
from summary import summary, table
from towers import SIZES, STATES

TOOLS = ("sharpscope", "pyhessian", "pyhessian_loader", "curvlinops", "hessian_eigenthings")
MODULES = {"pyhessian_loader": "pyhessian"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--state", choices=STATES, nargs="+", default=["trained"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, help="measured images; tiny 64, b32 512")
    parser.add_argument("--rivals", choices=TOOLS[1:], nargs="*", default=list(TOOLS[1:]))
    parser.add_argument("--repeats", type=int, default=3, help="rounds over all tools, each with probes of its own")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU run")
    parser.add_argument("--matmul", choices=("highest", "high"), default="highest", help="'high' allows TF32")
    parser.add_argument("--finer", type=float, default=2.0, help="how much finer the reference trace is")
    parser.add_argument("--reference-draws", type=int, default=400, help="most probes of the reference for a layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder of intermediate results; done stages are not done again")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


@dataclass(frozen=True)
class Bench:
    """The stages of one state of the weights, each in a process of its own, each kept on disk."""

    common: dict[str, Any]
    state: str
    work: Path

    def stage(self, stage: str, name: str, **more: Any) -> dict[str, Any]:
        """Return the output of a stage, from disk if it is done."""
        out = self.work / f"{self.state}-{name}.json"
        if not out.exists():
            paths = {"weights": f"{self.state}.pt", "reference": f"{self.state}-reference.json"}
            files = {key: str(self.work / name) for key, name in paths.items()}
            job = {**self.common, **files, "state": self.state, "stage": stage, "out": str(out), **more}
            order = out.with_suffix(".job")
            order.write_text(json.dumps(job))
            print(f"{self.state}: {name}", file=sys.stderr, flush=True)
            command = [sys.executable, str(Path(__file__).with_name("stage.py")), str(order)]
            threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(self.common["threads"]))
            subprocess.run(command, check=True, env={**os.environ, **threads, "PYTHONWARNINGS": "ignore"})
        return json.loads(out.read_text())

    def run(self, tools: list[str], repeats: int) -> dict[str, Any]:
        """Return summaries and raw answers of all tools."""
        trained = self.stage("train", "train")
        truth = self.stage("reference", "reference")
        searched = {tool: MODULES.get(tool, tool) for tool in tools}  # PyHessian's two ways need one search
        settings = {tool: self.stage("settings", f"settings-{of}", tool=of) for tool, of in searched.items()}
        runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in tools}
        for repeat in range(repeats):  # rounds, so that a busy minute of the machine hits all tools alike
            for tool in tools:
                place = str(self.work / f"{self.state}-settings-{searched[tool]}.json")
                runs[tool].append(self.stage("tool", f"{tool}-{repeat}", tool=tool, settings=place, round=repeat))
        return {
            **trained,
            "reference": truth,
            "settings": settings,
            "summary": {tool: summary(found, truth) for tool, found in runs.items()},
            "runs": {tool: _slim(found) for tool, found in runs.items()},
        }


def _slim(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs without single draws."""
    return [
        {**run, "answers": [{k: v for k, v in a.items() if k != "history"} for a in run["answers"]]} for run in runs
    ]


def defaults(found: dict[str, Any]) -> str:
    """Return what each rival's own defaults would have said of the top eigenvalues."""
    lines = []
    for tool, layers in found["settings"].items():
        pairs = [(entry["default"], found["reference"][layer]["lambda_max"]) for layer, entry in layers.items()]
        if pairs:
            errors = [100 * (value / truth - 1) for (value, _), truth in pairs]
            products = sum(count for (_, count), _ in pairs)
            lines.append(f"{tool}: errors {min(errors):+.1f} to {max(errors):+.1f} %, {products} products")
    return "\n".join(lines)


def main() -> None:
    chosen = arguments()
    tools = ["sharpscope", *(name for name in chosen.rivals if find_spec(MODULES.get(name, name)))]
    size = SIZES[chosen.size]
    common = {
        "size": chosen.size,
        "device": chosen.device,
        "images": chosen.images or size.images,
        "seed": chosen.seed,
        "threads": chosen.threads,
        "matmul": chosen.matmul,
        "finer": chosen.finer,
        "reference_draws": chosen.reference_draws,
    }
    work = chosen.work or Path(tempfile.mkdtemp(prefix="layerwise-"))
    work.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"settings": common, "versions": versions(), "states": {}}
    result["machine"] = facts(chosen.device, chosen.threads)
    for state in chosen.state:
        found = Bench(common, state, work).run(tools, chosen.repeats)
        result["states"][state] = found
        unit = found["summary"]["sharpscope"]["gradient_seconds"]["median"]
        print(f"\n{chosen.size}, {state} (loss of training {found['training_loss']:.3g}); one gradient {unit:.3g} s\n")
        print(table(found["summary"]))
        print(f"\ndefaults, top eigenvalue:\n{defaults(found)}")
    if chosen.out:
        chosen.out.write_text(json.dumps(_rounded(result), indent=1) + "\n")


def _rounded(value: Any) -> Any:
    """Return the tree with floats of six digits: a file that people read."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


if __name__ == "__main__":
    main()
