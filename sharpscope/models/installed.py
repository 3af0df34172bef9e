"""The optional libraries: imported where they are needed, with a sentence where they cannot be."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from types import ModuleType

from sharpscope.errors import UsageError

_EXTRA = {"transformers": "clip", "open_clip": "openclip", "timm": "timm"}
_DISTRIBUTIONS = {"open_clip": "open_clip_torch"}
LEAST = {"transformers": (4, 45), "open_clip": (3, 0), "timm": (1, 0)}  # as the extras of pyproject.toml ask for
TORCHVISION_FIX = (
    "pip uninstall torchvision (transformers and sharpscope need none), or install the one made for this torch"
)


def imported(name: str, member: str | None = None) -> ModuleType:
    """Return the library, after importing a member of it that transformers would import lazily.

    Raises
    ------
    UsageError
        If it is not installed, too old, or cannot be imported, e.g. because torchvision was built for another torch.
    """
    try:
        absent = importlib.util.find_spec(name) is None
    except (ValueError, ImportError):  # None in sys.modules
        absent = True
    if absent:
        raise UsageError(
            f"reading this model needs the package {name}, which is not installed",
            f'pip install "sharpscope[{_EXTRA[name]}]"',
        )
    _check_age(name)
    try:
        found = importlib.import_module(name)
        if member is not None:
            getattr(found, member)
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        raise _broken(name, error) from error
    return found


def distribution(name: str) -> str:
    """Return the name that a library is installed by."""
    return _DISTRIBUTIONS.get(name, name)


def _check_age(name: str) -> None:
    """Raise for a version before those that are read; one that says no number is taken."""
    try:
        version = importlib.metadata.version(distribution(name))
    except importlib.metadata.PackageNotFoundError:  # a copy that was put on the path
        return
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if numbers and numbers < LEAST[name]:
        least = ".".join(map(str, LEAST[name]))
        raise UsageError(
            f"{distribution(name)} {version} is too old, {least} or newer is needed",
            f'pip install --upgrade "{distribution(name)}>={least}"',
        )


def _broken(name: str, error: BaseException) -> UsageError:
    if (reason := torchvision_mismatch()) is not None:
        return UsageError(f"{name} cannot be imported: {reason}", TORCHVISION_FIX)
    return UsageError(f"{name} cannot be imported: {first_line(error)}", f"pip install --upgrade {distribution(name)}")


def torchvision_mismatch() -> str | None:
    """Return in which way the installed torchvision does not fit the installed torch; None if it does or is absent.

    It registers operators for the torch that it was built for; beside another one its import fails, and with it that
    of every library that looks for it.
    """
    try:
        version = importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return None
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        torch = importlib.metadata.version("torch")
        return f"torchvision {version} was built for another torch than {torch} ({first_line(error)})"
    return None


def first_line(error: BaseException, length: int = 200) -> str:
    """Return the first line of an error's text, or its kind if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:length]
