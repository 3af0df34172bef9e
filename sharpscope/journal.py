"""Finished cells on disk: one line each, appended and flushed as soon as what belongs to them is on disk."""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sharpscope.errors import UsageError
from sharpscope.storage import writing
from sharpscope.table import Array, Cell, Row

FORMAT = 1


def _encode_array(array: Array) -> dict[str, Any]:
    if array.dtype == bool:
        return {"bits": base64.b64encode(np.packbits(array).tobytes()).decode(), "n": len(array)}
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return {"dtype": little.dtype.str, "data": base64.b64encode(little.tobytes()).decode()}


def _decode_array(stored: Mapping[str, Any]) -> Array:
    if "bits" in stored:
        packed = np.frombuffer(base64.b64decode(stored["bits"]), dtype=np.uint8)
        return np.unpackbits(packed, count=stored["n"]).astype(bool)
    return np.frombuffer(base64.b64decode(stored["data"]), dtype=np.dtype(stored["dtype"])).copy()


def encode(cell: Cell) -> str:
    """Return the cell as one line of JSON that decodes to an equal cell; an unknown standard error is null."""
    rows = [asdict(row) for row in cell.rows]
    for row in rows:
        row["stderr"] = row["stderr"] if math.isfinite(row["stderr"]) else None
    arrays = {name: _encode_array(array) for name, array in cell.arrays.items()}
    return json.dumps({"cell": cell.key, "rows": rows, "arrays": arrays}, allow_nan=False)


def decode(line: str) -> Cell:
    """Return the cell that :func:`encode` wrote; ``ValueError`` or ``KeyError`` if the line is not whole."""
    stored = json.loads(line)
    rows = [Row(**{**row, "stderr": math.inf if row["stderr"] is None else row["stderr"]}) for row in stored["rows"]]
    arrays = {name: _decode_array(array) for name, array in stored["arrays"].items()}
    return Cell(stored["cell"], tuple(rows), arrays)


def replace_text(path: Path, text: str) -> None:
    """Write beside, then rename: a reader never sees half a file, and none is left where it fails."""
    beside = path.with_name(path.name + ".part")
    try:
        with beside.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # a rename may reach the disk before what it names
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Any], list[Cell], int]:
    """Return header, finished cells and the number of good bytes; a torn last line is left out of all three.

    Raises
    ------
    UsageError
        If the file has no readable header or a line before the last is damaged.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    whole = lines[:-1] if lines and not lines[-1].endswith(b"\n") else lines
    try:
        header = json.loads(whole[0])
        cells = [decode(line.decode()) for line in whole[1:]]
        if not isinstance(header, dict):
            raise ValueError("its first line is no header")
    except (IndexError, ValueError, KeyError, TypeError, AttributeError) as damage:
        raise UsageError(
            f"{path} is not a readable list of cells ({damage})", "start anew with --fresh (fresh=True)"
        ) from damage
    if header.get("format") != FORMAT:
        raise UsageError(f"{path} has format {header.get('format')!r}, this version reads {FORMAT}", "use --fresh")
    if not isinstance(header.get("plan"), dict):
        raise UsageError(f"{path} does not say which plan its cells are of", "start anew with --fresh (fresh=True)")
    return header, cells, sum(map(len, whole))


def resumed(path: Path, plan: Mapping[str, Any]) -> tuple[list[Cell], int]:
    """Return the finished cells of a plan and the number of good bytes; none if no scan was begun there.

    Raises
    ------
    UsageError
        If the file is no journal, or belongs to another plan; the message names what differs.
    """
    if not path.exists() or b"\n" not in path.read_bytes():
        return [], 0
    header, cells, size = read(path)
    theirs, ours = _leaves(header["plan"]), _leaves(json.loads(json.dumps(plan)))
    differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if differing:
        name = differing[0]
        raise UsageError(
            f"{path} belongs to another scan: {', '.join(differing)} differ "
            f"({name}: {_short(theirs.get(name))} there, {_short(ours.get(name))} now)",
            "choose another --out, or --fresh (fresh=True) to discard it",
        )
    return cells, size


class Journal:
    """Cells of one plan, kept in a file if a path is given.

    Parameters
    ----------
    path
        ``cells.jsonl`` of an output folder, or None to keep cells in memory only.
    plan
        What determines the numbers (weights, data, layers, settings) as JSON values; a file of another plan is refused.
    fresh
        Discard what the file holds.

    Raises
    ------
    UsageError
        If the file belongs to another plan; the message names what differs.
    """

    def __init__(self, path: Path | None, plan: Mapping[str, Any], *, fresh: bool = False) -> None:
        self.path = path
        self.plan = json.loads(json.dumps(plan))
        self._waiting: list[Cell] = []
        self._settled: Callable[[], bool] = lambda: True
        cells, size = ([], 0) if path is None or fresh else resumed(path, self.plan)
        self._cells = {cell.key: cell for cell in cells}
        if path is not None and size:
            os.truncate(path, size)
        elif path is not None:
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            self._write(path, json.dumps({"format": FORMAT, "plan": self.plan}), "wb")

    @staticmethod
    def _write(path: Path, line: str, mode: str) -> None:
        with writing(path), path.open(mode) as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def __contains__(self, key: str) -> bool:
        return key in self._cells

    def __getitem__(self, key: str) -> Cell:
        return self._cells[key]

    def __iter__(self) -> Iterator[Cell]:
        return iter(self._cells.values())

    def __len__(self) -> int:
        return len(self._cells)

    def follow(self, settled: Callable[[], bool]) -> None:
        """Let cells wait until this says that what they came with is on disk; the last ones for :meth:`write`."""
        self._settled = settled

    def append(self, cell: Cell) -> None:
        """Keep the cell; it is on disk before this returns, unless it has to wait."""
        self._cells[cell.key] = cell
        self._waiting.append(cell)
        if self._settled():
            self.write()

    def write(self) -> None:
        """Write the cells that wait."""
        while self._waiting:
            if self.path is not None:
                self._write(self.path, encode(self._waiting[0]), "ab")
            del self._waiting[0]


def _leaves(plan: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return the settings of a plan by their names, those of a measure as ``measures.trace.relative``."""
    found: dict[str, Any] = {}
    for name, value in plan.items():
        found |= _leaves(value, f"{above}{name}.") if isinstance(value, dict) and value else {above + name: value}
    return found


def _short(value: object) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = [item[:12] for item in value]  # hashes: that of the second model must be seen too
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
