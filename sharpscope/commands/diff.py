"""Two saved scans in, a table of what differs out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pandas as pd

from sharpscope.commands.documents import write_documents
from sharpscope.comparison import Comparison
from sharpscope.comparison import diff as comparison
from sharpscope.leftovers import own_files
from sharpscope.saved import open_result

SHOWN = 12  # rows of a table; the JSON has all
_WIDE = 40  # characters of a value


def compared(first: str, second: str, file: str | None = None) -> str:
    """Return the comparison of two folders as text; write all of it as JSON to a place if one is named."""
    found = comparison(open_result(first), open_result(second))
    if file is not None:
        write_documents([(file, found.to_json() + "\n")], read=[*own_files(first), *own_files(second)])
    return "\n".join([f"first:  {first}", f"second: {second}", *_lines(found)])


def _lines(found: Comparison) -> Iterator[str]:
    yield "plan: the same" if found.same_plan else "plan: not the same"
    for row in found.settings.itertuples():
        yield f"  {row.setting}: {_short(row.first)} -> {_short(row.second)}"
    yield "accuracy, second minus first in points (95 % intervals)"
    for split, rows in found.accuracy.groupby("split", sort=False):
        yield f"  {split}: {_accuracy(rows)}"
    if not found.same_images:
        yield "sharpness was measured on other images: its changes hold theirs, beyond the errors given"
    for measure, rows in found.layers.groupby("measure", sort=False):
        yield from _measure(str(measure), rows)
    if found.verdicts.empty:
        yield "verdicts: the same"
    else:
        yield f"verdicts: {len(found.verdicts)} changed"
    for row in found.verdicts.head(SHOWN).itertuples():
        yield f"  {row.layer}, {row.measure}: {row.first or 'none'} -> {row.second or 'none'}"
    if len(found.verdicts) > SHOWN:
        yield f"  and {len(found.verdicts) - SHOWN} more"
    before, after = ("none" if alpha is None else f"{alpha:g}" for alpha in found.recommended)
    yield f"recommended alpha: {before}" + ("" if before == after else f" -> {after}")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _WIDE else text[: _WIDE - 3] + "..."


def _accuracy(rows: pd.DataFrame) -> str:
    most = rows.loc[rows["change"].abs().idxmax()]
    how = "paired" if rows["paired"].all() else "other images"
    return (
        f"changed at {int(rows['changed'].sum())} of {len(rows)} alphas; largest {most['change']:+.1f} "
        f"({most['low']:+.1f} to {most['high']:+.1f}) at alpha {most['alpha']:g}, {how}"
    )


def _measure(measure: str, rows: pd.DataFrame) -> Iterator[str]:
    changed = rows[rows["changed"]]
    chance = "" if "lambda" in measure else f", {0.05 * len(rows):.0f} expected by chance if nothing changed"
    yield f"{measure}: {len(changed)} of {len(rows)} changed beyond the joint error{chance}"
    clearest = changed.assign(clear=changed["change"].abs() / (changed["high"] - changed["low"]))
    for row in clearest.nlargest(SHOWN, "clear").itertuples():
        yield (
            f"  {row.layer} at alpha {row.alpha:g}: {row.first:.4g} -> {row.second:.4g}, "
            f"{row.change:+.3g} ({row.low:+.3g} to {row.high:+.3g})"
        )
    if len(changed) > SHOWN:
        yield f"  and {len(changed) - SHOWN} more"
