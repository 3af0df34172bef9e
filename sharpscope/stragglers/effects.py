"""What moving one layer does to accuracy: paired effects beside random moves of equal length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sharpscope.stragglers.interval import mean_interval
from sharpscope.stragglers.paired import difference, mean_difference
from sharpscope.table import Array, Cell, cell_key

MEAN_OOD = "ood mean"
NECESSARY, SUFFICIENT = "necessary", "sufficient"
COLUMNS = (
    "layer", "question", "base", "alpha", "split",
    "effect", "low", "high", "control", "control_low", "control_high", "draws", "n", "supported",
)  # fmt: skip
CUMULATIVE = ("layer", "layers", "end", "question", "base", "alpha", "split", "effect", "low", "high", "n")
_PREFIX = "moved"


class Base(NamedTuple):
    """Where moves start, and what they ask: ``necessary`` moves a layer to zero-shot, ``sufficient`` to fine-tuned."""

    question: str
    alpha: float

    @property
    def target(self) -> float:
        """The alpha that the moved layer gets."""
        return 0.0 if self.question == NECESSARY else 1.0

    @property
    def name(self) -> str:
        """The base in words."""
        return {0.0: "zero-shot", 1.0: "fine-tuned"}.get(self.alpha, f"alpha {self.alpha:g}")


def moved_key(base: Base, split: str, limit: int | None, what: str, layer: str = "") -> str:
    """Return the key of the cell that holds what a move gave, image by image.

    Parameters
    ----------
    base, split
        Where the move starts and the data it is judged on.
    limit
        Most images per set: other images, other cell.
    what
        ``"base"`` (nothing moved), ``"layer"``, ``"control 0"``, ``"first"`` or ``"last"`` (all up to, or from, the
        layer on).
    layer
        Layer id.
    """
    return cell_key(base.alpha, split, f"{_PREFIX}/{limit or 'all'}/{base.question}/{what}/{layer}")


def is_move(cell: Cell) -> bool:
    """Return whether the cell holds the correctness of a move, which is no row of the scan."""
    return f"|{_PREFIX}/" in cell.key


class _Moves:
    """The correctness of every move from one base, by set."""

    def __init__(self, cells: Mapping[str, Cell], base: Base, limit: int | None, draws: int) -> None:
        self._cells, self.base, self._limit, self.draws = cells, base, limit, draws

    def gaps(self, split: str, what: str, layer: str) -> Array:
        """Return correctness after the move minus before it, ``(n,)`` in -1, 0, 1."""
        gaps: Array = self._correct(split, what, layer).astype(np.float64) - self._correct(split, "base", "")
        return gaps

    def change(self, splits: Sequence[str], what: str, layer: str) -> dict[str, float]:
        """Return ``effect``, ``low``, ``high``: the paired change of accuracy on a set, or on several, in points."""
        pairs = [(self._correct(split, what, layer), self._correct(split, "base", "")) for split in splits]
        found = mean_difference([difference(*pair) for pair in pairs])
        return {"effect": 100 * found.value, "low": 100 * found.low, "high": 100 * found.high}

    def images(self, splits: Sequence[str]) -> int:
        """Return how many images the sets hold together."""
        return sum(len(self._correct(split, "base", "")) for split in splits)

    def _correct(self, split: str, what: str, layer: str) -> Array:
        key = moved_key(self.base, split, self._limit, what, layer)
        found: Array = self._cells[key].arrays["correct"].astype(bool)
        return found

    def known(self, split: str, what: str, layer: str) -> bool:
        return moved_key(self.base, split, self._limit, what, layer) in self._cells

    def effect(self, splits: Sequence[str], layer: str) -> dict[str, object]:
        """Return the row of a layer on a set, or on several as their mean."""
        moved, change = [self.gaps(split, "layer", layer) for split in splits], self.change(splits, "layer", layer)
        control = [
            np.stack([self.gaps(split, f"control {draw}", layer) for draw in range(self.draws)]) for split in splits
        ]
        by_draw = 100 * np.mean([gaps.mean(axis=1) for gaps in control], axis=0)
        beside = mean_interval([gaps.mean(axis=0) for gaps in control], by_draw)
        beyond = mean_interval([m - c.mean(axis=0) for m, c in zip(moved, control, strict=True)], by_draw, 1)
        sign = 1 if change["low"] > 0 else -1 if change["high"] < 0 else 0
        return {
            **change,
            "control": beside.value, "control_low": beside.low, "control_high": beside.high,
            "draws": self.draws, "n": self.images(splits), "supported": sign != 0 and sign == beyond.sign,
        }  # fmt: skip


def _places(splits: Sequence[str], ood: Sequence[str]) -> list[tuple[str, list[str]]]:
    return [*((split, [split]) for split in splits), *([(MEAN_OOD, list(ood))] if ood else [])]


def _found(cells: Iterable[Cell], settings: Mapping[str, Any]) -> list[_Moves]:
    known = {cell.key: cell for cell in cells if is_move(cell)}
    limit, draws, bases = settings["limit"], settings["draws"], settings["bases"]
    return [_Moves(known, Base(str(question), float(alpha)), limit, draws) for question, alpha in bases]


def effects(
    cells: Iterable[Cell],
    settings: Mapping[str, Any] | None,
    layers: Sequence[str],
    id_split: str,
    ood: Sequence[str],
) -> pd.DataFrame:
    """Return one row per base, layer and set: what moving only this layer does to accuracy, in points.

    ``effect`` is accuracy after the move minus accuracy of the base, paired over images, ``low`` and ``high`` its
    95 % interval over images. ``control`` is the mean effect of ``draws`` moves of the same layer in random directions,
    tensor by tensor as long as the real one; its interval holds the spread over directions too. ``supported``: the
    effect's interval is off zero, and so is, on the same side, that of effect minus control, over images and
    directions: the real move is taken as one direction more, so that a delta of pure noise does not beat its
    control. Set ``"ood mean"`` weighs the OOD sets the same. The intervals are per row, not family-wise.

    Parameters
    ----------
    cells
        Of a scan, those of other measures are passed over.
    settings
        ``limit``, ``draws`` and ``bases`` (pairs of question and alpha) of the interventions; None: an empty frame.
    layers
        Layer ids in depth order.
    id_split, ood
        Names of the sets.
    """
    rows: list[dict[str, object]] = []
    for moves in _found(cells, settings) if settings else ():
        base = moves.base
        facts = {"question": base.question, "base": base.name, "alpha": base.alpha}
        for layer in layers:
            for name, splits in _places([id_split, *ood], ood):
                rows.append({"layer": layer, **facts, "split": name, **moves.effect(splits, layer)})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def cumulative_effects(
    cells: Iterable[Cell],
    settings: Mapping[str, Any] | None,
    layers: Sequence[str],
    id_split: str,
    ood: Sequence[str],
) -> pd.DataFrame:
    """Return what moving the first, or the last, layers together does to accuracy, in points; see :func:`effects`.

    One row per base, number of ``layers`` moved and set; ``end`` says which (``"first"`` up to and with ``layer``,
    ``"last"`` from it on). Empty unless cumulative moves were made.
    """
    rows: list[dict[str, object]] = []
    for moves in _found(cells, settings) if settings else ():
        base = moves.base
        for end, (depth, layer) in ((end, place) for end in ("first", "last") for place in enumerate(layers)):
            if not moves.known(id_split, end, layer):
                continue
            count = depth + 1 if end == "first" else len(layers) - depth
            facts = {"layer": layer, "layers": count, "end": end, "question": base.question, "base": base.name}
            for name, splits in _places([id_split, *ood], ood):
                measured = {**moves.change(splits, end, layer), "n": moves.images(splits)}
                rows.append({**facts, "alpha": base.alpha, "split": name, **measured})
    return pd.DataFrame(rows, columns=list(CUMULATIVE))
