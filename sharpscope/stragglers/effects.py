"""What moving one layer does to accuracy: paired effects beside random moves of equal length."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from sharpscope.stragglers.interval import mean_interval
from sharpscope.stragglers.paired import Difference
from sharpscope.stragglers.standing import Base, Moves, is_move, moved_key
from sharpscope.table import Cell

MEAN_OOD = "ood mean"
COLUMNS = (
    "layer", "question", "base", "alpha", "split",
    "effect", "low", "high", "control", "control_low", "control_high", "draws", "as_far", "n", "supported",
)  # fmt: skip
CUMULATIVE = ("layer", "layers", "end", "question", "base", "alpha", "split", "effect", "low", "high", "n")


def _in_points(change: Difference) -> dict[str, float]:
    return {"effect": 100 * change.value, "low": 100 * change.low, "high": 100 * change.high}


def _effect(moves: Moves, splits: Sequence[str], layer: str) -> dict[str, object]:
    """Return the row of a layer on a set, or on several as their mean."""
    controls, standing = moves.controls(splits, layer), moves.standing(splits, layer)
    by_draw = 100 * np.mean([gaps.mean(axis=1) for gaps in controls], axis=0)
    beside = mean_interval([gaps.mean(axis=0) for gaps in controls], by_draw)
    return {
        **_in_points(moves.change(splits, "layer", layer)),
        "control": beside.value, "control_low": beside.low, "control_high": beside.high,
        "draws": standing.draws, "as_far": standing.as_far, "n": moves.images(splits),
        "supported": standing.supported,
    }  # fmt: skip


def _places(splits: Sequence[str], ood: Sequence[str]) -> list[tuple[str, list[str]]]:
    return [*((split, [split]) for split in splits), *([(MEAN_OOD, list(ood))] if ood else [])]


def _bases(settings: Mapping[str, Any]) -> list[Base]:
    return [Base(str(question), float(alpha)) for question, alpha in settings["bases"]]


def _found(cells: Iterable[Cell], settings: Mapping[str, Any]) -> list[Moves]:
    known = {cell.key: cell for cell in cells if is_move(cell)}
    return [Moves(known, base, settings["limit"]) for base in _bases(settings)]


def keys_of_moves(settings: Mapping[str, Any], layers: Sequence[str], splits: Sequence[str]) -> Iterator[str]:
    """Yield the keys of the cells without which no interventions are finished: of the moves made in any case."""
    moves = [("base", "")]
    for layer in layers:
        moves += [("layer", layer), *((f"control {draw}", layer) for draw in range(settings["draws"]))]
    if settings.get("cumulative"):
        moves += [(end, layer) for end in ("first", "last") for layer in layers[1:-1]]
    for base, split, move in product(_bases(settings), splits, moves):
        yield moved_key(base, split, settings["limit"], *move)


def effects(
    cells: Iterable[Cell],
    settings: Mapping[str, Any] | None,
    layers: Sequence[str],
    id_split: str,
    ood: Sequence[str],
    unmoved: Collection[str] = (),
) -> pd.DataFrame:
    """Return one row per base, layer and set: what moving only this layer does to accuracy, in points.

    ``effect`` is accuracy after the move minus accuracy of the base, paired over images, ``low`` and ``high`` its
    95 % interval over images. ``control`` is the mean effect of ``draws`` moves of the same layer in random directions,
    tensor by tensor as long as the real one; its interval holds the spread over directions too. ``as_far`` of them go
    as far as the real move on its side of zero. ``supported``: the effect's interval is off zero, and among the random
    moves the real one is in the outer 2.5 % on its side: ``(1 + as_far) / (1 + draws)`` is at most .025. A delta of
    pure noise is one direction more, and so is supported in 5 % of cases at most, whatever the distribution of the
    random moves; fewer than 39 of them support nothing, nor does a layer of which only running statistics move, as
    there is nothing random as long beside it. Set ``"ood mean"`` weighs the OOD sets the same. All is per
    row, not family-wise.

    Parameters
    ----------
    cells
        Of a scan, those of other measures are passed over.
    settings
        ``limit`` and ``bases`` (pairs of question and alpha) of the interventions; None: an empty frame.
    layers
        Layer ids in depth order.
    id_split, ood
        Names of the sets.
    unmoved
        Layers whose parameters are the same at both ends.
    """
    rows: list[dict[str, object]] = []
    for moves in _found(cells, settings) if settings else ():
        base = moves.base
        facts = {"question": base.question, "base": base.name, "alpha": base.alpha}
        for layer in layers:
            for name, splits in _places([id_split, *ood], ood):
                rows.append({"layer": layer, **facts, "split": name, **_effect(moves, splits, layer)})
    found = pd.DataFrame(rows, columns=list(COLUMNS))
    return found.assign(supported=found["supported"].astype(bool) & ~found["layer"].isin(list(unmoved)))


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
            moved = depth + 1 if end == "first" else len(layers) - depth
            facts = {"layer": layer, "layers": moved, "end": end, "question": base.question, "base": base.name}
            for name, splits in _places([id_split, *ood], ood):
                measured = {**_in_points(moves.change(splits, end, layer)), "n": moves.images(splits)}
                rows.append({**facts, "alpha": base.alpha, "split": name, **measured})
    return pd.DataFrame(rows, columns=list(CUMULATIVE))
