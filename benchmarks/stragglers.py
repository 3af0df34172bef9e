"""How often the straggler statistics are wrong on unrelated curves, and how often they find what was planted.

    python benchmarks/stragglers.py --size            # simulated paths; numpy only, about five minutes
    python benchmarks/stragglers.py --power           # planted in small networks, end to end; about half an hour
    python benchmarks/stragglers.py --nothing --first-seed 4000   # nothing planted; a few minutes

Each writes a file into benchmarks/results. What they say is in NOTES.md. Power is as asked for if each of the first
three rows of the design has 45 of 50 planted layers found and 40 named first; the others say what it takes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from machine import facts, versions

if TYPE_CHECKING:
    from plants import Trial

RESULTS = Path(__file__).parent / "results"
# Kind, strength, images of a set.
ASKED = (("rescaled", 1.0, 1000), ("shuffled", 1.0, 1000), ("harmful noise", 1.0, 3000))
FURTHER = (
    ("harmful noise", 1.0, 1000), ("noise", 1.0, 300), ("noise", 1.0, 3000),
    *(("noise", length, 1000) for length in (0.7, 1.0, 1.5)),
)  # fmt: skip
ROW = ("kind", "strength", "images")
COUNTED = (
    "found", "first", "off_zero", "others_flagged", "others_wrong", "co_moves", "beyond_null", "others_beyond_null",
)  # fmt: skip
UNPLANTED = (("nothing", 1.0, 1000), ("random", 1.0, 1000))


def size(paths: int, draws: int) -> dict[str, Any]:
    from null_study import LAYERS, LEVEL, LIKENESS, study

    about = {"paths": paths, "surrogates": draws, "layers": LAYERS, "level": LEVEL, "likeness": LIKENESS}
    return {**about, "unit": "percent", "rows": study(paths, draws)}


def power(trials: int, first: int, design: Sequence[tuple[str, float, int]], out: Path) -> dict[str, Any]:
    from plants import CONTROLS, MODELS, trial

    rows: list[dict[str, Any]] = []
    about = {"trials": trials, "first_seed": first, "random_moves": CONTROLS, "models": MODELS, "rows": rows}
    for row in design:
        found = []
        for seed in range(first, first + trials):
            found.append(trial(row[0], seed, *row[1:], along=row in ASKED))
            print(*row[1:], found[-1], flush=True)
        rows.append({**dict(zip(ROW, row, strict=True)), **rates(found), "each": [asdict(t) for t in found]})
        out.write_text(json.dumps(about, indent=1) + "\n")  # hours of work are not lost with the last row
    return about


def rates(found: Sequence[Trial]) -> dict[str, Any]:
    """Return means over trials of what was counted, and how many plants that do harm in truth are found."""
    from plants import HARM

    counted = [name for name in COUNTED if getattr(found[0], name) is not None]
    harmful = [t.found for t in found if t.gain is not None and t.gain >= HARM]
    means = {name: sum(getattr(t, name) for t in found) / len(found) for name in counted}
    return {**means, "harmful": len(harmful), "harmful_found": sum(harmful)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked = parser.add_mutually_exclusive_group(required=True)
    for name in ("size", "power", "nothing"):
        asked.add_argument(f"--{name}", dest="what", action="store_const", const=name)
    parser.add_argument("--paths", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=999)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--first-seed", type=int, default=5000, help="of the trials")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    started, out = time.monotonic(), given.out or RESULTS / f"stragglers-{given.what}.json"
    if given.what == "size":
        found = size(given.paths, given.draws)
    else:
        design = (*ASKED, *FURTHER) if given.what == "power" else UNPLANTED
        found = power(given.trials, given.first_seed, design, out)
    about = {"machine": facts("cpu", 1), "versions": versions(), "seconds": round(time.monotonic() - started)}
    out.write_text(json.dumps({**found, **about}, indent=1) + "\n")
    print(out)


if __name__ == "__main__":
    main()
