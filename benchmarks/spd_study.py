"""Does SPD keep what the pre-trained model knew? AdamW, L2-SP, LP-FT and SPD on the embedded CLIP.

Usage, from the root of the repository (about ten minutes on one CPU core; finished runs are kept and not done again)::

    PYTHONPATH=. python benchmarks/spd_study.py --out benchmarks/results/spd-study.json

The design was written down before any result was seen:

* the image tower of ``sharpscope/demo/assets/base`` is fine-tuned on the 360 images of ``train`` with its zero-shot
  head frozen; in LP-FT the head is trained first, alone, then both; 5 seeds (order of the images);
* 60 steps of batch 64, clipping at 1, 10 % warm-up, cosine; two rates, 1e-3 and 3e-3; no ordinary decay;
* SPD with lambda 0.5, 1 and 2, per tensor; at lambda 1 also per layer and with the update as gate; L2-SP with strength
  1e-3 and 1e-2; nothing was tuned;
* each end point alone, and its weights averaged with the zero-shot ones (WiSE-FT, alpha 0.5; for LP-FT with the head);
* top-1 accuracy on ``id`` and the seven OOD sets, 360 images each; intervals are 95 % over seeds (Student), of
  means and of differences to AdamW of the same seed and rate. They do not cover the choice of images or of the base.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from machine import facts, versions
from torch import nn

import sharpscope as ss
from sharpscope.demo import ASSETS, extract
from sharpscope.finetune import Schedule, finetune, trained
from sharpscope.models import ImageClassifier
from sharpscope.optim import AdamL2SP, AdamSPD, audited, probing, read_audit
from sharpscope.partition import layers

STEPS, BATCH, RATES, SEEDS, ALPHA, PROBE = 60, 64, (1e-3, 3e-3), (0, 1, 2, 3, 4), 0.5, 30
STUDENT = {4: 2.776}  # 97.5 % quantile by degrees of freedom
Named = list[tuple[str, nn.Parameter]]
METHODS: dict[str, Callable[[Named, float, Any], torch.optim.Optimizer]] = {
    "AdamW": lambda w, lr, _: torch.optim.AdamW([p for _, p in w], lr, weight_decay=0.0),
    "L2-SP 1e-3": lambda w, lr, _: AdamL2SP(w, lr, anchor="init", strength=1e-3),
    "L2-SP 1e-2": lambda w, lr, _: AdamL2SP(w, lr, anchor="init", strength=1e-2),
    "LP-FT": lambda w, lr, _: torch.optim.AdamW([p for _, p in w], lr, weight_decay=0.0),
    "SPD 0.5": lambda w, lr, part: AdamSPD(w, lr, anchor="init", decay=0.5, layers=part),
    "SPD 1": lambda w, lr, part: AdamSPD(w, lr, anchor="init", decay=1.0, layers=part),
    "SPD 2": lambda w, lr, part: AdamSPD(w, lr, anchor="init", decay=2.0, layers=part),
    "SPD 1 by layer": lambda w, lr, part: AdamSPD(w, lr, anchor="init", granularity="layer", layers=part),
    "SPD 1 update gate": lambda w, lr, part: AdamSPD(w, lr, anchor="init", gate="update", layers=part),
}


@torch.no_grad()
def accuracies(model: nn.Module, sets: dict[str, ss.Split]) -> dict[str, float]:
    """Return the per cent right in each set, and the mean over the OOD sets."""
    found = {}
    for name, split in sets.items():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in split)
        found[name] = 100 * right / len(split)
    found["ood"] = mean(value for name, value in found.items() if name != "id")
    return found


def averaged(start: nn.Module, end: nn.Module, alpha: float) -> nn.Module:
    """Return a model with weights (1 - alpha) start + alpha end."""
    mixed = copy.deepcopy(end)
    with torch.no_grad():
        for mine, other in zip(mixed.parameters(), start.parameters(), strict=True):
            mine.lerp_(other, 1 - alpha)
    return mixed


def one_run(zero: ImageClassifier, train: ss.Split, method: str, rate: float, seed: int, log: Path) -> tuple[Any, dict]:
    """Return the fine-tuned model, and what its optimiser did."""
    model = copy.deepcopy(zero)
    schedule = Schedule(STEPS, batch_size=BATCH, seed=seed)
    if method == "LP-FT":
        with probing(model, "^head") as head:
            probe = torch.optim.AdamW([p for _, p in head], rate, weight_decay=0.0)
            list(finetune(model, train, probe, Schedule(PROBE, batch_size=BATCH, seed=seed)))
    named = trained(model, frozen=() if method == "LP-FT" else ("^head",))
    optimizer = METHODS[method](named, rate, layers(zero).only([name for name, _ in named]))
    record: dict[str, Any] = {}
    if isinstance(optimizer, AdamSPD):
        with audited(optimizer, log, every=STEPS) as session:
            losses = [progress.loss for progress in finetune(model, train, optimizer, schedule)]
        table = read_audit(log).activity.set_index("layer")
        record["said"] = session.summary
        record["active"] = (table["active"] / table["decisions"]).round(4).to_dict()
        totals = table[["decisions", "gated", "active"]].sum()
        record["gated_share"] = float(totals["gated"] / totals["decisions"])
        record["active_share"] = float(totals["active"] / totals["decisions"])
    else:
        losses = [progress.loss for progress in finetune(model, train, optimizer, schedule)]
    tower = [
        (p - q).detach()
        for (n, p), q in zip(model.named_parameters(), zero.parameters(), strict=True)
        if "head" not in n
    ]
    record["distance"] = float(torch.cat([t.reshape(-1) for t in tower]).norm())
    record["training_loss"] = mean(losses[-10:])
    return model, record


def study(out: Path, images: Path) -> dict[str, Any]:
    """Return all runs, done or found in the file."""
    base = ss.load(ASSETS / "base", templates=(ASSETS / "templates.txt").read_text().splitlines())
    sets = {p.name: ss.folder(p, base) for p in sorted(images.iterdir()) if p.is_dir()}
    train = sets.pop("train")
    zero = base.classifier(train.classes)
    result = json.loads(out.read_text()) if out.exists() else {"runs": {}}
    result["zero_shot"] = accuracies(zero, sets)
    for seed in SEEDS:
        for rate in RATES:
            for method in METHODS:
                key = f"{method} | {rate:g} | {seed}"
                if key in result["runs"]:
                    continue
                begin = time.perf_counter()
                with tempfile.TemporaryDirectory() as folder:
                    model, record = one_run(zero, train, method, rate, seed, Path(folder) / "spd.jsonl")
                record["end"] = accuracies(model, sets)
                record["wise"] = accuracies(averaged(zero, model, ALPHA), sets)
                record["seconds"] = round(time.perf_counter() - begin, 2)
                result["runs"][key] = record
                out.write_text(json.dumps(result, indent=1) + "\n")
                print(key, {k: round(record[k]["id"], 1) for k in ("end", "wise")}, record["end"]["ood"], flush=True)
    return result


def interval(values: list[float]) -> list[float]:
    """Return mean and half the width of its 95 % interval."""
    return [round(mean(values), 3), round(STUDENT[len(values) - 1] * stdev(values) / len(values) ** 0.5, 3)]


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Return means and paired differences to AdamW, each with an interval."""
    found: dict[str, Any] = {}
    for rate in RATES:
        for method in METHODS:
            runs = [result["runs"][f"{method} | {rate:g} | {seed}"] for seed in SEEDS]
            plain = [result["runs"][f"AdamW | {rate:g} | {seed}"] for seed in SEEDS]
            row: dict[str, Any] = {key: interval([run[key] for run in runs]) for key in ("distance", "training_loss")}
            for key in ("gated_share", "active_share"):
                if key in runs[0]:
                    row[key] = interval([run[key] for run in runs])
            for model in ("end", "wise"):
                row[model] = {name: interval([run[model][name] for run in runs]) for name in runs[0][model]}
                row[f"{model}_minus_adamw"] = {
                    name: interval(
                        [run[model][name] - other[model][name] for run, other in zip(runs, plain, strict=True)]
                    )
                    for name in runs[0][model]
                }
            found[f"{method} | {rate:g}"] = row
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "spd-study.json")
    parser.add_argument("--images", type=Path, default=Path(tempfile.gettempdir()) / "sharpscope-spd-images")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    result = study(chosen.out, extract(chosen.images))
    result["summary"] = summary(result)
    result["settings"] = {
        "steps": STEPS,
        "batch": BATCH,
        "rates": RATES,
        "seeds": SEEDS,
        "alpha": ALPHA,
        "probe": PROBE,
    }
    result["versions"], result["machine"] = versions(), facts("cpu", chosen.threads)
    chosen.out.write_text(json.dumps(result, indent=1) + "\n")
    zero = result["zero_shot"]
    print(f"{'zero-shot':<28}  id {zero['id']:5.1f}  ood {zero['ood']:5.1f}")
    for name, row in result["summary"].items():
        cells = [f"{m} {s} {row[m][s][0]:5.1f} ±{row[m][s][1]:4.1f}" for m in ("end", "wise") for s in ("id", "ood")]
        held = f"  active {100 * row['active_share'][0]:4.1f} %" if "active_share" in row else ""
        print(f"{name:<28}  {'  '.join(cells)}  distance {row['distance'][0]:5.2f}{held}")


if __name__ == "__main__":
    main()
