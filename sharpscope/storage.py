"""The folder a scan is kept in: locked while a process writes it, and a sentence where it cannot be written."""

from __future__ import annotations

import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from sharpscope.errors import OutputError

LOCK = "scan.lock"
ORPHANS = 10.0  # seconds in which data workers notice that their parent was killed; until then they hold its lock

if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # a locked byte cannot be read, so none of the text
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` inside the block (full disk, no permission) into an :class:`OutputError` naming the path."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{error.filename or path} cannot be written: {error.strerror or error}",
            "make room or choose another --out (out=); what was finished before is kept, the same call resumes there",
        ) from error


def check_writable(folder: Path) -> Path:
    """Return the nearest folder that is there, after making another one in it, which is removed; else ``OSError``."""
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    try:
        with TemporaryDirectory(dir=there, prefix=".sharpscope-"):
            return there
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(there)) from error  # not the name of what was tried


@contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Hold the folder for this process, creating it if need be; the lock file names process and host.

    The system releases the lock when the process ends however it ends; the file that a killed one leaves blocks nobody.

    Raises
    ------
    OutputError
        If another scan holds it, or the folder cannot be written.
    """
    if folder is None:
        yield
        return
    path = folder / LOCK
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _acquired(path)
    try:
        yield
    finally:
        with suppress(OSError):  # before it is released: the next holder's file stays
            path.unlink()
        os.close(descriptor)


def _acquired(path: Path) -> int:
    """Return the descriptor of the locked file."""
    started = time.monotonic()
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if _taken(descriptor, path):
                return descriptor
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode() if hasattr(os, "pread") else path.read_text()
            if not _is_dead(holder) or time.monotonic() - started > ORPHANS:
                os.close(descriptor)
                raise OutputError(
                    f"{path.parent} is being written by another scan ({holder.strip() or 'just started'})",
                    "wait until it has ended, or choose another --out (out=)",
                ) from None
        os.close(descriptor)
        time.sleep(0.05)


def _taken(descriptor: int, path: Path) -> bool:
    """Lock and sign the open file; False if its last holder has just removed it."""
    try:
        _lock(descriptor)
    except OSError as error:
        if isinstance(error, BlockingIOError | PermissionError):
            raise BlockingIOError from error
        warnings.warn(
            f"{path.parent} is on a file system without locks: see that one scan at a time writes it", stacklevel=2
        )
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return True
    return False


def _is_dead(holder: str) -> bool:
    """Whether the text of a lock names a process of this host that is no more."""
    words = holder.split()
    if len(words) != 4 or words[3] != socket.gethostname() or sys.platform == "win32":
        return False
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        return False
    return False
