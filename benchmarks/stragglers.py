"""How often the straggler statistics are wrong on unrelated curves, and how often they find what was planted.

    python benchmarks/stragglers.py --size            # simulated paths; numpy only, about five minutes
    python benchmarks/stragglers.py --power --trials 50   # planted in small networks, end to end; about half an hour

Each writes a file into benchmarks/results. What they say is in NOTES.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from machine import facts, versions

RESULTS = Path(__file__).parent / "results"


def size(paths: int, draws: int) -> dict[str, Any]:
    from null_study import LAYERS, LEVEL, LIKENESS, study

    about = {"paths": paths, "surrogates": draws, "layers": LAYERS, "level": LEVEL, "likeness": LIKENESS}
    return {**about, "unit": "percent", "rows": study(paths, draws)}


def power(trials: int, strength: float, first: int, kinds: Sequence[str]) -> dict[str, Any]:
    from plants import trial

    found = []
    for kind in kinds:
        for seed in range(first, first + trials):
            found.append(trial(kind, seed, strength))
            print(found[-1], flush=True)
    counted = ("found", "first", "supported", "co_moves", "beyond_null", "others_flagged", "others_beyond_null")
    rates = {
        kind: {name: sum(getattr(t, name) for t in found if t.kind == kind) / trials for name in counted}
        for kind in kinds
    }
    return {
        "trials": trials,
        "first_seed": first,
        "strength": strength,
        "rates": rates,
        "each": [asdict(t) for t in found],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--size", action="store_true")
    asked.add_argument("--power", action="store_true")
    parser.add_argument("--paths", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=999)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--strength", type=float, default=1.0, help="of what is planted")
    parser.add_argument("--first-seed", type=int, default=1000, help="of the trials")
    parser.add_argument("--kinds", nargs="+", default=["rescaled", "shuffled", "noise"], help="of plants")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    started, name = time.monotonic(), "size" if given.size else "power"
    found = (
        size(given.paths, given.draws)
        if given.size
        else power(given.trials, given.strength, given.first_seed, given.kinds)
    )
    about = {"machine": facts("cpu", 1), "versions": versions(), "seconds": round(time.monotonic() - started)}
    out = given.out or RESULTS / f"stragglers-{name}.json"
    out.write_text(json.dumps({**found, **about}, indent=1) + "\n")
    print(out)


if __name__ == "__main__":
    main()
