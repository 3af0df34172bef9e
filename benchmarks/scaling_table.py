"""The table of several GPUs, made of results/scaling-*.json; ``tables.py`` writes it into README.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
HEAD = (
    "| network, images | GPUs | shared | seconds | times as fast | efficiency | peak a GPU, GB (of) "
    "| largest gap of a value |\n|---|---|---|---|---|---|---|---|"
)


def line(settings: dict[str, Any], machine: dict[str, Any], first: dict[str, Any], row: dict[str, Any]) -> str:
    """Return the line of a run; its speed is over the run with the fewest GPUs, which the line names."""
    peaks = [peak for peak in row["peak_bytes"] if peak is not None]
    peak = f"{max(peaks) / 1e9:.1f} ({row['budget_bytes'] / 1e9:.0f})" if peaks else "-"
    gaps = row["gap"]
    cells = (
        f"{settings['size']}, {settings['limit']}, {machine['device']}",
        str(row["processes"]),
        row["parallel"] if row["processes"] > 1 else "-",
        f"{row['seconds']:.1f}",
        f"{row['speedup']:.2f} (of {first['processes']})",
        f"{row['efficiency']:.0%}",
        peak,
        "not compared" if gaps is None else f"{max(gaps.values()):.0e}",
    )
    return "| " + " | ".join(cells) + " |"


def table(folder: Path = HERE / "results") -> str:
    """Return the table of every run in the folder's files."""
    lines = []
    for path in sorted(folder.glob("scaling-*.json")):
        found = json.loads(path.read_text())
        lines += [line(found["settings"], found["machine"], found["rows"][0], row) for row in found["rows"]]
    return "\n".join([HEAD, *lines])
