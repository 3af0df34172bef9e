"""What the runs of a benchmark come to: costs in gradients, errors in the units of their targets, a table."""

from __future__ import annotations

import math
import statistics
from typing import Any

STAGES = ("setup", "trace", "lambda_max")
Run = dict[str, Any]


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _of(run: Run, stage: str) -> list[dict[str, Any]]:
    return [answer for answer in run["answers"] if answer["stage"] == stage]


def _products(run: Run, stage: str) -> float:
    return sum(answer["products"] for answer in _of(run, stage))


def _gradients(run: Run, stages: tuple[str, ...]) -> float:
    """Return the cost of the stages in gradients of the same process."""
    seconds = math.fsum(answer["seconds"] for stage in stages for answer in _of(run, stage))
    return seconds / statistics.median(run["gradients"])


def _trace_errors(runs: list[Run], truth: dict[str, Any]) -> dict[str, Any]:
    """Return errors of traces over all rounds, in targets and in standard errors, and layers that missed the target.

    The error in targets holds that of the reference, half a target or less.
    """
    floor = 0.005 * math.fsum(abs(entry["trace"]) for entry in truth.values())
    shares, scores, unmet = [], [], set()
    for answer in (answer for run in runs for answer in _of(run, "trace")):
        entry = truth[answer["layer"]]
        off = abs(answer["value"] - entry["trace"])
        shares.append(off / max(0.05 * abs(entry["trace"]), floor))
        scores.append(off / math.hypot(answer["error"], entry["trace_error"]))
        unmet |= set() if answer["met"] else {answer["layer"]}
    return {
        "root_mean_square_in_targets": math.sqrt(statistics.fmean(share**2 for share in shares)),
        "worst_in_targets": max(shares),
        "worst_in_standard_errors": max(scores),
        "unmet": sorted(unmet),
    }


def _eigenvalue_errors(run: Run, truth: dict[str, Any]) -> dict[str, Any]:
    """Return the worst relative error of a top eigenvalue and the layers beyond one per cent."""
    errors = {a["layer"]: a["value"] / truth[a["layer"]]["lambda_max"] - 1 for a in _of(run, "lambda_max")}
    return {
        "worst": max(errors.values(), key=abs),
        "beyond_target": [layer for layer, error in errors.items() if abs(error) > 0.01],
        "errors": errors,
    }


def _fewest_steps(run: Run, truth: dict[str, Any]) -> int | None:
    """Return the steps that would have met the target had the truth been known, as the rivals' settings do."""
    total = 0
    for answer in _of(run, "lambda_max"):
        right = truth[answer["layer"]]["lambda_max"]
        met = [abs(value - right) <= 0.01 * abs(right) for value in answer["history"]]
        if True not in met:
            return None
        total += met.index(True) + 1
    return total


def summary(runs: list[Run], truth: dict[str, Any]) -> dict[str, Any]:
    """Return costs, products and errors of traces over all rounds of a tool; eigenvalues do not differ by round."""
    first = runs[0]
    costs = {stage: _spread([_gradients(run, (stage,)) for run in runs]) for stage in STAGES}
    costs["all"] = _spread([_gradients(run, STAGES) for run in runs])
    costs["model"] = _spread([_gradients(run, ("model",)) for run in runs])
    return {
        "gradients": costs,
        "gradient_seconds": _spread([second for run in runs for second in run["gradients"]]),
        "products": {stage: _spread([_products(run, stage) for run in runs]) for stage in (*STAGES, "model")},
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "gradient_peak_bytes": max(run["gradient_peak_bytes"] for run in runs),
        "trace": _trace_errors(runs, truth),
        "lambda_max": _eigenvalue_errors(first, truth),
        "lambda_max_fewest_steps": _fewest_steps(first, truth),
    }


def table(tools: dict[str, dict[str, Any]]) -> str:
    """Return the summaries side by side as a markdown table; costs are medians in gradients, range in brackets."""
    ours = tools["sharpscope"]["gradients"]["all"]["median"] if "sharpscope" in tools else math.nan
    lines = [
        "| tool | setup | trace (products) | top eigenvalue (products) | all, gradients | times sharpscope "
        "| peak memory, gradients | trace error, targets: rms, worst | worst eigenvalue |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in tools.items():
        cost, products = found["gradients"], found["products"]
        trace, top = found["trace"], found["lambda_max"]
        unmet = f", {len(trace['unmet'])} unmet" if trace["unmet"] else ""
        beyond = f", {len(top['beyond_target'])} beyond 1 %" if top["beyond_target"] else ""
        cells = (
            name,
            f"{cost['setup']['median']:.1f}",
            f"{cost['trace']['median']:.0f} ({products['trace']['median']:.0f})",
            f"{cost['lambda_max']['median']:.0f} ({products['lambda_max']['median']:.0f})",
            f"{cost['all']['median']:.0f} [{cost['all']['min']:.0f}, {cost['all']['max']:.0f}]",
            f"{cost['all']['median'] / ours:.1f}",
            f"{found['peak_bytes'] / found['gradient_peak_bytes']:.1f}",
            f"{trace['root_mean_square_in_targets']:.1f}, {trace['worst_in_targets']:.1f}{unmet}",
            f"{100 * top['worst']:+.2f} %{beyond}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
