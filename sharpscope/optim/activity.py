"""Reading an audit log: what the projection held back, layer by layer. Needs no torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sharpscope.errors import UsageError
from sharpscope.home import at_home

FORMAT = 1
COLUMNS = (
    "step",
    "layer",
    "tensors",
    "decisions",
    "gated",
    "active",
    "mean_ratio",
    "distance",
    "relative_distance",
    "lr",
    "lambda",
)
SHARPNESS = ("step", "layer", "measure", "value", "stderr", "draws", "converged")


@dataclass(frozen=True)
class Audit:
    """An audit log.

    Attributes
    ----------
    header
        Hashes of anchor and partition, versions, optimiser and its options.
    activity
        One row per layer every N steps; ``decisions`` (tensor-steps since the row before), of which ``gated`` had
        c < 0 and ``active`` r > 0 too; ``mean_ratio`` over the active ones (0 if none); ``distance`` the norm of
        the deviation after the step, ``relative_distance`` over the norm of the anchor (NaN for anchor zero).
    sharpness
        What was measured during training, one row per layer and measure, NaN where the loss was no finite number; empty
        if nothing was.
    """

    header: dict[str, Any]
    activity: pd.DataFrame
    sharpness: pd.DataFrame


def read_audit(path: str | Path) -> Audit:
    """Return the log of a run, finished or not; a torn last line is left out.

    Raises
    ------
    UsageError
        If the file is missing or no audit log, or a line before the last is damaged.
    """
    file = at_home(path)
    if not file.exists():
        raise UsageError(
            f"{file} does not exist",
            "--audit FILE: the log that training wrote, the path given to the callback as audit=...",
        )
    header, lines, _ = read_lines(file)
    rows: dict[str, list[dict[str, Any]]] = {"activity": [], "sharpness": []}
    for line in lines:
        rows[line.pop("kind")].append(line)
    activity = pd.DataFrame(rows["activity"], columns=list(COLUMNS))
    sharpness = pd.DataFrame(rows["sharpness"], columns=list(SHARPNESS))
    unknown = {"distance": float, "relative_distance": float}  # null in the log, where there is no number
    return Audit(header, activity.astype(unknown), sharpness.astype({"value": float, "stderr": float}))


def read_lines(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """Return header, lines and the number of good bytes.

    Raises
    ------
    UsageError
        If the file is no audit log of this format.
    """
    try:
        parts = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error})", "the file that training wrote") from error
    whole = parts[:-1] if parts and not parts[-1].endswith(b"\n") else parts
    if not whole:
        raise UsageError(f"{path} is no audit log: it has not one whole line", "another path, or move it away")
    try:
        header, *lines = [json.loads(part) for part in whole]
        good = header["format"] == FORMAT and all(_is_line(line) for line in lines)
    except (ValueError, KeyError, TypeError) as damage:
        raise UsageError(f"{path} is not a readable audit log ({damage})", "another path, or move it away") from damage
    if not good:
        raise UsageError(f"{path} is no audit log of format {FORMAT}", "another path, or move it away")
    return header, lines, sum(map(len, whole))


def _is_line(line: dict[str, Any]) -> bool:
    return line["kind"] in ("activity", "sharpness") and {"step", "layer"} <= line.keys()


def finite(value: float | None) -> float | None:
    """Return the value, None for what JSON has no number for: a diverged run is logged to its end."""
    return value if value is not None and math.isfinite(value) else None


def sentence(activity: pd.DataFrame) -> str:
    """Return in words whether the projection did anything, and where most.

    Parameters
    ----------
    activity
        ``read_audit(path).activity``.
    """
    if activity.empty:
        return "Nothing was logged: the run ended before the first entry."
    sums = activity.groupby("layer", sort=False)[["decisions", "gated", "active"]].sum()
    decisions, gated, active = (int(number) for number in sums.sum())
    if not active:
        reason = (
            f"of {decisions:,} tensor-steps {gated:,} had a gradient towards the anchor, none of those moved away"
            if decisions
            else "no decision was made: lambda was 0, or nothing was recorded"
        )
        return f"The projection was inactive: {reason}. This run equals the plain optimiser (AdamW for AdamSPD)."
    share = sums["active"] / sums["decisions"].where(sums["decisions"] > 0)
    return (
        f"The projection held back {active:,} of {decisions:,} tensor-steps ({100 * active / decisions:.1f} %; "
        f"c < 0 in {100 * gated / decisions:.1f} %), most in {share.idxmax()} ({100 * share.max():.1f} %)."
    )
