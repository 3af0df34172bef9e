"""Where one layer's move stands among random moves as long: by rank, so that no shape of theirs is assumed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, takewhile
from typing import NamedTuple, Protocol

import numpy as np

from sharpscope.stragglers.paired import Difference, difference, mean_difference
from sharpscope.table import Array, Cell, cell_key

NECESSARY, SUFFICIENT = "necessary", "sufficient"
TAIL = 0.025  # of the random moves on one side, beyond which the real one is supported
FEWEST = 39  # random moves of which even the farthest real one is in that tail
_PREFIX = "moved"


class Cells(Protocol):
    """Cells by key: a dict, or the journal of a scan under way."""

    def __contains__(self, key: str) -> bool: ...

    def __getitem__(self, key: str) -> Cell: ...


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


class Standing(NamedTuple):
    """A layer's move among random ones as long, on a set or on several as their mean.

    Attributes
    ----------
    off_zero
        Whether the interval of its effect leaves out zero.
    as_far
        Random moves whose effect is as far from zero on the same side, or farther.
    draws
        Random moves.
    """

    off_zero: bool
    as_far: int
    draws: int

    @property
    def supported(self) -> bool:
        """Whether the effect is off zero and at most 2.5 % of moves, itself among them, go as far on its side."""
        return self.hopeful(self.draws)

    def hopeful(self, most: int) -> bool:
        """Return whether the move is supported after ``most`` draws if none of those to come goes as far."""
        return self.off_zero and (1 + self.as_far) / (1 + max(self.draws, most)) <= TAIL


class Moves:
    """The correctness of every move from one base, by set.

    Parameters
    ----------
    cells
        Cells by key.
    base, limit
        Where the moves start, and the most images per set.
    """

    def __init__(self, cells: Cells, base: Base, limit: int | None) -> None:
        self._cells, self.base, self._limit = cells, base, limit

    def standing(self, splits: Sequence[str], layer: str) -> Standing:
        """Return where the layer's move stands among its random ones."""
        together = zip(self._gaps(splits, "layer", layer), self.controls(splits, layer), strict=True)
        # One sum for all moves: those that tie are equal to the last bit.
        effects = np.mean([np.vstack([real, gaps]).mean(axis=1) for real, gaps in together], axis=0)
        side = np.sign(effects[0])
        as_far = int(np.sum(side * effects[1:] >= side * effects[0]))
        return Standing(self.change(splits, "layer", layer).sign != 0, as_far, len(effects) - 1)

    def change(self, splits: Sequence[str], what: str, layer: str) -> Difference:
        """Return the paired change of accuracy on a set, or on several, sets weighing the same; a fraction."""
        pairs = [(self._correct(split, what, layer), self._correct(split, "base", "")) for split in splits]
        return mean_difference([difference(*pair) for pair in pairs])

    def images(self, splits: Sequence[str]) -> int:
        """Return how many images the sets hold together."""
        return sum(len(self._correct(split, "base", "")) for split in splits)

    def known(self, split: str, what: str, layer: str) -> bool:
        """Return whether the move was made on the set."""
        return moved_key(self.base, split, self._limit, what, layer) in self._cells

    def controls(self, splits: Sequence[str], layer: str) -> list[Array]:
        """Return the gaps of the random moves that all of the sets have, ``(draws, n)`` for each set."""
        names = (f"control {draw}" for draw in count())
        shared = takewhile(lambda name: all(self.known(split, name, layer) for split in splits), names)
        by_draw = [self._gaps(splits, name, layer) for name in shared]
        return [np.stack(gaps) for gaps in zip(*by_draw, strict=True)]

    def _gaps(self, splits: Sequence[str], what: str, layer: str) -> list[Array]:
        """Return correctness after the move minus before it, ``(n,)`` in -1, 0, 1 for each set."""
        pairs = [(self._correct(split, what, layer), self._correct(split, "base", "")) for split in splits]
        return [after.astype(np.float64) - before for after, before in pairs]

    def _correct(self, split: str, what: str, layer: str) -> Array:
        key = moved_key(self.base, split, self._limit, what, layer)
        found: Array = self._cells[key].arrays["correct"].astype(bool)
        return found
