"""Ranks that share the alphas: each finds those of its chains, then what others would find later than it does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sharpscope.board import Board
from sharpscope.errors import MeasurementError
from sharpscope.journal import decode, encode
from sharpscope.memory import Memory
from sharpscope.ranks import Ranks
from sharpscope.table import Cell

SETUP = ""  # in place of a kind: what comes before the first measure of an alpha
_PAUSE = 0.1  # seconds between looks at the board by a rank that has nothing to do


def kind_of(key: str) -> str:
    """Return what a cell is at any alpha: its split and measure.

    >>> kind_of("0.5|id|trace")
    'id|trace'
    """
    return key.partition("|")[2]


def _always(_kind: str) -> bool:
    return True


@dataclass(frozen=True)
class Task:
    """Cells of one alpha to be found.

    Attributes
    ----------
    index
        Of the alpha.
    kinds
        Of the cells, in their order.
    at_home
        Whether the start vectors of the alpha's chain are on this rank.
    claims
        Asked before a cell is begun; where it says no, somebody else finds that cell.
    """

    index: int
    kinds: tuple[str, ...]
    at_home: bool = True
    claims: Callable[[str], bool] = _always


class Apart:
    """The alphas of a scan as several ranks find them, without waiting for each other.

    Every chain has a home, where its start vectors are. A rank through with its own chains takes cells of others that
    go on from nothing, the last ones first, where it has them sooner than their home has all that is left to it.
    No number depends on who finds it.

    Parameters
    ----------
    ranks
        That share the alphas; two or more.
    measured
        Yields the cells of a task, and notes what each kind took.
    memory
        What goes on from an alpha to the next, on this rank.
    wanted
        Kinds of cells by alpha, in the order in which they are to be told.
    homes
        Rank of each alpha.
    """

    def __init__(
        self,
        ranks: Ranks,
        measured: Callable[[Task, dict[str, float]], Iterator[Cell]],
        memory: Memory,
        wanted: Mapping[int, Sequence[str]],
        homes: Mapping[int, int],
    ) -> None:
        self._ranks = ranks
        self._measured = measured
        self._memory = memory
        self._wanted = wanted
        self._homes = homes
        self._spent: dict[str, float] = {}  # seconds that a kind took here, the last time
        self._found: list[tuple[str, Cell]] = []  # that wait for their start vectors to be on disk
        self._board = Board(ranks)

    def found(self) -> Iterator[tuple[int, Iterator[Cell]]]:
        """Yield every alpha with its cells; what was found before an error comes before it. Collective."""
        work = self._work()
        try:
            for index, kinds in self._wanted.items():
                yield index, (self._awaited(index, kind, work) for kind in kinds)
            self._board.check()
        except BaseException as error:
            self._board.give_up(error)
            raise
        self._board.close()

    def _awaited(self, index: int, kind: str, work: Iterator[None]) -> Cell:
        """Return a cell; until somebody has found it, go on with what this rank is at."""
        while (told := self._board.read(_name(index, kind))) is None:
            self._board.check()
            try:
                next(work)
            except BaseException as error:
                self._board.give_up(error)
                raise
        return _cell(told)

    def _work(self) -> Iterator[None]:
        """Do a cell at a time: one's own, then what there is to spare others, then nothing."""
        for index, kinds in self._wanted.items():
            if kinds and self._homes[index] == self._ranks.rank:
                yield from self._done(index, kinds, at_home=True)
        while True:
            if spare := self._spare():
                index, kind = spare
                yield from self._done(index, (kind,), at_home=False)
            else:
                self._tell(wait=True)
                time.sleep(_PAUSE)
            yield

    def _done(self, index: int, kinds: Sequence[str], *, at_home: bool) -> Iterator[None]:
        mine, told = set[str](), set[str]()

        def claims(kind: str) -> bool:
            # A second time where memory ran out, and the task is begun again.
            if kind not in mine and self._board.claim(_name(index, kind)):
                mine.add(kind)
            return kind in mine - told

        try:
            for cell in self._measured(Task(index, tuple(kinds), at_home, claims), self._spent):
                told.add(kind_of(cell.key))
                self._found.append((_name(index, kind_of(cell.key)), cell))
                self._tell()
                yield
        except MeasurementError as failure:
            self._tell(wait=True)
            for kind in kinds:
                if claims(kind):
                    self._board.post(_name(index, kind), _failure(failure))

    def _tell(self, *, wait: bool = False) -> None:
        """Put on the board what was found, once the start vectors that belong to it are on disk."""
        if self._found and self._memory.settled(wait=wait):
            for name, cell in self._found:
                self._board.post(name, encode(cell))
            self._found.clear()

    def _spare(self) -> tuple[int, str] | None:
        """Return a cell of the rank that has most left, the last that nobody has begun; None where none pays."""
        left: dict[int, list[tuple[int, str]]] = {}
        for index, kinds in self._wanted.items():
            missing = [(index, kind) for kind in kinds if not self._board.posted(_name(index, kind))]
            left.setdefault(self._homes[index], []).extend(missing)
        for pieces in sorted(left.values(), key=self._seconds, reverse=True):
            for index, kind in reversed(pieces):
                free = kind in self._spent and kind not in self._memory.bound
                pays = self._seconds([(index, kind)]) < self._seconds(pieces)
                if free and pays and not self._board.claimed(_name(index, kind)):
                    return index, kind
        return None

    def _seconds(self, pieces: Sequence[tuple[int, str]]) -> float:
        """Return what cells would take here, as far as is known: themselves, and what comes before each alpha's."""
        known = [(index, kind) for index, kind in pieces if kind in self._spent]
        setups = len({index for index, _ in known}) * self._spent.get(SETUP, 0.0)
        return setups + sum(self._spent[kind] for _, kind in known)


def _name(index: int, kind: str) -> str:
    return f"{index} {kind}"


def _failure(error: MeasurementError) -> str:
    return json.dumps({"problem": error.problem, "fix": error.fix})


def _cell(told: str) -> Cell:
    """Return the cell, or raise why there is none."""
    if told.startswith('{"problem"'):
        raise MeasurementError(**json.loads(told))
    return decode(told)
