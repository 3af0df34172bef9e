"""What all commands say and how they end: a sentence and an exit code."""

from __future__ import annotations

import codecs
import functools
import io
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sharpscope.errors import SharpscopeError
from sharpscope.home import at_home

if TYPE_CHECKING:
    from sharpscope.result import ScanResult

INTERRUPTED = 130
_PLAIN = {"\u2212": "-", "\u2013": "-", "\u2026": "...", "×": "x", "±": "+-", "‖": "||"}
_POWERS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


def _in_plain(error: UnicodeError) -> tuple[str, int]:
    """Return what stands for letters that an encoding lacks: plain ones for our own, else escapes as JSON has them."""
    assert isinstance(error, UnicodeEncodeError)
    lost = error.object[error.start : error.end]
    lost = re.sub("[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda power: "^" + power[0].translate(_POWERS), lost)
    return "".join(_PLAIN.get(letter) or json.dumps(letter)[1:-1] for letter in lost), error.end


def write_what_can_be() -> None:
    """Let no letter end a command, as a minus sign would where stdout is a file in the code page of a Windows."""
    codecs.register_error("sharpscope", _in_plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="sharpscope")


def rank() -> int:
    """Return this process's number among those that torchrun started; 0 of one that it did not start."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def tell(text: str | bytes, *, err: bool = False) -> None:
    """Print a line; that its reader has gone, as ``head`` goes, is no error and changes no exit code.

    Nor does a stderr that takes nothing, a log on a full disk: what was to be said of an error must not become another
    one, whose exit code would be that of a gate that failed.
    """
    try:
        typer.echo(text, err=err)
    except OSError as error:
        if not (err or isinstance(error, BrokenPipeError)):
            raise
        stream = sys.stderr if err else sys.stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # else the interpreter ends on what is left to flush


def say(text: str) -> None:
    """Print a line for people, on stderr; other processes than the first say who they are."""
    tell(f"rank {rank()}: {text}" if rank() else text, err=True)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    if not rank():
        say(f"warning: {message}")


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command, ending in a sentence and an exit code where it would end in a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _warn
                command(*args, **kwargs)
        except SharpscopeError as error:
            say(f"error: {error}")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            say("interrupted; run the same command again to resume")
            raise typer.Exit(INTERRUPTED) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            say(f"error: {_unforeseen(error)}")
            raise typer.Exit(SharpscopeError.exit_code) from None

    return run


def _unforeseen(error: Exception) -> str:
    """Return a sentence on an error of the machine, or of this program; a crash must not read as "gate failed" (1)."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
        return f"out of memory: {error}\n  fix: a smaller --batch-size; --limit for fewer images"
    if isinstance(error, OSError):
        return (
            f"{error.filename or 'the system'}: {error.strerror or error}\n  fix: see that it can be read and written"
        )
    return f"this is a fault of sharpscope, please report it\n{traceback.format_exc()}"


def show(result: ScanResult, folder: str | Path) -> None:
    """Print the result and where its page is, in the first process."""
    if rank():
        return
    tell(f"{result!r}\n\npage: {at_home(folder) / 'index.html'}")
