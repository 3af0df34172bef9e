"""Results of scans on disk: what is written, and opened again only where it is whole. Needs no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from sharpscope import journal
from sharpscope.errors import OutputError, UsageError
from sharpscope.home import at_home
from sharpscope.leftovers import TABLES, meta_in, read_meta, remove_page
from sharpscope.recipe import CONVENTION
from sharpscope.result import ScanResult
from sharpscope.storage import writing
from sharpscope.stragglers.effects import keys_of_moves
from sharpscope.stragglers.recipes import keys_of_trials
from sharpscope.table import MODEL, Cell, Row, cell_key

META, CORRECT = "scan.json", "correct.npz"
_ANSWERS = ("correct", "confidence", "loss")  # that an evaluation keeps of each image; others the first of them
_AGAIN = "run the same scan again: it resumes, and writes its result anew"


def save(result: ScanResult, out: Path) -> Path:
    """Write the result to the folder, see :meth:`ScanResult.save`."""
    out = at_home(out)
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; a scan is a folder of files", "save(FOLDER)")
    texts = {f"{name}.csv": getattr(result, name).to_csv(index=False) for name in TABLES}  # takes long: before all else
    header = json.dumps({"format": journal.FORMAT, "plan": result.meta["plan"]})
    texts["cells.jsonl"] = "\n".join([header, *map(journal.encode, result.cells)]) + "\n"
    texts[META] = json.dumps(result.meta, indent=1)
    with writing(out), _beside(out, [CORRECT, *texts]) as places:
        _write(places, texts, result)
        if meta_in(out).get("plan") not in (None, result.meta["plan"]):
            remove_page(out)
        (out / META).unlink(missing_ok=True)  # a kill from here on leaves no scan rather than parts of two
        for name, place in places.items():
            place.replace(out / name)
    return out


@contextmanager
def _beside(out: Path, names: Sequence[str]) -> Iterator[dict[str, Path]]:
    """Give a place beside each file of the folder, in this order; none is left, nor a new folder that stays empty."""
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    places = {name: out / f"{name}.part" for name in names}
    try:
        yield places
    finally:
        for place in places.values():
            place.unlink(missing_ok=True)
        if new:
            with suppress(OSError):  # it holds the scan
                out.rmdir()


def _write(places: Mapping[str, Path], texts: Mapping[str, str], result: ScanResult) -> None:
    """Write all files to their places, down to the disk: what it has no room for is known before one is replaced."""
    answers: dict[str, Any] = {f"{alpha!r}|{split}": found for (alpha, split), found in result.correct.items()}
    for name, place in places.items():
        with place.open("wb") as file:
            if name == CORRECT:
                np.savez_compressed(file, **answers)
            else:
                file.write(texts[name].encode())
            file.flush()
            os.fsync(file.fileno())


def open_result(folder: str | Path) -> ScanResult:
    """Return the result that :meth:`ScanResult.save` or ``scan(out=...)`` left in the folder; equal to the one saved.

    Raises
    ------
    UsageError
        If the folder holds no finished scan, or parts of two, or is a file.
    """
    place = at_home(folder)
    if place.is_file():
        raise UsageError(
            f"{place} is a file; a saved scan is a folder, with scan.json in it", f"name the folder: {place.parent}"
        )
    if not (place / "scan.json").is_file():
        unfinished = (place / "cells.jsonl").is_file()
        found = "a scan that has not finished" if unfinished else "no scan"
        fix = _AGAIN if unfinished else "name the folder given as --out (out=)"
        raise UsageError(f"{place} holds {found} (scan.json is missing)", fix)
    if not (place / "cells.jsonl").is_file():
        raise UsageError(f"{place} holds half a scan (cells.jsonl is missing)", _AGAIN)
    try:
        meta = read_meta(place / "scan.json")
    except ValueError as damage:
        raise UsageError(f"{place / 'scan.json'} is damaged: {damage}", _AGAIN) from damage
    if (convention := meta.get("alpha_convention", CONVENTION)) != CONVENTION:
        raise UsageError(
            f"{place / 'scan.json'} counts alphas otherwise: {convention!r}", f"a scan with {CONVENTION!r}"
        )
    header, cells, _ = journal.read(place / "cells.jsonl")
    if header["plan"] != meta["plan"]:
        raise UsageError(f"{place} holds scan.json of one scan and cells.jsonl of another", _AGAIN)
    _check_cells(place, cells)
    _check_whole(place, meta, cells)
    known = {*meta["layers"], MODEL}
    if strange := next((row.layer for cell in cells for row in cell.rows if row.layer not in known), None):
        raise UsageError(f"{place} holds cells of {strange!r}, a layer that its scan.json does not know", _AGAIN)
    try:
        return ScanResult(cells, meta)
    except ValueError as damage:
        raise UsageError(f"{place} holds cells that its scan.json does not know: {damage}", _AGAIN) from damage


def _check_cells(place: Path, cells: Sequence[Cell]) -> None:
    """Raise if a cell is there twice, is none, or holds rows of another place than its own."""
    known: set[str] = set()
    for cell in cells:
        if not isinstance(cell.key, str) or cell.key.count("|") < 2:
            raise UsageError(f"{place / 'cells.jsonl'} is damaged: {cell.key!r} is no cell", _AGAIN)
        if cell.key in known:
            raise UsageError(f"{place / 'cells.jsonl'} is damaged: {cell.key!r} is there twice", _AGAIN)
        known.add(cell.key)
        alpha, split, _ = cell.key.split("|", 2)
        if odd := next((row for row in cell.rows if not _is_row(row, alpha, split)), None):
            raise UsageError(f"{place / 'cells.jsonl'} is damaged: {cell.key!r} holds {odd}", _AGAIN)


def _is_row(row: Row, alpha: str, split: str) -> bool:
    """Whether it is a row of a cell at this place, each field of its kind."""
    named = isinstance(row.layer, str) and isinstance(row.measure, str) and isinstance(row.converged, bool)
    counted = isinstance(row.draws, int) and isinstance(row.alpha, float) and isinstance(row.value, int | float)
    return named and counted and repr(row.alpha) == alpha and row.split == split


def _check_whole(place: Path, meta: Mapping[str, Any], cells: Sequence[Cell]) -> None:
    """Raise if cells are missing that belong to the path, the interventions or the recipes of the scan."""
    there = {cell.key: cell for cell in cells}
    for what, wanted in _KEYS.items():
        try:
            keys = dict.fromkeys(wanted(meta))
        except (KeyError, TypeError, ValueError, UsageError) as damage:
            raise UsageError(
                f"{place / 'scan.json'} is damaged: its {what} are not whole ({damage!r})", _AGAIN
            ) from damage
        if missing := [key for key in keys if key not in there]:
            raise UsageError(
                f"{place / 'cells.jsonl'} is cut short: {missing[0]!r} is missing ({len(missing)} of the "
                f"{len(keys)} {what})",
                _AGAIN,
            )
        _check_answers(place, [there[key] for key in keys], _ANSWERS if what == "evaluations" else _ANSWERS[:1])


def _check_answers(place: Path, cells: Sequence[Cell], wanted: Sequence[str]) -> None:
    """Raise if a cell lacks what models answered to each image, or has another number of images than those before."""
    counts: dict[str, int] = {}
    for cell in cells:
        split = cell.key.split("|")[1]
        for name in wanted:
            if name not in cell.arrays:
                raise UsageError(
                    f"{place / 'cells.jsonl'} is damaged: {cell.key!r} lacks {name!r} of its images", _AGAIN
                )
            found = len(cell.arrays[name])
            if found != counts.setdefault(split, found):
                raise UsageError(
                    f"{place / 'cells.jsonl'} is damaged: {cell.key!r} has {name!r} of {found} images, others of "
                    f"{split!r} of {counts[split]}",
                    _AGAIN,
                )


def _judged(meta: Mapping[str, Any]) -> list[str]:
    return [name for name, facts in meta["splits"].items() if facts["role"] in ("id", "ood")]


def _evaluations(meta: Mapping[str, Any]) -> Iterable[str]:
    """Return the keys of the cells without which no scan is finished."""
    return (cell_key(alpha, split, "evaluation") for alpha in meta["alphas"] for split in _judged(meta))


def _moves(meta: Mapping[str, Any]) -> Iterable[str]:
    settings = meta.get("interventions")
    return keys_of_moves(settings, [*meta["layers"]], _judged(meta)) if settings else ()


def _trials(meta: Mapping[str, Any]) -> Iterable[str]:
    return keys_of_trials(tried, _judged(meta)) if (tried := meta.get("recipes")) else ()


# What a scan did -> the keys of the cells that hold what the models answered.
_KEYS: Mapping[str, Callable[[Mapping[str, Any]], Iterable[str]]] = {
    "evaluations": _evaluations,
    "interventions": _moves,
    "recipes": _trials,
}
