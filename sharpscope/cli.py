"""The command line: each command parses, makes one library call and prints."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated

import typer

from sharpscope._version import __version__
from sharpscope.commands.scans import demo, report
from sharpscope.commands.terminal import guarded, say, tell, write_what_can_be
from sharpscope.commands.verdicts import check, diff
from sharpscope.commands.weights import convert, layers, merge
from sharpscope.errors import SharpscopeError

# Plain help: rich alone would take longer to load than --help may take.
app = typer.Typer(name="sharpscope", rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sharpscope {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")] = False,
) -> None:
    """Layer-wise sharpness along the path between a zero-shot CLIP and its fine-tuned self, and which alpha to ship."""


def doctor() -> None:
    """Check versions, attention and second derivatives of this installation."""
    from sharpscope.doctor import examine

    failed = []
    for finding in examine():
        tell(str(finding))
        failed += [finding.name] * (finding.passed is False)
    if failed:
        say(f"error: {len(failed)} checks failed: {', '.join(failed)}")
        raise typer.Exit(SharpscopeError.exit_code)


COMMANDS: dict[Callable[..., None], str] = {
    demo: "The report on an embedded pair, offline.",
    report: "Measure two CLIPs, write the report.",
    check: "Gate a saved scan by rules.",
    layers: "Show what the layers of a model are.",
    convert: "Rewrite weights as safetensors.",
    merge: "Write the checkpoint that a recipe says.",
    diff: "Compare two saved scans.",
    doctor: "Check this installation.",
}
for _command, _line in COMMANDS.items():
    app.command(short_help=_line)(guarded(_command))


def main() -> None:
    """Run the command line."""
    # Threads that spin while they wait make small models ten times slower on a machine that others use too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    write_what_can_be()
    app(prog_name="sharpscope")


if __name__ == "__main__":
    main()
