"""One progress bar on a terminal, one line per alpha elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
QUICK = 5.0  # seconds that a reading may take without being mentioned


def reading(batches: Iterable[T], name: str, total: int | None, show: bool | None) -> Iterator[T]:
    """Yield the batches; a reading that takes long shows a bar on a terminal, elsewhere a line at its end."""
    terminal, started = sys.stderr.isatty(), time.monotonic()
    yield from tqdm(
        batches,
        desc=f"reading {name}",
        total=total,
        unit="batch",
        delay=QUICK,
        leave=False,
        dynamic_ncols=True,
        disable=not terminal or show is False,
    )
    seconds = time.monotonic() - started
    if seconds > QUICK and not terminal and show is not False:
        sys.stderr.write(f"read {name} in {seconds:.0f} s\n")


class Progress:
    """Progress of a scan on stderr.

    Parameters
    ----------
    total
        Steps of the whole scan.
    alphas
        Number of points on the path.
    show
        True, False, or None: a bar if stderr is a terminal, else a line per alpha.
    """

    def __init__(self, total: int, alphas: int, show: bool | None) -> None:
        self._alphas = alphas
        terminal = sys.stderr.isatty()
        self._lines = show is not False and not terminal
        self._bar = tqdm(total=total, disable=not terminal or show is False, unit="cell", dynamic_ncols=True)
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        """Write a line, unless progress is switched off."""
        if self._lines:
            sys.stderr.write(text + "\n")
        elif not self._bar.disable:
            self._bar.write(text, file=sys.stderr)

    def step(self, index: int, measure: str, what: str) -> None:
        """Count one step and name it."""
        self._bar.set_description_str(f"alpha {index + 1}/{self._alphas} · {measure} · {what}", refresh=False)
        self._bar.update()

    def count(self, what: str) -> None:
        """Count one step of what is done after the path, and name it."""
        self._bar.set_description_str(what, refresh=False)
        self._bar.update()

    def alpha_done(self, index: int, alpha: float) -> None:
        """Say that all cells of an alpha are there."""
        if self._lines:
            self.say(f"alpha {alpha:g} done ({index + 1}/{self._alphas}, {time.monotonic() - self._started:.0f} s)")

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
