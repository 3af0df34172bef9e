"""All that is known of every layer of the embedded pair, and of recipes for it, as one page of tables.

Usage, from the root of the repository::

    PYTHONPATH=. python benchmarks/layer_evidence.py --pair success --scan runs/success \
        --out benchmarks/results/glyph-layers-success.md

The scan is that of ``sharpscope demo``, resumed where the folder holds it, with every image of every set in the
interventions, five random directions a layer and 39 where they can decide, the recommended alpha as a third base, and
60 recipes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
import torch

import sharpscope
from sharpscope.commands.report import material, measures
from sharpscope.demo import THREADS, settings
from sharpscope.intervention import Interventions
from sharpscope.result import ScanResult

ORDER = ("trace", "lambda_max", "m_sharpness")


def scanned(kind: str, folder: str) -> ScanResult:
    torch.set_num_threads(THREADS)
    chosen = settings(folder, kind)
    found = material(chosen)
    return sharpscope.scan(
        found.zero_shot,
        found.fine_tuned,
        found.id,
        ood=found.ood,
        alphas=chosen.alphas,
        measures=measures(chosen),
        sharpness_on=found.sharpness_on,
        limit=chosen.limit,
        interventions=Interventions(limit=None, draws=5, recommended=True),
        recipes=True,
        out=folder,
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def quoted(value: float, low: float, high: float) -> str:
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def moves(rows: pd.DataFrame) -> list[str]:
    """Return effect, control and verdict of every base for one layer."""
    found = []
    for row in rows.itertuples():
        control = quoted(row.control, row.control_low, row.control_high)
        found += [f"{quoted(row.effect, row.low, row.high)}{' **supported**' if row.supported else ''}", control]
    return found


def correlation(rows: pd.DataFrame, measure: str) -> str:
    mine = rows[rows["measure"] == measure]
    if mine.empty:
        return "-"
    row = mine.iloc[0]
    tested = pd.notna(row["null_low"])
    bar = f", null {row['null_low']:+.2f} to {row['null_high']:+.2f}" if tested else ""
    return f"{row['tau']:+.2f}{bar}: {row['verdict']}"


def layers(result: ScanResult) -> str:
    effects = result.interventions[result.interventions["split"] == "ood mean"]
    bases = list(dict.fromkeys(zip(effects["question"], effects["base"], strict=True)))
    heads = [part for question, base in bases for part in (f"{question}, from {base}", "random, as long")]
    rows = []
    for layer in result.meta["layers"]:
        mine = result.stragglers[result.stragglers["layer"] == layer]
        distance = mine["relative_delta"].iloc[0] if len(mine) else float("nan")
        told = [correlation(mine, measure) for measure in ORDER]
        rows.append([layer, f"{distance:.3f}", *told, *moves(effects[effects["layer"] == layer])])
    return table(["layer", "distance", *(f"tau, {m}" for m in ORDER), *heads], rows)


def recipes(result: ScanResult) -> str:
    rows = [
        [
            f"**{row.recipe}**" if row.chosen else row.recipe,
            row.kind,
            f"{row.id:.1f}",
            f"{row.ood:.1f}",
            quoted(row.versus_uniform, row.low, row.high),
        ]
        for row in result.recipes.itertuples()
    ]
    return table(["recipe", "kind", "ID %", "mean OOD %", "against the best uniform alpha"], rows)


def label_free(result: ScanResult) -> str:
    means = result.label_free[result.label_free["split"] == "ood mean"]
    best = means.loc[means["truth"].idxmax()]
    rows = [
        [
            row.estimator,
            f"{row.alpha:g}",
            f"{row.estimate:.1f}",
            f"{row.truth:.1f}",
            f"{row.truth - best['truth']:+.1f}",
        ]
        for row in means[means["chosen"]].itertuples()
    ]
    return table(["estimator", "alpha it would ship", "estimate %", "truth %", "against the best alpha"], rows)


def page(result: ScanResult, kind: str) -> str:
    advice, failure = result.recommend(per_layer=True), [result.interpolation_failure(f) for f in ("weak", "strict")]
    assert advice.per_layer is not None
    gap = advice.per_layer[1]
    low, high = gap.interval
    better = "is better" if gap.sign > 0 else "is not shown to be better"
    shapes = "; ".join(
        f"{f.form} form: {f.verdict}, best inner alpha {f.alpha:g} gains {quoted(f.gain, f.low, f.high)}"
        for f in failure
    )
    return "\n\n".join(
        [
            f"# Layers and recipes of the embedded pair, {kind}",
            "Made by `benchmarks/layer_evidence.py`. Effects are changes of the mean accuracy on seven OOD sets of 360 "
            "images when one layer moves alone, in points, paired, with 95 % intervals; beside them the mean of five "
            "to 39 moves in random directions, tensor by tensor as long; **supported**: none of 39 goes "
            "as far. Distance is relative to the layer at zero-shot.",
            layers(result),
            f"Failure of interpolation, {shapes}.",
            f"Recommended uniform alpha: {advice.alpha:g}. The best recipe on the choosing half (bold) {better}: "
            f"{quoted(100 * gap.value, 100 * low, 100 * high)} points on the other half.",
            recipes(result),
            "Without OOD labels:",
            label_free(result),
        ]
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--pair", choices=("success", "failure"), default="success")
    arguments.add_argument("--scan", required=True, help="folder of the scan, resumed if it is there")
    arguments.add_argument("--out", required=True, help="file that the tables are written to")
    chosen = arguments.parse_args()
    result = scanned(chosen.pair, chosen.scan)
    Path(chosen.out).write_text(page(result, chosen.pair) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
