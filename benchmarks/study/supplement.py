"""Exploratory, after the plan: H3 on fine-tunes of the embedded base, whose interpolation is known to fail.

    PYTHONPATH=.:benchmarks/glyph:benchmarks/study python benchmarks/study/supplement.py bitmaps.npz OUTPUT RESULTS

OUTPUT is the folder that ../glyph/train.py wrote. The study's own bases gave no failed path. Runs at rates 3e-3 and
1e-2 are judged along their paths; of those that fail on half A the trace is measured along the path, and alpha .5 is
taken apart. About half an hour on one core.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from finetune import Run, runs, zero_shot_head
from points import ALPHAS, CHUNK, Judge, Line
from safetensors.torch import load_file
from sets import OOD, Sets, image_sets
from sharpness import TRACE, scanned
from tower import Weights, image_weights

RATES, MIX = (3e-3, 1e-2), 0.5


def candidates(output: Path) -> list[tuple[str, Run, Weights]]:
    """Return name, run and image tower of the runs at the two rates."""
    parts = [load_file(part) for part in sorted(output.glob("towers-*.safetensors"))]
    towers = {n: torch.cat([p[n] for p in parts]).float() for n in parts[0]}
    return [
        (f"pair-{i:02d}", run, {n: w[i] for n, w in towers.items()})
        for i, run in enumerate(runs())
        if run.rate in RATES
    ]


def path(judge: Judge, line: Line, name: str) -> list[tuple]:
    """Return rows (model, alpha, ood_a, ood_b)."""
    found = []
    for alpha in ALPHAS:  # one at a time: a CPU's caches
        halves = judge.halves(judge.answers([line.uniform[alpha]])[0][0])
        found.append((name, alpha, *map(float, np.mean([halves[s] for s in OOD], axis=0))))
    return found


def taken_apart(judge: Judge, line: Line, name: str) -> list[tuple]:
    """Return rows (model, kind, layer, alpha, amount, ood_a, ood_b) of every layer at alpha .5."""
    some = [
        (place, w) for place, w in line.places() if place.alpha == MIX and place.kind in ("layer", "sparse", "zeroed")
    ]
    rows = []
    for start in range(0, len(some), CHUNK):
        for place, weights in some[start : start + CHUNK]:
            halves = judge.halves(judge.answers([weights])[0][0])
            rows.append((name, *place, *map(float, np.mean([halves[s] for s in OOD], axis=0))))
    return rows


def studied(sets: Sets, base: Weights, tried: list[tuple[str, Run, Weights]]) -> dict[str, pd.DataFrame]:
    """Return paths of all, points and traces of those that fail."""
    head, start = zero_shot_head(base), image_weights(base)
    judge, paths, points, traces = Judge(sets, head), [], [], []
    for name, run, tower in tried:
        line = Line(start, tower)
        mine = path(judge, line, name)
        paths += [(*row, run.rate, run.renderings, run.seed) for row in mine]
        inner = max(a for _, alpha, a, _ in mine if 0 < alpha < 1)
        print(json.dumps({"model": name, "rate": run.rate, "zero-shot": mine[0][2], "best inside": inner}), flush=True)
        if inner <= mine[0][2]:
            points += taken_apart(judge, line, name)
            traces.append(scanned((start, tower), head, sets["train"], list(ALPHAS), (TRACE,)).assign(model=name))
    return {
        "paths": pd.DataFrame(paths, columns=["model", "alpha", "ood_a", "ood_b", "rate", "renderings", "seed"]),
        "points": pd.DataFrame(points, columns=["model", "kind", "layer", "alpha", "amount", "ood_a", "ood_b"]),
        "traces": pd.concat(traces, ignore_index=True).drop(columns=["draws", "converged"]),
    }


def main(archive: Path, output: Path, results: Path) -> None:
    torch.set_num_threads(1)
    base = {n: w.float() for n, w in load_file(output / "base.safetensors").items()}
    for name, frame in studied(image_sets(archive), base, candidates(output)).items():
        how = {"method": "gzip", "mtime": 1}
        frame.to_csv(results / f"supplement-{name}.csv.gz", index=False, float_format="%.6g", compression=how)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
