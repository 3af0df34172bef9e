"""Rounds of alphas, one of each chain, that the ranks find apart and then tell each other of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sharpscope.assignment import Piece, Task, assigned, kind_of
from sharpscope.errors import MeasurementError
from sharpscope.memory import Memory
from sharpscope.ranks import Ranks
from sharpscope.table import Cell

Measured = Callable[[Task, dict[str, float]], Iterator[Cell]]


@dataclass
class _Told:
    """What a rank tells the others of a task."""

    task: Task
    cells: dict[str, Cell] = field(default_factory=dict)  # by kind
    spent: dict[str, float] = field(default_factory=dict)
    error: MeasurementError | None = None


class Apart:
    """The rounds of a scan whose ranks share the alphas.

    Parameters
    ----------
    ranks
        That share them.
    measured
        Yields the cells of a task and notes what each took.
    memory
        What goes on from an alpha to the next, on this rank.
    """

    def __init__(self, ranks: Ranks, measured: Measured, memory: Memory) -> None:
        self._ranks = ranks
        self._measured = measured
        self._memory = memory
        self._seconds: dict[Piece, float] = {}

    def found(self, wanted: Mapping[int, Sequence[str]]) -> Iterator[tuple[int, Iterator[Cell]]]:
        """Yield the alphas of a round, each with its cells; what was found before an error comes before it."""
        tasks = assigned(wanted, self._ranks.size, self._seconds, self._memory.bound)
        mine = [self._done(task) for task in tasks[self._ranks.rank]]
        self._memory.settled(wait=True)
        all_told = self._ranks.gathered([(mine, sorted(self._memory.bound))])
        told = [one for theirs, _ in all_told for one in theirs]
        self._memory.bound.update(*(bound for _, bound in all_told))
        self._seconds |= {(one.task.chain, kind): s for one in told for kind, s in one.spent.items()}
        for index in sorted(wanted):
            yield index, _replayed(wanted[index], [one for one in told if one.task.index == index])

    def _done(self, task: Task) -> _Told:
        told = _Told(task)
        try:
            for cell in self._measured(task, told.spent):
                told.cells[kind_of(cell.key)] = cell
        except MeasurementError as failure:
            told.error = failure
        return told


def _replayed(kinds: Sequence[str], told: Sequence[_Told]) -> Iterator[Cell]:
    """Yield the cells in their order up to the first that was not found, and raise why."""
    owner = {kind: one for one in told for kind in one.task.kinds}
    for kind in kinds:
        if kind not in owner[kind].cells:
            raise owner[kind].error or AssertionError(kind)
        yield owner[kind].cells[kind]
