"""What layer-wise curvature costs with sharpscope and with its peers, at equal accuracy; see README.md beside this.

Usage::

    python benchmarks/layerwise.py --size tiny --state random trained converged --out results/layerwise-tiny-cpu.json
    python benchmarks/layerwise.py --size b32 --device cuda --matmul high --repeats 1 --work work/b32 [--gpus 4]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import ChainMap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from queue import Queue
from typing import Any

from claim import claim
from machine import facts, versions
from summary import summary, table
from towers import SIZES, STATES, tower

from sharpscope.partition import layers

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
    parser.add_argument("--gpus", type=int, default=1, help="stages run side by side, each with a GPU of its own")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU run")
    parser.add_argument("--matmul", choices=("highest", "high"), default="highest", help="'high' allows TF32")
    parser.add_argument("--finer", type=float, default=2.0, help="how much finer the reference trace is")
    parser.add_argument("--reference-draws", type=int, default=400, help="most probes of the reference for a layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, help="seconds after which a tool's run is given up, and said to be")
    parser.add_argument("--work", type=Path, help="folder of intermediate results; done stages are not done again")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


Job = tuple[str, str, dict[str, Any]]  # stage, name of its output, settings


class Bench:
    """The stages of one state of the weights, each in a process of its own, each kept on disk.

    On several GPUs stages that do not need each other run side by side, each with a GPU of its own.
    """

    def __init__(self, common: dict[str, Any], state: str, work: Path, gpus: int, limit: float | None = None) -> None:
        self._common, self._state, self._work = common, state, work
        self._gpus, self._limit = gpus, limit
        self._free: Queue[int] = Queue()
        for gpu in range(gpus):
            self._free.put(gpu)

    def _path(self, name: str) -> Path:
        return self._work / f"{self._state}-{name}.json"

    def stage(self, stage: str, name: str, more: dict[str, Any]) -> dict[str, Any]:
        """Return the output of a stage, from disk if it is done."""
        out = self._path(name)
        if not out.exists():
            files = {"weights": str(self._work / f"{self._state}.pt"), "reference": str(self._path("reference"))}
            job = {**self._common, **files, "state": self._state, "stage": stage, "out": str(out), **more}
            order = out.with_suffix(".job")
            order.write_text(json.dumps(job))
            print(f"{self._state}: {name}", file=sys.stderr, flush=True)
            command = [sys.executable, str(Path(__file__).with_name("stage.py")), str(order)]
            threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(self._common["threads"]))
            gpu = self._free.get()
            own = {"CUDA_VISIBLE_DEVICES": str(gpu)} if self._gpus > 1 else {}
            env = {**os.environ, **threads, **own, "PYTHONWARNINGS": "ignore"}
            try:
                subprocess.run(command, check=True, env=env, timeout=self._limit if stage == "tool" else None)
            except subprocess.TimeoutExpired:
                out.write_text(json.dumps({"failed": f"not done after {self._limit:g} s"}))
            finally:
                self._free.put(gpu)
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    def together(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Return the outputs of stages, as many at once as there are GPUs."""
        with ThreadPoolExecutor(self._gpus) as pool:
            return list(pool.map(lambda job: self.stage(*job), jobs))

    def truth(self) -> dict[str, Any]:
        """Return the reference of every layer, the layers shared by the GPUs."""
        out = self._path("reference")
        if not out.exists():
            names = list(layers(tower(SIZES[self._common["size"]], "eager")).layers)
            shares = [names[part :: self._gpus] for part in range(self._gpus)]
            first = [("first", f"first-{part}", {"layers": mine}) for part, mine in enumerate(shares)]
            known = dict(ChainMap(*self.together(first)))
            rest = [("rest", f"rest-{part}", {"layers": mine, "known": known}) for part, mine in enumerate(shares)]
            found = ChainMap(*self.together(rest))
            out.write_text(json.dumps({name: found[name] for name in names}))
        truth: dict[str, Any] = json.loads(out.read_text())
        return truth

    def run(self, tools: list[str], repeats: int) -> dict[str, Any]:
        """Return summaries and raw answers of all tools."""
        trained, truth = self.stage("train", "train", {}), self.truth()
        kinds = list(dict.fromkeys(MODULES.get(tool, tool) for tool in tools))  # PyHessian's two ways need one search
        found = self.together([("settings", f"settings-{kind}", {"tool": kind}) for kind in kinds])
        settings = {tool: found[kinds.index(MODULES.get(tool, tool))] for tool in tools}
        runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in tools if "failed" not in settings[tool]}
        for repeat in range(repeats):  # rounds, so that a busy minute of the machine hits all tools alike
            for tool, answers in zip(runs, self.together([self._job(tool, repeat) for tool in runs]), strict=True):
                runs[tool].append(answers)
        failed = {tool: s["failed"] for tool, s in settings.items() if "failed" in s}
        failed |= {tool: a["failed"] for tool, answers in runs.items() for a in answers if "failed" in a}
        runs = {tool: answers for tool, answers in runs.items() if tool not in failed}
        return {
            **trained,
            "reference": truth,
            "failed": failed,
            "settings": {tool: chosen for tool, chosen in settings.items() if tool not in failed},
            "summary": {tool: summary(answers, truth) for tool, answers in runs.items()},
            "runs": {tool: _slim(answers) for tool, answers in runs.items()},
        }

    def _job(self, tool: str, repeat: int) -> Job:
        place = str(self._path(f"settings-{MODULES.get(tool, tool)}"))
        return "tool", f"{tool}-{repeat}", {"tool": tool, "settings": place, "round": repeat}


def _slim(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs without single draws."""
    return [
        {**run, "answers": [{k: v for k, v in a.items() if k != "history"} for a in run["answers"]]} for run in runs
    ]


def defaults(found: dict[str, Any]) -> str:
    """Return what each rival's own defaults would have said of the top eigenvalues."""
    lines = []
    for tool, chosen in found["settings"].items():
        pairs = [(entry["default"], found["reference"][layer]["lambda_max"]) for layer, entry in chosen.items()]
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
        "gpus": chosen.gpus,
        "matmul": chosen.matmul,
        "finer": chosen.finer,
        "reference_draws": chosen.reference_draws,
    }
    work = chosen.work or Path(tempfile.mkdtemp(prefix="layerwise-"))
    claim(work, {name: setting for name, setting in common.items() if name not in ("gpus", "threads")})
    result: dict[str, Any] = {"settings": common, "versions": versions(), "states": {}}
    result["machine"] = facts(chosen.device, chosen.threads)
    for state in chosen.state:
        found = Bench(common, state, work, chosen.gpus, chosen.limit).run(tools, chosen.repeats)
        result["states"][state] = found
        unit = found["summary"]["sharpscope"]["gradient_seconds"]["median"]
        print(f"\n{chosen.size}, {state} (loss of training {found['training_loss']:.3g}); one gradient {unit:.3g} s\n")
        print(table(found["summary"]))
        for tool, why in found["failed"].items():
            print(f"{tool}: {why}")
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
