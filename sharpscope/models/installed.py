"""The optional libraries: imported where they are needed, with a sentence where they cannot be."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from types import ModuleType

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from sharpscope.errors import UsageError

_EXTRA = {"transformers": "clip", "open_clip": "openclip", "timm": "timm"}
_DISTRIBUTIONS = {"open_clip": "open_clip_torch"}
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
    """Raise for a version that sharpscope's own extras do not ask for; one that is none is taken."""
    try:
        version = importlib.metadata.version(distribution(name))
        needs = map(Requirement, importlib.metadata.requires("sharpscope") or ())
        asked = next(need for need in needs if need.name == distribution(name))
        known = asked.specifier.contains(Version(version), prereleases=True)
    except (importlib.metadata.PackageNotFoundError, StopIteration, InvalidVersion):  # a copy on the path, or a fork
        return
    if not known:
        raise UsageError(
            f"{asked.name} {version} is too old, {asked.specifier} is needed",
            f'pip install --upgrade "{asked.name}{asked.specifier}"',
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
