"""Documents in places that a user names: all of them written or none, and nothing in the place of what is read."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import combinations
from pathlib import Path

from sharpscope.commands.terminal import tell
from sharpscope.errors import UsageError
from sharpscope.home import at_home

STDOUT = "-"


def on_stdout(place: str | None) -> bool:
    """Whether a document goes to stdout, as ``-`` or as another name of what stdout is."""
    if place in (None, STDOUT):
        return place == STDOUT
    with suppress(OSError, AttributeError):  # nothing is there yet, or stdout is no file
        return os.path.samestat(os.stat(place), os.fstat(sys.stdout.fileno()))  # noqa: PTH116 - a name, see STDOUT
    return False


def write_documents(texts: Sequence[tuple[str, str]], read: Iterable[Path] = ()) -> None:
    """Write texts to the places named with them, and the folders these lie in: all of them, or none.

    A link is followed. A file is replaced in one step; a pipe or device is written to as it stands, after the files
    were found to be writable. What goes to stdout comes last.

    Parameters
    ----------
    texts
        Pairs of a place and its text; the place ``-`` is stdout.
    read
        Files that must stay as they are.

    Raises
    ------
    UsageError
        If two places are one, a place is a file that is read, or one cannot be written.
    """
    if any(not named for named, _ in texts):
        raise UsageError("a document is to go to '', which is no file", "name a file, or - for stdout")
    texts = [(str(at_home(named)), text) for named, text in texts]
    _check_apart([named for named, _ in texts], [file for file in read if file.is_file()])
    places = {_target(Path(named)): text for named, text in texts if not on_stdout(named)}
    files = [place for place in places if not _is_stream(place)]
    made: list[Path] = []
    begun: list[Path] = []
    try:
        for place in files:
            made += _made(place.parent)
            if place.is_dir():
                raise IsADirectoryError(errno.EISDIR, "it is a folder", str(place))
            begun.append(_beside(place))
            _write_beside(place, places[place])
        for place in sorted(places, key=files.__contains__):  # streams first: a file can still be left as it was
            (_put if place in files else _write_through)(place, places[place])
    except BaseException as error:  # an interrupt too: a pipe that nobody reads waits for ever
        for file in begun:
            with suppress(OSError):
                file.unlink()
        for folder in reversed(made):
            with suppress(OSError):
                folder.rmdir()
        if not isinstance(error, OSError):
            raise
        raise UsageError(f"{place} cannot be written: {error.strerror}", "name another file") from error
    for text in (text for named, text in texts if on_stdout(named)):
        tell(text.removesuffix("\n").encode())


def _check_apart(named: Sequence[str], read: Sequence[Path]) -> None:
    places = [place for place in named if place != os.devnull]
    for one, other in combinations(places, 2):
        if _same(one, other):
            raise UsageError(f"two documents go to {other}, one would be lost", "a place for each")
    for place in places:
        if file := next((file for file in read if _same(place, str(file))), None):
            raise UsageError(f"{place} cannot be written: it is {file}, which is read", "name another file")


def _same(one: str, other: str) -> bool:
    if on_stdout(one) or on_stdout(other):
        return on_stdout(one) and on_stdout(other)
    with suppress(OSError):  # one of them is not there
        return Path(one).samefile(other)
    return os.path.realpath(one) == os.path.realpath(other)


def _is_stream(place: Path) -> bool:
    return _is_descriptor(place) or (place.exists() and not place.is_file() and not place.is_dir())


def _is_descriptor(place: Path) -> bool:
    """Whether it is a name of a file that this process has open, as /dev/stderr and /dev/fd/3 are."""
    names = [place, place.readlink()] if place.is_symlink() else [place]
    return any(re.fullmatch(r"/proc/[^/]+/fd", os.path.realpath(name.parent)) for name in names)


def _target(place: Path) -> Path:
    """Return what a link leads to; that of a pipe or device leads to no name."""
    return Path(os.path.realpath(place)) if place.is_symlink() and not _is_stream(place) else place


def _write_through(place: Path, text: str) -> None:
    with place.open("a", encoding="utf-8") as stream:  # behind a descriptor may be a file that is not to be cut
        stream.write(text)


def _write_beside(place: Path, text: str) -> None:
    """Write what will be put in place, down to the disk, which may have room for one document and not for two."""
    with _beside(place).open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _put(place: Path, _: str) -> None:
    _beside(place).replace(place)


def _beside(place: Path) -> Path:
    return place.with_name(place.name + ".part")


def _made(folder: Path) -> list[Path]:
    """Make a folder and those above it; return the new ones, the uppermost first."""
    new = [place for place in (*reversed(folder.parents), folder) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return new
