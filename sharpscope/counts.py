"""Whole numbers that a caller gives, checked in one way."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from sharpscope.errors import UsageError


def is_whole(value: Any) -> bool:
    """Return whether it is a whole number by type, numpy's too; True and False are none."""
    return not isinstance(value, bool) and isinstance(value, Integral)


def whole(name: str, value: Any, least: int = 1, fix: str | None = None) -> int:
    """Return the number as an int, which JSON takes as well; ``name`` is what the caller calls it.

    Raises
    ------
    UsageError
        If it is no whole number or less than ``least``.

    Examples
    --------
    >>> import numpy as np
    >>> whole("limit", np.int64(3))
    3
    """
    if is_whole(value) and value >= least:
        return int(value)
    raise UsageError(f"{name}={value!r}: needs a whole number, {least} or more", fix)
