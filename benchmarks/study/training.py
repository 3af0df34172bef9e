"""The GPU's part: pre-train bases, fine-tune families, judge every point; each result is a file, written once."""

import json
import time
from dataclasses import dataclass
from pathlib import Path as FilePath

import numpy as np
import pandas as pd
import torch
from family import Family, trained
from finetune import zero_shot_head
from pages import face_list
from points import Judge, Line
from pretrain import Recipe, pretrained
from runs import Run, runs
from sets import OOD, SETS, Sets, image_sets, own_faces
from tower import Weights, image_weights

PATH_COLUMNS = ("model", "alpha", "set", "a", "b", "loss")
FREE_COLUMNS = ("model", "alpha", "estimator", "estimate")
POINT_COLUMNS = ("model", "kind", "layer", "alpha", "amount", "id_a", "id_b", "ood_a", "ood_b")


@dataclass(frozen=True)
class Scale:
    """How large a training: the study's, or a trial's."""

    bases: int = 3
    steps: int = 9000
    batch: int = 1024
    shorten: int = 1  # divides the steps of the fine-tunes
    every: int = 1  # only one in so many fine-tunes


def saved(path: FilePath, what: object) -> None:
    """Write beside, then rename: nothing half written is ever seen."""
    beside = path.with_suffix(".part")
    if isinstance(what, pd.DataFrame):
        what.to_csv(beside, index=False, float_format="%.7g")
    else:
        torch.save(what, beside)
    beside.rename(path)


def base_weights(archive: FilePath, number: int, scale: Scale, folder: FilePath) -> Weights:
    """Return a pre-trained CLIP, rounded to float16; from the folder if it is there."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    file = folder / f"base-{number}.pt"
    if not file.exists():
        torch.set_float32_matmul_precision("high")
        coverage, faces = face_list(archive)
        recipe, log = Recipe(scale.steps, scale.batch, seed=1000 + 10 * number), []
        weights: Weights = {}
        for done, loss, seconds, now in pretrained(coverage, own_faces(faces, number), recipe, device, every=1500):
            log.append({"base": number, "step": done, "loss": loss, "seconds": round(seconds, 1)})
            weights = now
        torch.set_float32_matmul_precision("highest")
        rounded = {n: w.half().float().cpu() for n, w in weights.items()}
        saved(file, {"weights": rounded, "head": zero_shot_head(rounded), "log": log})
    return {n: w.to(device) for n, w in torch.load(file)["weights"].items()}


def named(base: int, number: int, end: bool = False) -> str:
    """Return a model's name; pool B's models have one at their target and one at the end."""
    return f"b{base}-{number:02d}" + ("-end" if end else "")


def taken(family: Family, tried: list[Run], base: int) -> list[tuple[str, Run, Weights, int, float]]:
    """Return the models that a family gives: name, run, tower, steps done (-1: target missed), clean training loss."""
    found = []
    for i, run in enumerate(tried):
        end = {n: w[i].cpu() for n, w in family.end.items()}
        last = float(family.losses[-1, i])
        if run.pool == "B":
            met = int(family.reached[i])
            loss = float(family.losses[met // 10 - 1, i]) if met > 0 else last
            found.append((named(base, i), run, {n: w[i].cpu() for n, w in family.matched.items()}, met, loss))
        if run.pool != "B" or run.setting in ("plain", "SPD", "L2-SP"):
            found.append((named(base, i, run.pool == "B"), run, end, run.steps + run.probe, last))
    return found


def fine_tuned(base: Weights, number: int, sets: Sets, scale: Scale, folder: FilePath, graph: bool) -> None:
    """Fine-tune a base's family; write its models, their facts, SPD's activity, and the paths' accuracies."""
    tried = runs()[:: scale.every]
    family = trained(base, tried, sets["pool"], sets["train"], graph=graph, shorten=scale.shorten)
    start, head = {n: w.detach() for n, w in image_weights(base).items()}, zero_shot_head(base).detach()
    judge, facts, paths, free, models = Judge(sets, head), [], [], [], {}
    for name, run, tower, steps, loss in taken(family, tried, number):
        line = Line(start, {n: w.to(head.device) for n, w in tower.items()})
        finite = all(bool(w.isfinite().all()) for w in tower.values())
        row = {"model": name, "base": number, **run.facts, "steps_done": steps, "target": family.target, "loss": loss}
        distances = {f"distance {layer.removeprefix('visual.')}": d for layer, d in line.distances().items()}
        facts.append({**row, "finite": finite, **distances})
        if finite and steps > 0:
            more, estimates = judge.path_rows(name, line)
            paths += more
            free += estimates
            if run.pool != "C" and not name.endswith("-end"):
                models[name] = tower
    saved(folder / f"paths-{number}.csv", pd.DataFrame(paths, columns=list(PATH_COLUMNS)))
    saved(folder / f"labelfree-{number}.csv", pd.DataFrame(free, columns=list(FREE_COLUMNS)))
    saved(folder / f"activity-{number}.csv", activity(family, tried, number))
    saved(folder / f"models-{number}.csv", pd.DataFrame(facts))
    (folder / "models").mkdir(exist_ok=True)
    for name, tower in models.items():
        saved(folder / "models" / f"{name}.pt", tower)
    ends = {"start": {n: w.cpu() for n, w in start.items()}, "head": head.cpu(), "models": list(models)}
    saved(folder / f"family-{number}.pt", ends)


def activity(family: Family, tried: list[Run], base: int) -> pd.DataFrame:
    """Return SPD's decisions, tensor by tensor."""
    rows = [
        (named(base, i), tensor, family.end[tensor][i].numel(), *map(float, shares[:, i]))
        for i, run in enumerate(tried)
        if run.method == "SPD"
        for tensor, shares in family.activity.items()
    ]
    return pd.DataFrame(rows, columns=["model", "tensor", "size", "gated", "active"])


def judged(number: int, sets: Sets, folder: FilePath) -> None:
    """Judge every mix of a base's models, in the order in which they are measured; a file per model."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    family = torch.load(folder / f"family-{number}.pt")
    start, judge = {n: w.to(device) for n, w in family["start"].items()}, Judge(sets, family["head"].to(device))
    for name in shuffled(family["models"]):
        file = folder / "points" / f"{name}.csv"
        if not file.exists():
            tower = torch.load(folder / "models" / f"{name}.pt")
            rows = judge.point_rows(name, Line(start, {n: w.to(device) for n, w in tower.items()}))
            saved(file, pd.DataFrame(rows, columns=list(POINT_COLUMNS)))


def shuffled(models: list[str]) -> list[str]:
    """Return the models in the fixed random order in which they are measured."""
    return [models[i] for i in np.random.default_rng(10).permutation(len(models))]


def all_trained(archive: FilePath, folder: FilePath, scale: Scale, graph: bool) -> None:
    """Do whatever is not in the folder yet."""
    begin = time.perf_counter()
    if not (folder / "sets.pt").exists():
        made = image_sets(archive)
        saved(folder / "measured.pt", {name: made[name] for name in ("train", "id")})
        saved(folder / "sets.pt", made)
    sets: Sets = torch.load(folder / "sets.pt", weights_only=False)
    for number in range(scale.bases):
        if not (folder / f"family-{number}.pt").exists():
            base = base_weights(archive, number, scale, folder)
            print("base", number, round(time.perf_counter() - begin, 1), flush=True)
            fine_tuned(base, number, sets, scale, folder, graph)
            frame = pd.read_csv(folder / f"paths-{number}.csv")
            table = frame[frame["set"].isin(OOD)].groupby("alpha")[["a", "b"]].mean().mean(axis=1)
            print(
                "family", number, round(time.perf_counter() - begin, 1), table.round(1).tolist(), len(SETS), flush=True
            )
    (folder / "points").mkdir(exist_ok=True)
    for number in range(scale.bases):
        judged(number, sets, folder)
        print("points", number, round(time.perf_counter() - begin, 1), flush=True)


def machine() -> str:
    """Return what the numbers were made on, as JSON."""
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return json.dumps({"device": chip, "torch": torch.__version__, "numpy": np.__version__})
