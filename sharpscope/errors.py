"""Every error a caller may plan for: a sentence with culprit, found and needed, then the way out."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SharpscopeError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is what the command line ends with."""

    exit_code = 3

    def __init__(self, problem: str, fix: str | None = None) -> None:
        self.problem = problem
        self.fix = fix
        super().__init__(problem if fix is None else f"{problem}\n  fix: {fix}")


class UsageError(SharpscopeError):
    """An argument or configuration value that cannot be meant."""

    exit_code = 2


class DataError(SharpscopeError):
    """Data that cannot be measured on: empty, unlabelled, unreadable, or not the same twice."""


class MeasurementError(SharpscopeError):
    """A measurement that gave no usable number."""


class ModelError(SharpscopeError):
    """A model or checkpoint that cannot be loaded or measured as it stands."""


class MismatchError(SharpscopeError):
    """Two models that do not belong to one path."""

    exit_code = 4


class OutputError(SharpscopeError):
    """An output folder that cannot be written, or that another process is writing."""


class GateError(SharpscopeError):
    """A gate that was measured and did not pass."""

    exit_code = 1


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint at what a mistyped name may have meant.

    >>> nearest("sede", ["seed", "out"]), nearest("x", ["seed", "out"])
    ("did you mean 'seed'?", 'known: seed, out')
    """
    names = list(known)
    near = get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names) or 'none'}"
