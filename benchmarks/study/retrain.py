"""Train and measure the whole family from fixed seeds: one GPU, as many processor cores as there are.

    PYTHONPATH=.:benchmarks/glyph:benchmarks/study python benchmarks/study/retrain.py bitmaps.npz WORK RESULTS

`bitmaps.npz` is made by ../glyph. WORK holds every piece as it is finished: run again, the same command goes on where
it was cut. RESULTS gets the rows. On one H200 with 16 cores about ten minutes; repeats in kind, not bit by bit.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from sharpness import CORE, MORE, scanned
from training import Scale, all_trained, machine, saved, shuffled

INNER = [round(0.1 * i, 1) for i in range(1, 10)]


def tasks(folder: Path) -> list[tuple[str, str]]:
    """Return (model, what) that can be measured now: training images first; interleaved over bases."""
    families = [torch.load(f)["models"] for f in sorted(folder.glob("family-*.pt"))]
    orders = [shuffled(models) for models in families]
    longest = max(map(len, orders), default=0)
    mixed = [order[i] for i in range(longest) for order in orders if i < len(order)]
    starts = [(order[0], "start") for order in orders]
    return [*starts, *((m, what) for m in mixed for what in ("train", "path")), *((m, "heldout") for m in mixed)]


def measured(model: str, what: str, folder: Path) -> pd.DataFrame:
    """Return the rows of one task."""
    family = torch.load(folder / f"family-{model[1]}.pt")
    sets = torch.load(folder / "measured.pt", weights_only=False)
    ends = (family["start"], torch.load(folder / "models" / f"{model}.pt"))
    alphas = {"start": [0.0], "path": INNER}.get(what, [1.0])
    measures = CORE if what in ("start", "path") else (*CORE, *MORE)
    begin = time.perf_counter()
    rows = scanned(ends, family["head"], sets["id" if what == "heldout" else "train"], alphas, measures)
    name = f"b{model[1]}-start" if what == "start" else model
    return rows.assign(model=name, on="heldout" if what == "heldout" else "train", seconds=time.perf_counter() - begin)


def worker(folder: Path) -> None:
    """Measure what no other worker has claimed, until all families are there and nothing is left."""
    torch.set_num_threads(1)
    (folder / "rows").mkdir(exist_ok=True)
    while True:
        finished = (folder / "trained").exists()
        open_tasks = [t for t in tasks(folder) if not (folder / "rows" / f"{t[0]}.{t[1]}.claim").exists()]
        if not open_tasks:
            if finished:
                return
            time.sleep(1)
            continue
        for model, what in open_tasks[:8]:
            file = folder / "rows" / f"{model}.{what}.csv"
            try:
                file.with_suffix(".claim").touch(exist_ok=False)
            except FileExistsError:
                continue
            saved(file, measured(model, what, folder))
            break


def gathered(folder: Path, out: Path) -> None:
    """Join the pieces into the rows that the repository keeps."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("models", "paths", "labelfree", "activity"):
        _joined(sorted(folder.glob(f"{name}-*.csv")), out / f"{name}.csv.gz")
    _joined(sorted((folder / "points").glob("*.csv")), out / "points.csv.gz")
    _joined(sorted((folder / "rows").glob("*.csv")), out / "sharpness.csv.gz")
    logs = [entry for f in sorted(folder.glob("base-*.pt")) for entry in torch.load(f)["log"]]
    pd.DataFrame(logs).assign(machine=machine()).to_csv(out / "pretraining.csv", index=False)


def _joined(files: list[Path], out: Path) -> None:
    frames = [pd.read_csv(f) for f in files]
    if frames:
        frame = pd.concat(frames, ignore_index=True)
        if "stderr" in frame:
            frame["stderr"] = frame["stderr"].map("{:.3g}".format)
        frame.to_csv(out, index=False, float_format="%.6g", compression={"method": "gzip", "mtime": 1})


def command(options: argparse.Namespace, role: str, *more: str) -> subprocess.Popen[bytes]:
    """Start this script in another role."""
    quiet = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} if role == "worker" else {}
    scale = [f"--{k}={getattr(options, k)}" for k in ("bases", "steps", "batch", "shorten", "every")]
    given = [str(options.archive), str(options.work), str(options.out)]
    return subprocess.Popen(
        [sys.executable, __file__, *given, *scale, f"--role={role}", *more], env={**os.environ, **quiet}
    )


def supervised(options: argparse.Namespace) -> None:
    """Run training and workers side by side until all is done or time is up; then gather what there is."""
    until = time.monotonic() + options.seconds
    for claim in options.work.glob("rows/*.claim"):
        if not claim.with_suffix(".csv").exists():
            claim.unlink()  # of a worker that was cut
    workers = [command(options, "worker") for _ in range(options.workers)]
    train = _waited(command(options, "train", "--graph"), until)
    if train.poll():  # should the capture fail, without it
        train = _waited(command(options, "train"), until)
    while not train.poll() and time.monotonic() < until and any(w.poll() is None for w in workers):
        time.sleep(0.5)
    for process in [train, *workers]:
        if process.poll() is None:
            process.kill()
    gathered(options.work, options.out)


def _waited(process: subprocess.Popen[bytes], until: float) -> subprocess.Popen[bytes]:
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.5)
    return process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("archive", "work", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--role", choices=("all", "train", "worker"), default="all")
    parser.add_argument("--graph", action="store_true")
    parser.add_argument("--seconds", type=float, default=1e9, help="gather what there is after so long")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    for name, value in vars(Scale()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    if not options.archive.exists():
        parser.error(f"{options.archive} is not there: make it as benchmarks/glyph/README.md says, up to bitmaps.py")
    options.work.mkdir(parents=True, exist_ok=True)
    if options.role == "worker":
        worker(options.work)
    elif options.role == "train":
        scale = Scale(*(getattr(options, k) for k in vars(Scale())))
        all_trained(options.archive, options.work, scale, options.graph and torch.cuda.is_available())
        (options.work / "trained").touch()
    else:
        supervised(options)


if __name__ == "__main__":
    main()
