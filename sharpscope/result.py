"""A finished scan: frames, verdict, plots, save and open. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sharpscope import journal
from sharpscope.errors import UsageError
from sharpscope.stragglers.correlation import co_movement, ood_error, with_distance
from sharpscope.stragglers.recommendation import Recommendation, recommend
from sharpscope.table import EVALUATIONS, Array, Cell, frame

if TYPE_CHECKING:
    from sharpscope.report.plots import Plots


class ScanResult:
    """Everything a scan found.

    Parameters
    ----------
    cells
        Finished cells, in any order; a result keeps them by alpha, split and measure as the plan lists them.
    meta
        Plan and provenance as JSON values: ``alphas``, ``measures``, ``splits`` (role ``"id"`` or ``"ood"``),
        ``layers`` (depth order, with ``size``, ``delta_norm``, ``start_norm``), ``unused``, ``models``,
        ``provenance``, ``cost``, ``warnings``, ``alpha_convention``, ``seed``.
    """

    def __init__(self, cells: Iterable[Cell], meta: Mapping[str, Any]) -> None:
        self.meta: dict[str, Any] = json.loads(json.dumps(meta))
        splits, measures = list(self.meta["splits"]), [*self.meta["measures"], "evaluation"]

        def place(cell: Cell) -> tuple[float, int, int]:
            alpha, split, measure = cell.key.split("|")
            return float(alpha), measures.index(measure), splits.index(split)

        self.cells: tuple[Cell, ...] = tuple(sorted(cells, key=place))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ScanResult):
            return NotImplemented
        return self.cells == other.cells and self.meta == other.meta

    __hash__ = None  # type: ignore[assignment]

    @property
    def id_split(self) -> str:
        """Name of the ID split."""
        return next(str(name) for name, facts in self.meta["splits"].items() if facts["role"] == "id")

    @property
    def curvature_split(self) -> str:
        """Name of the split that sharpness was measured on."""
        return str(self.meta.get("curvature_split", self.id_split))

    @property
    def ood_splits(self) -> list[str]:
        """Names of the OOD splits."""
        return [name for name, facts in self.meta["splits"].items() if facts["role"] == "ood"]

    @cached_property
    def _rows(self) -> pd.DataFrame:
        return frame(row for cell in self.cells for row in cell.rows)

    @property
    def layers(self) -> pd.DataFrame:
        """Curvature rows: ``alpha layer split measure value stderr draws converged``; layer ``"model"`` is global."""
        return self._rows[~self._rows["measure"].isin(EVALUATIONS)].reset_index(drop=True)

    @property
    def evals(self) -> pd.DataFrame:
        """Evaluation rows: ``alpha split measure value stderr n``."""
        chosen = self._rows[self._rows["measure"].isin(EVALUATIONS)]
        return chosen.drop(columns=["layer", "converged"]).rename(columns={"draws": "n"}).reset_index(drop=True)

    @property
    def correct(self) -> dict[tuple[float, str], Array]:
        """Per-example correctness, bool of shape ``(n,)``, by alpha and split."""
        found = {}
        for cell in self.cells:
            if "correct" in cell.arrays:
                alpha, split, _ = cell.key.split("|")
                found[float(alpha), split] = cell.arrays["correct"]
        return found

    @property
    def stragglers(self) -> pd.DataFrame:
        """One row per layer and measure: ``layer measure tau alphas verdict delta_norm relative_delta``.

        ``tau`` correlates the layer's sharpness with the mean OOD error along the path. Empty without OOD sets.
        """
        found = co_movement(self.layers, ood_error(self.evals, self.ood_splits))
        ranked = with_distance(found, self.meta["layers"])
        return ranked.sort_values("tau", ascending=False, kind="stable").reset_index(drop=True)

    def recommend(self, keep_id: float | None = None) -> Recommendation:
        """Return the alpha to ship; ``keep_id`` (zero or negative) is how many points of ID accuracy may go."""
        found = recommend(self.correct, self.id_split, self.ood_splits, keep_id=keep_id, seed=self.meta["seed"])
        return replace(found, scan=self.meta)

    @property
    def plot(self) -> Plots:
        """Figures as methods, each returning matplotlib Axes."""
        from sharpscope.report.plots import Plots

        return Plots(self)

    def save(self, folder: str | Path) -> Path:
        """Write ``scan.json``, ``cells.jsonl``, ``correct.npz`` and the frames as CSV; return the folder."""
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        header = json.dumps({"format": journal.FORMAT, "plan": self.meta["plan"]})
        lines = [header, *map(journal.encode, self.cells)]
        _replace(out / "cells.jsonl", "\n".join(lines) + "\n")
        for name in ("layers", "evals", "stragglers"):
            _replace(out / f"{name}.csv", getattr(self, name).to_csv(index=False))
        arrays: dict[str, Any] = {f"{alpha!r}|{split}": found for (alpha, split), found in self.correct.items()}
        np.savez_compressed(out / "correct.npz", **arrays)
        _replace(out / "scan.json", json.dumps(self.meta, indent=1))
        return out

    def __repr__(self) -> str:
        from sharpscope.summary import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from sharpscope.summary import as_html

        return as_html(self)


def _replace(path: Path, text: str) -> None:
    """Write beside, then rename: a reader never sees half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def open_result(folder: str | Path) -> ScanResult:
    """Return the result that :meth:`ScanResult.save` or ``scan(out=...)`` left in the folder; equal to the one saved.

    Raises
    ------
    UsageError
        If the folder holds no finished scan.
    """
    place = Path(folder)
    if not (place / "scan.json").is_file():
        unfinished = (place / "cells.jsonl").is_file()
        found = "a scan that has not finished" if unfinished else "no scan"
        fix = "run the same scan again: it resumes" if unfinished else "name the folder given as --out (out=)"
        raise UsageError(f"{place} holds {found} (scan.json is missing)", fix)
    meta = json.loads((place / "scan.json").read_text(encoding="utf-8"))
    _, cells, _ = journal.read(place / "cells.jsonl")
    return ScanResult(cells, meta)
