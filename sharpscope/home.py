"""The home directory of a place that begins with ``~``."""

from __future__ import annotations

import os
from pathlib import Path


def at_home(place: str | Path) -> Path:
    """Return the place as a path, with the home directory for a leading ``~``.

    A shell leaves that alone inside quotes and after ``=``, and nobody replaces it in TOML and in Python. What begins
    with the name of no user, as ``~backup``, is a file called that.

    >>> at_home("~/runs") == Path.home() / "runs", at_home("runs/~") == Path("runs/~")
    (True, True)
    """
    return Path(os.path.expanduser(place))  # noqa: PTH111 - Path.expanduser raises where there is no such user
