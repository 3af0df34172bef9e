"""Pre-train one base, fine-tune it in every way, measure every path; write all of it to a folder.

Usage: python train.py bitmaps.npz pages.npz OUTPUT [STEPS [BATCH]]

OUTPUT gets base.safetensors (float16), towers-K.safetensors (fine-tuned image towers, float16, stacked by run),
correct.npz (which image each point of each path gets right) and log.json. About five minutes on one NVIDIA H200;
without a GPU it runs too, slowly: try 3 steps of batch 32.
"""

import json
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from finetune import Run, finetuned, runs
from pages import SETS, face_list
from paths import ALPHAS, accuracy, correctness
from pretrain import Recipe, pretrained
from safetensors.torch import save_file
from tower import Weights, image_weights

CHUNK = 15  # runs trained side by side, and stored in one file


def half_precision(weights: Weights) -> Weights:
    """Return the weights as they will be shipped, float16; everything later is measured from these values."""
    return {name: w.detach().half().cpu().contiguous() for name, w in weights.items()}


def base_pair(archive: Path, recipe: Recipe, sets: dict[str, np.ndarray], log: dict) -> Weights:
    """Return the pre-trained weights, rounded to float16, and log the loss and the zero-shot accuracies."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    coverage, faces = face_list(archive)
    for done, loss, seconds, weights in pretrained(coverage, faces, recipe, device, every=2000):
        rounded = {n: w.half().float() for n, w in weights.items()}
        still = {n: w[None] for n, w in image_weights(rounded).items()}
        table = {n: round(float(a[0, 0]), 1) for n, a in accuracy(correctness(rounded, still, sets)).items()}
        log["pretraining"].append({"step": done, "loss": loss, "seconds": round(seconds, 1), "zero_shot": table})
        print(done, round(loss, 3), round(seconds, 1), table, flush=True)
    return rounded


def machine() -> dict[str, str]:
    """Return what the numbers were made with."""
    import transformers

    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    return {"device": chip, "python": platform.python_version(), **versions}


def fine_tunes(base: Weights, tried: list[Run], sets: dict[str, np.ndarray], output: Path, log: dict) -> None:
    """Fine-tune and measure all runs; write their towers and which images their paths get right."""
    right = []
    for number, start in enumerate(range(0, len(tried), CHUNK)):
        some = tried[start : start + CHUNK]
        begin = time.perf_counter()
        towers, loss = finetuned(base, some, sets["pool/images"], sets["pool/labels"])
        save_file(half_precision(towers), output / f"towers-{number}.safetensors")
        right.append(correctness(base, {n: w.half().float() for n, w in towers.items()}, sets))
        table = accuracy(right[-1])
        log["finetuning"] += [
            asdict(run) | {"loss": float(loss[i]), "id": table["id"][i].tolist(), "ood": table["ood"][i].tolist()}
            for i, run in enumerate(some)
        ]
        print(number, round(time.perf_counter() - begin, 1), "s", flush=True)
    joined = {name: np.concatenate([r[name] for r in right]) for name in SETS}
    np.savez_compressed(output / "correct.npz", **{n: np.packbits(v, axis=-1) for n, v in joined.items()})


def main(archive: Path, pages: Path, output: Path, steps: int = 24000, batch: int = 1024) -> None:
    torch.set_float32_matmul_precision("high")
    begin = time.perf_counter()
    sets, recipe = dict(np.load(pages)), Recipe(steps, batch)
    log: dict = {"machine": machine(), "recipe": asdict(recipe), "alphas": ALPHAS, "pretraining": [], "finetuning": []}
    output.mkdir(parents=True, exist_ok=True)
    base = base_pair(archive, recipe, sets, log)
    save_file(half_precision(base), output / "base.safetensors")
    torch.set_float32_matmul_precision("highest")
    fine_tunes(base, runs(), sets, output, log)
    log["seconds"] = round(time.perf_counter() - begin, 1)
    (output / "log.json").write_text(json.dumps(log, indent=1))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), *map(int, sys.argv[4:6]))
