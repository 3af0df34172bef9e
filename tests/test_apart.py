"""Every cell is found by one rank, start vectors are where they are needed, and ranks end at about once.

Ranks are simulated in one process: each has a clock, the board shows what was posted by then.
"""

from dataclasses import dataclass, field
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharpscope import apart
from sharpscope.apart import SETUP, Apart, kind_of
from sharpscope.errors import MeasurementError
from sharpscope.memory import Memory
from sharpscope.ranks import Ranks
from sharpscope.table import Cell, cell_key

KINDS = ("id|evaluation", "id|trace", "id|lambda_max", "id|m_sharpness")
SECONDS = dict(zip((SETUP, *KINDS), (1.0, 0.5, 10.0, 40.0, 6.0), strict=True))  # as on one H200, in gradients
BOUND = {"id|lambda_max"}


class Clock:
    now = 0.0


@dataclass
class Board:
    """One for all ranks of a simulation, that shows what was there at the time."""

    clock: Clock
    texts: dict = field(default_factory=dict)
    claims: dict = field(default_factory=dict)

    def claim(self, name):
        first = name not in self.claims
        self.claims.setdefault(name, self.clock.now)
        return first

    def claimed(self, name):
        return self.claims.get(name, float("inf")) <= self.clock.now

    def post(self, name, text):
        assert name not in self.texts, "found twice"
        self.texts[name] = self.clock.now, text

    def posted(self, name):
        return self.texts.get(name, (float("inf"), ""))[0] <= self.clock.now

    def read(self, name):
        return self.texts[name][1] if self.posted(name) else None

    def check(self):
        pass


class Simulation:
    """Ranks that find the cells of ``alphas`` in so many chains, a cell of an alpha in ``seconds[index, kind]``."""

    def __init__(self, monkeypatch, wanted, homes, size, seconds, fails=()):
        self.clock = Clock()
        self.board = Board(self.clock)
        monkeypatch.setattr(apart, "Board", lambda _ranks: self.board)
        monkeypatch.setattr(apart.time, "sleep", self._pass)
        self.seconds, self.fails, self.finders, self.begun = seconds, fails, {}, []
        self.wanted, self.homes = wanted, homes
        self.memories = [Memory(None) for _ in range(size)]
        self.ranks = [
            Apart(Ranks(rank, size), self._measured(rank), self.memories[rank], wanted, homes) for rank in range(size)
        ]

    def _pass(self, seconds):
        self.clock.now += max(seconds, 0.5)

    def _measured(self, rank):
        def measured(task, spent):
            at = None
            for kind in filter(task.claims, task.kinds):
                if kind != KINDS[0] and at is None:
                    at = spent[SETUP] = self.seconds[task.index, SETUP]
                    self._pass(at)
                if (task.index, kind) in self.fails:
                    raise MeasurementError(f"{task.index} fails", "nothing")
                self._pass(self.seconds[task.index, kind])
                spent[kind] = self.seconds[task.index, kind]
                self.finders[task.index, kind] = rank
                if kind in BOUND:
                    assert task.at_home
                    self.memories[rank].bound.add(kind)
                yield Cell(cell_key(task.index, *kind.split("|")), ())

        return measured

    def run(self):
        """Return when the last cell was there."""
        works, clocks = [one._work() for one in self.ranks], [0.0] * len(self.ranks)
        missing = {f"{index} {kind}" for index, kinds in self.wanted.items() for kind in kinds}
        while not missing <= self.board.texts.keys():
            rank = clocks.index(min(clocks))
            self.clock.now = clocks[rank]
            next(works[rank])
            clocks[rank] = self.clock.now
        return max((time for time, _ in self.board.texts.values()), default=0.0)


def chains(lengths):
    """Alphas of chains of these lengths in the order of a scan, and the chain of each."""
    starts = [sum(lengths[:c]) for c in range(len(lengths))]
    order = [(start + i, c) for i in range(max(lengths)) for c, start in enumerate(starts) if i < lengths[c]]
    return dict(order)


def taking(wanted, seconds=SECONDS):
    return {(index, kind): s for index in wanted for kind, s in seconds.items()}


@pytest.mark.parametrize(("lengths", "size"), [([3, 3, 3, 2], 4), ([3, 3, 3, 2], 2), ([4, 4, 3], 3), ([6, 5], 2)])
def test_ranks_end_at_about_once_and_wait_for_no_slow_chain(monkeypatch, lengths, size):
    """Eleven alphas; first ones of a chain take half as long again, the last of all as well."""
    homes = {index: chain % size for index, chain in chains(lengths).items()}
    slow = {sum(lengths[:c]) for c in range(len(lengths))} | {10}
    seconds = {(i, k): s * (1.5 if i in slow and k in BOUND else 1) for (i, k), s in taking(homes).items()}
    ended = Simulation(monkeypatch, dict.fromkeys(homes, KINDS), homes, size, seconds).run()
    assert sum(seconds.values()) / size <= ended <= 1.08 * sum(seconds.values()) / size + SECONDS["id|m_sharpness"]


def test_what_a_slow_chain_need_not_find_itself_is_found_by_others(monkeypatch):
    homes = chains([3, 3])
    seconds = {(i, k): s * (3 if homes[i] == 0 else 1) for (i, k), s in taking(homes).items()}
    simulation = Simulation(monkeypatch, dict.fromkeys(homes, KINDS), homes, 2, seconds)
    alone = sum(s for (i, _), s in seconds.items() if homes[i] == 0)
    assert simulation.run() <= alone - 2 * 3 * SECONDS["id|m_sharpness"]
    assert {piece for piece, rank in simulation.finders.items() if rank != homes[piece[0]]} >= {
        (2, "id|m_sharpness"), (1, "id|m_sharpness")
    }  # fmt: skip


def test_alphas_that_come_out_even_stay_whole(monkeypatch):
    homes = chains([3, 3, 3])
    simulation = Simulation(monkeypatch, dict.fromkeys(homes, KINDS), homes, 3, taking(homes))
    simulation.run()
    assert all(rank == homes[index] for (index, _), rank in simulation.finders.items())


@settings(max_examples=60, deadline=None)
@given(data=st.data(), lengths=st.lists(st.integers(1, 3), min_size=1, max_size=5), size=st.integers(1, 4))
def test_every_cell_is_found_once_and_what_is_bound_at_home(data, lengths, size):
    homes = {index: chain % size for index, chain in chains(sorted(lengths, reverse=True)).items()}
    seconds = {key: data.draw(st.floats(0.0, 9.0)) for key in product(homes, (SETUP, *KINDS))}
    wanted = {index: tuple(k for k in KINDS if data.draw(st.booleans())) for index in homes}
    with pytest.MonkeyPatch.context() as patch:
        simulation = Simulation(patch, wanted, homes, size, seconds)
        simulation.run()
    assert simulation.finders.keys() == {(index, kind) for index, kinds in wanted.items() for kind in kinds}
    assert all(rank == homes[i] for (i, kind), rank in simulation.finders.items() if kind in BOUND)


def test_an_alpha_that_fails_says_so_for_every_cell_that_nobody_found(monkeypatch):
    homes = chains([2, 2])
    simulation = Simulation(
        monkeypatch, dict.fromkeys(homes, KINDS), homes, 2, taking(homes), fails={(1, "id|lambda_max")}
    )
    simulation.run()
    simulation.clock.now = float("inf")
    told = [simulation.ranks[1]._board.read(f"1 {kind}") for kind in KINDS]
    assert [kind_of(apart._cell(text).key) for text in told[:2]] == list(KINDS[:2])
    for text in told[2:]:
        with pytest.raises(MeasurementError, match="1 fails"):
            apart._cell(text)


def test_cells_are_told_when_their_start_vectors_are_on_disk(monkeypatch):
    simulation = Simulation(monkeypatch, {0: KINDS}, {0: 0}, 1, taking({0: 0}))
    one, settled = simulation.ranks[0], []
    monkeypatch.setattr(one._memory, "settled", lambda *, wait=False: wait or bool(settled))
    work = one._work()
    for _ in range(3):
        next(work)
    assert not simulation.board.texts
    settled.append(True)
    next(work)
    assert len(simulation.board.texts) == 4


def test_a_task_begun_again_finds_what_it_had_claimed_and_not_told(monkeypatch):
    simulation = Simulation(monkeypatch, {0: KINDS}, {0: 0}, 1, taking({0: 0}))
    one, measured = simulation.ranks[0], simulation.ranks[0]._measured

    def again(task, spent):
        yield next(measured(task, spent))
        assert task.claims(KINDS[1])  # and then memory runs out
        yield from measured(task, spent)

    one._measured = again
    for _ in one._done(0, KINDS, at_home=True):
        pass
    assert list(simulation.board.texts) == [f"0 {kind}" for kind in KINDS]


def test_a_kind_is_the_cell_without_its_alpha():
    assert kind_of(cell_key(0.1, "id", "trace")) == "id|trace"
