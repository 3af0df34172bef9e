"""One stage of the benchmark in a process of its own: ``python stage.py JOB.json`` writes the job's output file."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import Memory, facts, versions
from reference import Effort, first, rest
from rivals import TOOLS
from settings import search
from task import Task, task
from torch import nn
from towers import SIZES, train


def _load(job: dict[str, Any], **more: Any) -> Task:
    weights = torch.load(job["weights"], weights_only=True)
    return task(SIZES[job["size"]], {"weights": weights, **more}, job["images"], job["device"], job["seed"])


def train_stage(job: dict[str, Any]) -> dict[str, Any]:
    """Return the training loss of the state, whose weights go to a file."""
    weights, loss = train(SIZES[job["size"]], job["state"], job["device"])
    torch.save(weights, job["weights"])
    return {"training_loss": loss}


def _effort(job: dict[str, Any]) -> Effort:
    return Effort(job["finer"], job["reference_draws"], SIZES[job["size"]].probe_batch)


def first_stage(job: dict[str, Any]) -> dict[str, Any]:
    """Return the first draws of the truth about some layers."""
    return first(_load(job), _effort(job), job["layers"])


def rest_stage(job: dict[str, Any]) -> dict[str, Any]:
    """Return the truth about some layers."""
    return rest(_load(job), _effort(job), job["layers"], job["known"])


def settings_stage(job: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a rival."""
    return search(_load(job), job["tool"], json.loads(Path(job["reference"]).read_text()))


def _gradient(job: dict[str, Any], of: Task) -> Callable[[], float]:
    """Return a function that takes one gradient over all images and returns its seconds: the unit of cost."""
    model = of.module()
    parameters = list(model.parameters())

    def once() -> float:
        began = _now(job)
        for inputs, targets in of.data:
            torch.autograd.grad(nn.functional.cross_entropy(model(inputs), targets), parameters)
        return _now(job) - began

    return once


def _now(job: dict[str, Any]) -> float:
    """Return wall seconds, or with one CPU thread processor seconds, which other processes distort less."""
    if job["device"].startswith("cuda"):
        torch.cuda.synchronize()
    return time.process_time() if job["device"] == "cpu" and job["threads"] == 1 else time.perf_counter()


def tool_stage(job: dict[str, Any]) -> dict[str, Any]:
    """Return a tool's answers with the seconds of each, gradients timed in between, and peak memory of both."""
    settings = json.loads(Path(job["settings"]).read_text())
    truth = json.loads(Path(job["reference"]).read_text())
    floor = 0.005 * sum(abs(entry["trace"]) for entry in truth.values())
    of = _load(job, floor=floor, settings=settings, round=job["round"])
    gradient = _gradient(job, of)
    memory = Memory(job["device"])
    memory.reset()
    gradient()
    gradient_peak = memory.peak()
    answers, gradients, peak = [], [gradient(), gradient()], 0
    stream = TOOLS[job["tool"]](of)
    while True:
        memory.reset()
        began = _now(job)
        answer = next(stream, None)
        seconds = _now(job) - began
        if answer is None:
            break
        peak = max(peak, memory.peak())
        answers.append({**answer._asdict(), "seconds": seconds})
        gradients.append(gradient())
    return {
        "answers": answers,
        "gradients": gradients,
        "peak_bytes": peak,
        "gradient_peak_bytes": gradient_peak,
        "machine": facts(job["device"], job["threads"]),
        "versions": versions(),
    }


STAGES = {
    "train": train_stage,
    "first": first_stage,
    "rest": rest_stage,
    "settings": settings_stage,
    "tool": tool_stage,
}


def main(path: str) -> None:
    """Run the job and write its output, complete or not at all."""
    job = json.loads(Path(path).read_text())
    torch.set_num_threads(job["threads"])
    torch.set_float32_matmul_precision(job["matmul"])
    beside = Path(job["out"]).with_suffix(".part")
    try:
        found = STAGES[job["stage"]](job)
    except torch.OutOfMemoryError as error:
        if "tool" not in job:
            raise
        found = {"failed": str(error).splitlines()[0]}  # an answer too: this tool needs more memory than there is
    beside.write_text(json.dumps(found))
    beside.replace(job["out"])


if __name__ == "__main__":
    main(sys.argv[1])
