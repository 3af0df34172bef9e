"""Every cell of a round is found by one rank, start vectors are where they are needed, and ranks end at about once."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharpscope.assignment import SETUP, assigned, kind_of
from sharpscope.memory import Memory
from sharpscope.rounds import Apart
from sharpscope.table import Cell, cell_key

KINDS = ("id|evaluation", "id|trace", "id|lambda_max", "id|m_sharpness")
SECONDS = dict(zip((SETUP, *KINDS), (1.0, 0.5, 10.0, 40.0, 6.0), strict=True))  # as on one H200, in gradients
BOUND = {"id|lambda_max"}


def known(chains, seconds=SECONDS):
    return {(chain, kind): value for chain in range(chains) for kind, value in seconds.items()}


def ends(tasks, seconds):
    """What each rank takes, by the definition."""
    return [
        sum(seconds[t.chain, kind] for t in mine for kind in t.kinds) + sum(seconds[t.chain, SETUP] for t in mine)
        for mine in tasks
    ]


def test_alphas_that_come_out_even_stay_whole():
    for seconds in ({}, known(4)):
        for alphas, size in ((4, 4), (4, 2), (3, 3)):
            tasks = assigned({3 * i: KINDS for i in range(alphas)}, size, seconds, BOUND)
            assert [[t.index for t in mine] for mine in tasks] == [
                list(range(3 * rank, 3 * alphas, 3 * size)) for rank in range(size)
            ]
            assert {t.kinds for mine in tasks for t in mine} == {KINDS}


@pytest.mark.parametrize(("alphas", "size", "most"), [(3, 2, 91), (3, 4, 57), (1, 2, 42), (3, 8, 42), (5, 4, 83)])
def test_what_is_left_over_is_shared_and_ends_sooner_than_whole_alphas(alphas, size, most):
    tasks = assigned(dict.fromkeys(range(alphas), KINDS), size, known(alphas), BOUND)
    whole = assigned(dict.fromkeys(range(alphas), KINDS), size, {}, BOUND)
    assert max(ends(tasks, known(alphas))) <= most < max(ends(whole, known(alphas)))


def test_a_slow_chain_hands_over_what_is_not_bound():
    seconds = known(2) | {(0, "id|lambda_max"): 60.0}
    first, second = assigned(dict.fromkeys((0, 5), KINDS), 2, seconds, BOUND)
    assert {t.index: set(t.kinds) for t in first}[0] >= BOUND
    assert [t.index for t in second] == [0, 5]
    assert [t.at_home for t in second] == [False, True]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), alphas=st.integers(1, 5), size=st.integers(1, 4))
def test_every_cell_goes_to_one_rank_and_what_is_bound_stays_at_home(data, alphas, size):
    times = st.floats(0.0, 9.0)
    seconds = {key: data.draw(times) for key in product(range(alphas), (SETUP, *KINDS))}
    wanted = {i: tuple(data.draw(st.sets(st.sampled_from(KINDS)))) for i in range(alphas)}
    tasks = assigned(wanted, size, seconds, BOUND)
    given_out = [(t.index, kind) for mine in tasks for t in mine for kind in t.kinds]
    assert sorted(given_out) == sorted((index, kind) for index, kinds in wanted.items() for kind in kinds)
    for rank, mine in enumerate(tasks):
        for task in mine:
            assert task.at_home == (task.chain % size == rank)
            assert task.at_home or not BOUND & set(task.kinds)


class Two:
    """The first of two ranks, the other's answers at hand."""

    size, rank = 2, 0

    def __init__(self):
        self.others = []

    def gathered(self, mine):
        return [*mine, *self.others]


def test_seconds_of_all_ranks_decide_and_nothing_is_shared_before_they_are_known():
    asked = []

    def measured(task, spent):
        asked.append((task.index, task.kinds))
        for kind in task.kinds:
            spent[kind] = SECONDS[kind]
            yield Cell(cell_key(task.index, *kind.split("|")), ())

    ranks = Two()
    memory = Memory(None)
    memory.bound |= BOUND
    apart = Apart(ranks, measured, memory)
    for index in (0, 1):
        list(apart.found({index: KINDS}))
    assert asked == [(0, KINDS), (1, ("id|lambda_max",))]


def test_a_kind_is_the_cell_without_its_alpha():
    assert kind_of(cell_key(0.1, "id", "trace")) == "id|trace"
