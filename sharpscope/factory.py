"""``py:pkg.mod:factory``: what a function of the user's own returns."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

from sharpscope.errors import UsageError

PREFIX = "py:"


def made(ref: str, *arguments: Any) -> Any:
    """Return what the function returns that a reference names; modules of the working directory are found too.

    Parameters
    ----------
    ref
        ``py:pkg.mod:factory``. This runs the user's own code: that is what it is for.
    arguments
        As many as the function takes are passed.

    Raises
    ------
    UsageError
        If there is no such module or function.
    """
    module_name, colon, name = ref.removeprefix(PREFIX).rpartition(":")
    if not (colon and module_name and name):
        raise UsageError(f"{ref!r} is not {PREFIX}pkg.mod:factory")
    function = getattr(_module(module_name, ref), name, None)
    if not callable(function):
        raise UsageError(f"{ref!r}: module {module_name} has no function {name!r}", f"{PREFIX}pkg.mod:factory")
    return function(*arguments[: _takes(function)])


def _module(name: str, ref: str) -> Any:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there and needs another one
        raise UsageError(
            f"{ref!r}: there is no module {error.name}", f"run where it lies; searched {here} too"
        ) from error
    finally:
        sys.path.remove(here)


def _takes(function: Any) -> int:
    """Return how many positional arguments a function requires."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)
