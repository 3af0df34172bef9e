"""The tables of several GPUs, of results/scaling-*.json and sharded-*.json, for ``tables.py`` to write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
HEAD = (
    "| network, images, machine, commit | GPUs | shared | seconds | times as fast | efficiency | peak a GPU, GB (of) "
    "| largest gap of a value |\n|---|---|---|---|---|---|---|---|"
)

SHARDS = (
    "| network, images | run | GPUs | limit a GPU, GB | peak, GB | seconds | largest gap of a value |\n"
    "|---|---|---|---|---|---|---|"
)


def line(settings: dict[str, Any], machine: dict[str, Any], first: dict[str, Any], row: dict[str, Any]) -> str:
    """Return the line of a run; its speed is over the run with the fewest GPUs, which the line names."""
    peaks = [peak for peak in row["peak_bytes"] if peak is not None]
    peak = f"{max(peaks) / 1e9:.1f} ({row['budget_bytes'] / 1e9:.0f})" if peaks else "-"
    gaps = row["gap"]
    cells = (
        f"{settings['size']}, {settings['limit']}, {machine['device']}, {machine['sharpscope_commit']}",
        str(row["processes"]),
        row["parallel"] if row["processes"] > 1 else "-",
        f"{row['seconds']:.1f}",
        f"{row['speedup']:.2f} (of {first['processes']})",
        f"{row['efficiency']:.1%}",
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


def shards(folder: Path = HERE / "results") -> str:
    """Return the table of scans in shards, and of the scans on one GPU that they stand against."""
    lines = []
    for path in sorted(folder.glob("sharded-*.json")):
        found = json.loads(path.read_text())
        size = f"{found['settings']['size']}, {found['settings']['images']}, {found['machine']['device']}"
        for row in found["rows"]:
            limit, peaks = row["budget_bytes"], [peak for peak in row["peak_bytes"] if peak is not None]
            cells = (
                size,
                row["run"],
                str(row["processes"]),
                f"{limit / 1e9:.2f}" if limit else "-",
                f"{max(peaks) / 1e9:.2f}" if peaks else "-",
                f"{row['seconds']:.1f}" if row["error"] is None else "out of memory",
                f"{max(found['gap'].values()):.0e}" if row["run"] == "in shards" and found["gap"] else "-",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([SHARDS, *lines])
