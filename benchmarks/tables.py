"""The tables of README.md in this folder and of the guide to measures, from the files in ``results``.

    python benchmarks/tables.py            # writes them
    python benchmarks/tables.py --check    # exits with 1 where the text is not what the files say

A table stands between ``<!-- name -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import scaling_table
import summary

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGES = (HERE / "README.md", HERE.parent / "docs" / "measures.md")
GIB = 2**30
NAMES = {"tiny": "Tiny tower", "b32": "ViT-B/32", "b16": "ViT-B/16", "l14": "ViT-L/14"}


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def about(result: Mapping[str, Any]) -> str:
    """Return machine and versions in a line."""
    machine, torch = result["machine"], result["versions"]["torch"]
    place = machine["cpu"] if machine.get("device") in (None, "cpu") else machine["device"]
    return f"{place}, torch {torch}, commit {machine['sharpscope_commit']}."


def path(run: str = "b32") -> str:
    """Return what an alpha of a scan costs, at the first and the next places of the path."""
    result = json.loads((RESULTS / f"path-{run}-h200.json").read_text())
    measured = ("setup", "trace", "lambda_max", "m_sharpness")
    rows = []
    for row in result["rows"]:
        costs, products = row["gradients"], row["products"]
        whole, blocks = (
            sum(products[m][kind] for m in ("trace", "lambda_max")) for kind in ("whole_products", "block_products")
        )
        sharpness = sum(costs[m] for m in measured[:3])
        slower = row["gradient_seconds"] / row["gradient_seconds_in_its_batches"]
        rows.append(
            [row["images"], row["batch"], f"{row['alpha']:.1f}", *(f"{costs[m]:.1f}" for m in measured),
             f"**{sharpness:.0f}**", f"{sharpness * slower:.0f}",
             f"{whole}, {blocks}", f"{sum(row['seconds'].values()):.1f}"]
        )  # fmt: skip
    head = ["images", "batch", "alpha", "point", "trace", "eigenvalue", "m-sharpness", "first three",
            "in gradients of its batches", "whole, block products", "seconds"]  # fmt: skip
    peak, limit = max(row["peak_bytes"] for row in result["rows"]), result["settings"]["memory"]
    within = f", limit {limit}" if limit else ""
    return f"{table(head, rows)}\n\n{about(result)} Peak {peak / GIB:.0f} GiB{within}."


def moves() -> str:
    """Return what an alpha costs when the weights moved further since the last."""
    result = json.loads((RESULTS / "moves-b32-h200.json").read_text())
    rows = []
    for row in result["rows"]:
        if row["alpha"] > 1:
            continue
        costs, counts = row["gradients"], row["products"]["lambda_max"]
        move = f"{100 * row['move']:.1f} %" if row["alpha"] else "-"
        rows.append(
            [row["images"], f"{row['alpha']:.2f}", move, *(f"{costs[m]:.1f}" for m in ("setup", "trace", "lambda_max")),
             f"{counts['whole_products']}, {counts['block_products']}", f"{row['peak_bytes'] / GIB:.0f}"]
        )  # fmt: skip
    head = ["images", "alpha", "moved by, of the weights' length", "point", "trace", "eigenvalue",
            "its whole, block products", "peak, GiB"]  # fmt: skip
    limit = result["settings"]["memory"]
    return f"{table(head, rows)}\n\n{about(result)} Limit of memory {limit} GiB."


def growth() -> str:
    """Return what products cost by images and network."""
    result = json.loads((RESULTS / "growth-h200.json").read_text())
    rows = [
        [NAMES[row["size"]], f"{row['weights'] / 1e6:.0f} M", f"{row['layers']} ({row['granularity']})",
         row["images"], row["batch"],
         f"{row['kept_graphs']} of {row['batches']}", f"{row['gradient_seconds']:.3f}",
         *(f"{row['gradients'][what]:.2f}" for what in ("move", "whole_product", "all_blocks")),
         f"{row['kept_bytes'] / GIB:.0f} of {row['graph_budget'] / GIB:.0f}", f"{row['peak_bytes'] / GIB:.0f}"]
        for row in result["rows"]
    ]  # fmt: skip
    head = ["network", "weights", "layers", "images", "batch", "graphs kept", "gradient, s", "new point",
            "whole product",
            "all blocks", "kept, GiB", "peak, GiB"]  # fmt: skip
    return f"{table(head, rows)}\n\n{about(result)} Limit of memory {result['settings']['memory']} GiB."


def layerwise(machine: str) -> str:
    """Return what sharpscope and its peers need for the same answers, by network and state of its weights."""
    parts = []
    for size, name in NAMES.items():
        for file in sorted(RESULTS.glob(f"layerwise-{size}*-{machine}.json"), reverse=True):
            result = json.loads(file.read_text())
            for kind, state in result["states"].items():
                images, loss = result["settings"]["images"], state["training_loss"]
                failed = [f"* {tool}: {why}." for tool, why in state.get("failed", {}).items()]
                parts += [f"{name}, {images} images, `{kind}`, loss {loss:.2g}:", summary.table(state["summary"])]
                parts += ["\n".join(failed)] if failed else []
            parts.append(about(result))
    return "\n\n".join(parts)


TABLES: dict[str, Callable[[], str]] = {
    "layerwise": partial(layerwise, "cpu"),
    "layerwise_h200": partial(layerwise, "h200"),
    "path": path,
    "path_tensor": partial(path, "b32-tensor"),
    "moves": moves,
    "growth": growth,
    "scaling": scaling_table.table,
    "shards": scaling_table.shards,
}


def filled(text: str) -> str:
    """Return the text with its tables as the files have them."""

    def table(found: re.Match[str]) -> str:
        return f"<!-- {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> None:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    chosen = parser.parse_args()
    wrong = [page for page in PAGES if page.read_text() != filled(page.read_text())]
    if chosen.check:
        raise SystemExit(f"not what the results say: {', '.join(map(str, wrong))}" if wrong else 0)
    for page in wrong:
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main()
