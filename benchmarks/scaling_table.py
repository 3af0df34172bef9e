"""The table of several GPUs in README.md beside this, made of results/scaling-*.json.

Usage, from the root of the repository: ``python benchmarks/scaling_table.py`` writes it anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BEGIN, END = "<!-- scaling -->", "<!-- /scaling -->"
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


def written(text: str, found: str) -> str:
    """Return the text with the table between its marks."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{found}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    page = HERE / "README.md"
    page.write_text(written(page.read_text(), table()))
