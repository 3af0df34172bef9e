"""What processes tell each other without waiting for one another: a board of texts that all write on and read."""

from __future__ import annotations

import atexit
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from uuid import uuid4

from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from sharpscope.errors import MeasurementError
from sharpscope.ranks import Ranks

BEAT = 1.0  # seconds between the signs of life of a rank
SILENCE = 120.0  # seconds without one after which a rank is taken to be gone; torchrun sees that at once
_FAULT = "fault"


class Board:
    """Texts by name, each put there once, in the store that the process group was begun with.

    Beginning and end are collective. In between a rank that dies, or that says it does not go on, is noticed by
    :meth:`check`.

    Parameters
    ----------
    ranks
        That share the board; two or more.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._store = PrefixStore(ranks.led(lambda: uuid4().hex), _get_default_store())
        self._own = {_alive(ranks.rank)}
        self._pulse = _Pulse(self._store, ranks)

    def claim(self, name: str) -> bool:
        """Return whether this rank is the first that claims the name."""
        with self._reached():
            first = bool(self._store.add(f"claim {name}", 1) == 1)
        if first:
            self._own.add(f"claim {name}")
        return first

    def claimed(self, name: str) -> bool:
        """Return whether a rank has claimed the name."""
        return self.posted(f"claim {name}")

    def post(self, name: str, text: str) -> None:
        """Put a text on the board."""
        with self._reached():
            self._store.set(name, text)
        self._own.add(name)

    def posted(self, name: str) -> bool:
        """Return whether there is a text of this name."""
        with self._reached():
            return bool(self._store.check([name]))

    def read(self, name: str) -> str | None:
        """Return the text of this name, None if there is none yet."""
        with self._reached():
            return self._store.get(name).decode() if self.posted(name) else None

    def check(self) -> None:
        """Raise ``MeasurementError`` if a rank can put nothing on the board any more."""
        if fault := self.read(_FAULT):
            raise self._lost(fault)
        with self._reached():
            silent = self._pulse.silent()
        if silent:
            raise self._lost(f"rank {silent[0]} has given no sign of life for {SILENCE:g} s")

    def give_up(self, error: BaseException) -> None:
        """Tell the others that this rank does not go on; the first that does so is heard."""
        with suppress(MeasurementError):  # they may have gone before
            if self.claim(_FAULT):
                self.post(_FAULT, f"rank {self._ranks.rank} ended with {type(error).__name__}: {error}")
        self._pulse.stop()

    def close(self) -> None:
        """Wait until all have read what they want, and clear away what this rank put there. Collective."""
        self._ranks.gathered([None])
        self._pulse.stop()
        for name in self._own:
            self._store.delete_key(name)

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as failure:  # of torch.distributed
            raise self._lost(str(failure).splitlines()[0]) from failure

    def _lost(self, why: str) -> MeasurementError:
        return MeasurementError(
            f"rank {self._ranks.rank} of {self._ranks.size} has lost the others: {why}",
            "see what the rank that ended first says; the same command again goes on from the cells on disk",
        )


def _alive(rank: int) -> str:
    return f"alive {rank}"


class _Pulse:
    """Signs of life of this rank, by a thread as a measurement takes minutes, and whose have stopped."""

    def __init__(self, store: Store, ranks: Ranks) -> None:
        self._store, self._rank = store, ranks.rank
        self._since = {rank: ("", time.monotonic()) for rank in range(ranks.size) if rank != ranks.rank}
        self._looked = 0.0
        self._stopped = Event()
        self._thread = Thread(target=self._beat, daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # a thread that is in the store when the interpreter goes ends the process badly

    def _beat(self) -> None:
        count = 0
        with suppress(RuntimeError):  # the store is gone, and with it whoever would read
            while not self._stopped.is_set():
                self._store.set(_alive(self._rank), str(count))
                count += 1
                self._stopped.wait(BEAT)

    def silent(self) -> list[int]:
        """Return the ranks that have stopped."""
        now = time.monotonic()
        if now - self._looked >= BEAT:
            self._looked = now
            for rank, (last, _) in self._since.items():
                name = _alive(rank)
                beat = self._store.get(name).decode() if self._store.check([name]) else ""
                if beat != last:
                    self._since[rank] = (beat, now)
        return [rank for rank, (_, since) in self._since.items() if self._looked - since > SILENCE]

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()
        atexit.unregister(self.stop)
