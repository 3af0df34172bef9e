"""Any module of one's own: ``py:pkg.mod:factory`` names a function without arguments that makes it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from sharpscope.errors import UsageError
from sharpscope.models.installed import first_line

_FORM = (
    "py:PACKAGE.MODULE:FUNCTION, a function without arguments that returns a module, or a module and a preprocessing"
)


def made(reference: str) -> tuple[nn.Module, Callable[[Any], Any] | None]:
    """Return the module that the factory makes, in evaluation mode, and its preprocessing if it gives one.

    The working directory is looked in first, as ``python -m`` does. The factory's code runs: it is the caller's own.

    Raises
    ------
    UsageError
        If there is no such module or function, or it does not make a ``torch.nn.Module``.
    """
    place, colon, name = reference.partition(":")
    if not (place and colon and name.isidentifier()):
        raise UsageError(f"'py:{reference}' names no function", _FORM)
    sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(place), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"'py:{reference}' cannot be imported: {first_line(error)}", _FORM) from error
    finally:
        sys.path.remove(str(Path.cwd()))
    found = factory()
    network, preprocess = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if not isinstance(network, nn.Module):
        raise UsageError(f"'py:{reference}' returned a {type(network).__name__}", _FORM)
    return network.eval(), preprocess or getattr(network, "preprocess", None)
