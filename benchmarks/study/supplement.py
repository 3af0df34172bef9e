"""Exploratory, after the plan: H3 on fine-tunes of the embedded base, whose interpolation is known to fail.

    PYTHONPATH=.:benchmarks/glyph:benchmarks/study python benchmarks/study/supplement.py bitmaps.npz OUTPUT RESULTS

OUTPUT is the folder that ../glyph/train.py wrote. The study's own bases gave no failed path. Runs at rate 1e-2 are
judged along their paths; of those that fail on half A the trace is measured along the path, and alpha .5 is taken apart
on half B. Rows are written after each run; about ten minutes on a free core.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from finetune import Run, runs, zero_shot_head
from points import ALPHAS, Judge, Line
from safetensors.torch import load_file
from sets import OOD, Sets, image_sets
from sharpness import TRACE, scanned
from tower import Weights, encoded_images, image_weights

RATE, MIX = 1e-2, 0.5


def candidates(output: Path) -> list[tuple[str, Run, Weights]]:
    """Return name, run and image tower of the runs at the rate."""
    parts = [load_file(part) for part in sorted(output.glob("towers-*.safetensors"))]
    towers = {n: torch.cat([p[n] for p in parts]).float() for n in parts[0]}
    return [
        (f"pair-{i:02d}", run, {n: w[i] for n, w in towers.items()}) for i, run in enumerate(runs()) if run.rate == RATE
    ]


def taken_apart(judge: Judge, line: Line, name: str) -> list[tuple]:
    """Return rows (model, kind, layer, alpha, amount, ood_b): each layer made sparse, shrunk, and reset at alpha .5."""
    wanted = {("sparse", 0.9), ("layer", 0.1), ("layer", 0.0)}
    some = [(p, w) for p, w in line.places() if p.alpha == MIX and (p.kind, p.amount) in wanted]
    return [(name, *place, accuracy(judge, w, slice(1, None, 2))) for place, w in some]


def accuracy(judge: Judge, weights: Weights, part: slice) -> float:
    """Return the mean OOD accuracy, in per cent, on a part of each set."""
    found = []
    for name in OOD:
        place = judge.slices[name]
        with torch.no_grad():
            right = (encoded_images(weights, judge.pixels[place][part]) @ judge.head.T).argmax(-1)
        found.append(100 * float((right == judge.labels[place][part]).double().mean()))
    return float(np.mean(found))


def studied(sets: Sets, base: Weights, tried: list[tuple[str, Run, Weights]], results: Path) -> None:
    """Write paths of all, points and traces of those that fail."""
    head, start = zero_shot_head(base), image_weights(base)
    judge, paths, points, traces = Judge(sets, head), [], [], []
    for name, run, tower in tried:
        line, halves = Line(start, tower), (slice(0, None, 2), slice(1, None, 2))
        mine = [(name, alpha, *(accuracy(judge, line.uniform[alpha], half) for half in halves)) for alpha in ALPHAS]
        paths += [(*row, run.rate, run.renderings, run.seed) for row in mine]
        inner = max(a for _, alpha, a, _ in mine if 0 < alpha < 1)
        print(name, run.rate, "zero-shot", round(mine[0][2], 1), "best inside", round(inner, 1), flush=True)
        if inner <= mine[0][2]:
            points += taken_apart(judge, line, name)
            traces.append(scanned((start, tower), head, sets["train"], list(ALPHAS), (TRACE,)).assign(model=name))
        tables = {
            "paths": pd.DataFrame(paths, columns=["model", "alpha", "ood_a", "ood_b", "rate", "renderings", "seed"]),
            "points": pd.DataFrame(points, columns=["model", "kind", "layer", "alpha", "amount", "ood_b"]),
            "traces": pd.concat(traces, ignore_index=True).drop(columns=["draws", "converged"]) if traces else None,
        }
        for kind, frame in tables.items():
            how = {"method": "gzip", "mtime": 1}
            if frame is not None:
                file = results / f"supplement-{kind}.csv.gz"
                frame.to_csv(file, index=False, float_format="%.6g", compression=how)


def main(archive: Path, output: Path, results: Path) -> None:
    torch.set_num_threads(1)
    base = {n: w.float() for n, w in load_file(output / "base.safetensors").items()}
    studied(image_sets(archive), base, candidates(output), results)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
