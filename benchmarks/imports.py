"""How long the command takes to answer --help, and what `import sharpscope` adds to `import torch`.

Each line runs in a fresh process, the lines in turn, so that a busy machine slows all alike. Seconds are medians, of
the wall clock and of the processor (which other work on the machine disturbs less).

    python benchmarks/imports.py [--repeats 15]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import facts

RESULT = Path(__file__).parent / "results" / "imports.json"
LINES = {
    "python": ["-c", "pass"],
    "sharpscope --help": ["-m", "sharpscope", "--help"],
    "sharpscope check --help": ["-m", "sharpscope", "check", "--help"],
    "import sharpscope": ["-c", "import sharpscope"],
    "import torch": ["-c", "import torch"],
    "import torch, sharpscope": ["-c", "import torch, sharpscope"],
    "import torch, sharpscope; sharpscope.scan": ["-c", "import torch, sharpscope; sharpscope.scan"],
    "import sharpscope; sharpscope.open, sharpscope.check": ["-c", "import sharpscope as s; s.open, s.check"],
}
HEAVY = ("torch", "transformers", "matplotlib", "pandas", "scipy")


def once(arguments: list[str]) -> tuple[float, float]:
    """Return seconds of the wall clock and of the processor that a fresh Python takes."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def loaded(arguments: list[str]) -> list[str]:
    """Return which heavy packages a statement loads."""
    code = f"{arguments[1]}; import sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.split()


def measured(repeats: int) -> dict[str, dict[str, object]]:
    """Return the medians of every line."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in LINES}
    for arguments in LINES.values():
        once(arguments)  # compiles, and fills the cache of the disk
    for _ in range(repeats):
        for name, arguments in LINES.items():
            times[name].append(once(arguments))
    found: dict[str, dict[str, object]] = {}
    for name, pairs in times.items():
        wall, processor = (round(statistics.median(column), 4) for column in zip(*pairs, strict=True))
        found[name] = {"wall_seconds": wall, "processor_seconds": processor}
        if LINES[name][0] == "-c":
            found[name]["loads"] = loaded(LINES[name])
    return found


def added(repeats: int) -> dict[str, float]:
    """Return the seconds that `import sharpscope` takes in a process that has torch, best and median."""
    code = "import torch, time; t = time.perf_counter(); import sharpscope; print(time.perf_counter() - t)"
    command = [sys.executable, "-c", code]
    found = [float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(repeats)]
    return {"median_seconds": round(statistics.median(found), 4), "worst_seconds": round(max(found), 4)}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = {
        "machine": facts("cpu", 1),
        "repeats": repeats,
        "lines": measured(repeats),
        "added to torch by import sharpscope": added(repeats),
        "limits": {"sharpscope --help": 0.3, "added to torch by import sharpscope": 0.06},
    }
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    for name, line in found["lines"].items():
        print(f"{line['wall_seconds']:7.3f} s wall {line['processor_seconds']:7.3f} s processor  {name}")
    print(f"import sharpscope after torch: {found['added to torch by import sharpscope']}")


if __name__ == "__main__":
    main()
