"""A board of two ranks in one process: what one says the other reads, and silence is noticed."""

import time

import pytest
import torch.distributed as dist

from sharpscope import board
from sharpscope.board import Board
from sharpscope.errors import MeasurementError


class Beside:
    """A rank whose collectives find it alone; the store is shared."""

    size = 2

    def __init__(self, rank):
        self.rank = rank

    def led(self, _work):
        return "a scan"

    def gathered(self, values):
        return list(values)


@pytest.fixture
def two(monkeypatch):
    store = dist.HashStore()
    monkeypatch.setattr(board, "_get_default_store", lambda: store)
    monkeypatch.setattr(board, "BEAT", 0.01)
    made = [Board(Beside(rank)) for rank in (0, 1)]
    yield store, *made
    for one in made:
        one._pulse.stop()


def test_what_one_posts_the_other_reads_and_the_first_claim_counts(two):
    _, here, there = two
    assert [here.claim("a"), there.claim("a"), here.claim("a")] == [True, False, False]
    assert there.claimed("a")
    assert not there.claimed("b")
    assert there.read("a") is None
    here.post("a", "text")
    assert there.read("a") == "text"
    there.check()


def test_the_first_that_gives_up_is_heard(two):
    _, here, there = two
    here.give_up(ZeroDivisionError("a bug"))
    there.give_up(ValueError("another"))
    for one in (here, there):
        with pytest.raises(MeasurementError, match="has lost the others: rank 0 ended with ZeroDivisionError: a bug"):
            one.check()


def test_silence_is_noticed_and_said_again_and_again(two, monkeypatch):
    _, here, there = two
    monkeypatch.setattr(board, "SILENCE", 2.0)
    there._pulse.stop()
    time.sleep(0.1)
    here.check()  # sees the last sign of life
    time.sleep(2.5)
    for _ in range(2):
        with pytest.raises(MeasurementError, match="rank 1 has given no sign of life for 2 s"):
            here.check()


def test_nothing_is_left_in_the_store(two):
    store, here, there = two
    here.claim("a")
    here.post("a", "text")
    there.post("b", "text")
    there.claim("a")
    while store.num_keys() < 5:  # the first signs of life of both
        time.sleep(0.01)
    for one in (here, there):
        one.close()
    assert store.num_keys() == 0


def test_a_store_that_is_gone_is_a_loss_of_the_others(two, monkeypatch):
    _, here, _there = two

    class Gone:
        def check(self, _names):
            raise RuntimeError("connection reset\nby peer")

    monkeypatch.setattr(here, "_store", Gone())
    with pytest.raises(MeasurementError, match="rank 0 of 2 has lost the others: connection reset"):
        here.read("a")
