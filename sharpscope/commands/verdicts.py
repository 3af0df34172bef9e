"""The commands that judge saved scans: neither a model nor torch is needed."""

from __future__ import annotations

from typing import Annotated

import typer

from sharpscope.commands.terminal import tell
from sharpscope.errors import GateError, UsageError


def check(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A saved scan.")],
    rules: Annotated[
        str, typer.Option(metavar="FILE", help="TOML with [tool.sharpscope.check], or with that table's content.")
    ],
    junit: Annotated[str | None, typer.Option(metavar="FILE|-", help="Write JUnit XML, a test case a rule.")] = None,
    json: Annotated[str | None, typer.Option(metavar="FILE|-", help="Write everything as JSON.")] = None,
    md: Annotated[str | None, typer.Option(metavar="FILE|-", help="Write a table for a pull request.")] = None,
    fail_on: Annotated[
        str, typer.Option(metavar="fail|never", help="never: end with 0 where a rule failed; not where none could.")
    ] = "fail",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the last line only.")] = False,
) -> None:
    """Judge a saved scan by rules: 0 passed, 1 failed, 3 not measured. Needs neither a model nor torch.

    A document in the place of - goes to stdout, the lines of the rules then to stderr.
    """
    from sharpscope.commands.check import gate
    from sharpscope.commands.documents import on_stdout

    if fail_on not in ("fail", "never"):
        raise UsageError(f"--fail-on is {fail_on!r}", "fail or never")
    documents = {"junit": junit, "json": json, "md": md}
    found = gate(folder, rules, documents)
    tell(found.headline if quiet else str(found), err=any(map(on_stdout, documents.values())))
    if found.exit_code != GateError.exit_code or fail_on == "fail":
        raise typer.Exit(found.exit_code)


def diff(
    first: Annotated[str, typer.Argument(metavar="DIR", help="A saved scan.")],
    second: Annotated[str, typer.Argument(metavar="DIR", help="Another one.")],
    json: Annotated[str | None, typer.Option(metavar="FILE|-", help="Write all of it as JSON.")] = None,
) -> None:
    """Show what differs between two saved scans: settings, accuracy, sharpness, verdicts.

    JSON in the place of - goes to stdout, the table then to stderr.
    """
    from sharpscope.commands.diff import compared
    from sharpscope.commands.documents import on_stdout

    tell(compared(first, second, json), err=on_stdout(json))
