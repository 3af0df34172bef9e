"""The command line: each command parses, makes one library call and prints."""

from __future__ import annotations

import functools
import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sharpscope._version import __version__
from sharpscope.errors import GateError, SharpscopeError, UsageError

if TYPE_CHECKING:
    from sharpscope.result import ScanResult

# Plain help: rich alone would take longer to load than --help may take.
app = typer.Typer(name="sharpscope", rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)
OUT = "sharpscope-report"
REF = "Directory, hub id, oc:NAME/TAG, timm:NAME, weights file, py:MODULE:FUNCTION."
INTERRUPTED = 130
_NO_SETTINGS = ("config", "dry_run", "fresh", "quiet", "audit")  # flags of report that say how, not what


def _rank() -> int:
    """Return this process's number among those that torchrun started; 0 of one that it did not start."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def _say(text: str) -> None:
    typer.echo(f"rank {_rank()}: {text}" if _rank() else text, err=True)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    if not _rank():
        _say(f"warning: {message}")


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command, ending in a sentence and an exit code where it would end in a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _warn
                command(*args, **kwargs)
        except SharpscopeError as error:
            _say(f"error: {error}")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            _say("interrupted; run the same command again to resume")
            raise typer.Exit(INTERRUPTED) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            _say(f"error: {_unforeseen(error)}")
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


def _show(result: ScanResult, folder: str | Path) -> None:
    if _rank():
        return
    typer.echo(f"{result!r}\n\npage: {Path(folder) / 'index.html'}")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sharpscope {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")] = False,
) -> None:
    """Layer-wise sharpness along the path between a zero-shot CLIP and its fine-tuned self, and which alpha to ship."""


Out = Annotated[str | None, typer.Option(help=f"Folder that everything is written to.  [default: {OUT}]")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Discard what --out holds instead of resuming it.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
Granular = Annotated[str | None, typer.Option(metavar="tower|block|part|tensor", help="What a layer is.")]


@app.command(short_help="The report on an embedded pair, offline.")
@guarded
def demo(
    out: Out = None,
    failure: Annotated[bool, typer.Option("--failure", help="The pair whose interpolation fails.")] = False,
    fresh: Fresh = False,
    quiet: Quiet = False,
) -> None:
    """Write the full report on an embedded pair of small CLIPs: offline, in under two minutes."""
    from sharpscope.commands.report import measure
    from sharpscope.demo import settings

    chosen = settings(out or OUT, "failure" if failure else "success")
    _show(measure(chosen, fresh=fresh, progress=False if quiet else None), chosen.out)


@app.command(short_help="Measure two CLIPs, write the report.")
@guarded
def report(
    folder: Annotated[str | None, typer.Argument(metavar="[DIR]", help="A saved scan: write its page again.")] = None,
    zero_shot: Annotated[str | None, typer.Option(metavar="REF", help=REF)] = None,
    fine_tuned: Annotated[str | None, typer.Option(metavar="REF", help="The same CLIP, fine-tuned.")] = None,
    convert: Annotated[
        str | None, typer.Option(metavar="no|auto", help="Convert between open_clip and transformers; exact.")
    ] = None,
    id: Annotated[str | None, typer.Option(metavar="DATA", help="ID images: DIR, wds:DIR, py:module:name.")] = None,
    ood: Annotated[list[str] | None, typer.Option(metavar="NAME=DATA", help="An OOD set; repeatable.")] = None,
    sharpness_on: Annotated[
        str | None, typer.Option(metavar="DATA", help="Images that sharpness is measured on, e.g. training images.")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(metavar="image|both|contrastive", help="Image tower and head; both towers; FLYP's loss on both."),
    ] = None,
    captions: Annotated[
        bool | None, typer.Option("--captions", help="Contrastive: captions of the data, not class prompts.")
    ] = None,
    classnames: Annotated[
        str | None, typer.Option(metavar="FILE", help="Words of the class folders: JSON, CSV, or a line each.")
    ] = None,
    templates: Annotated[
        str | None, typer.Option(metavar="FILE", help="Sentences with {} for the class name, a line each.")
    ] = None,
    subset: Annotated[bool | None, typer.Option("--subset", help="Leave out OOD folders that are no ID class.")] = None,
    measures: Annotated[
        str | None, typer.Option(metavar="A,B", help="trace, lambda_max, m_sharpness, m_sharpness_average.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(metavar="TIMES", help="Times the usual target errors; 2: a quarter of the probes.")
    ] = None,
    alphas: Annotated[str | None, typer.Option(metavar="N|A,B", help="How many points, or which.")] = None,
    limit: Annotated[
        str | None, typer.Option(metavar="N|all", help="Most images that sharpness is measured on.")
    ] = None,
    images: Annotated[int | None, typer.Option(metavar="N", help="Most images of each set.  [default: all]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images at once; bounds memory.")] = None,
    granularity: Granular = None,
    interventions: Annotated[
        bool | None,
        typer.Option("--interventions/--no-interventions", help="Move layers one at a time.  [default: where cheap]"),
    ] = None,
    intervention_limit: Annotated[
        str | None, typer.Option(metavar="N|all", help="Most images per set that moves are judged on.")
    ] = None,
    recipes: Annotated[bool | None, typer.Option("--recipes", help="Also try recipes with an alpha per layer.")] = None,
    audit: Annotated[
        str | None, typer.Option(metavar="FILE", help="Log of an SPD training; [default: DIR/spd.jsonl, if there].")
    ] = None,
    chains: Annotated[int | None, typer.Option(metavar="N", help="Measure N runs of alphas independently.")] = None,
    parallel: Annotated[
        str | None, typer.Option(metavar="data|alphas", help="What the processes of torchrun share.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; 1 is quickest for very small models.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of all draws.")] = None,
    deterministic: Annotated[
        bool | None, typer.Option("--deterministic", help="Only algorithms that repeat bit by bit; slower on a GPU.")
    ] = None,
    config: Annotated[str | None, typer.Option(metavar="FILE", help="TOML with these settings; flags win.")] = None,
    out: Out = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done, stop.")] = False,
    fresh: Fresh = False,
    quiet: Quiet = False,
) -> None:
    """Measure two CLIPs on folders of images and write the report; or write the page of a saved scan again."""
    given = {
        name: value
        for name, value in locals().items()
        if not (value is None or value == [] or (value is False and name != "interventions"))
    }
    if folder is not None:
        _again(folder, sorted(given.keys() - {"folder", "quiet", "audit"}), audit)
        return
    from sharpscope.commands.report import measure, plan_line
    from sharpscope.config import settings

    chosen = settings({name: value for name, value in given.items() if name not in _NO_SETTINGS}, config)
    if dry_run:
        typer.echo(plan_line(chosen))
        return
    _show(measure(chosen, fresh=fresh, progress=False if quiet else None, audit=audit), chosen.out)


def _again(folder: str, besides: list[str], audit: str | None) -> None:
    """Write the page of a saved scan; needs neither a model nor torch."""
    from sharpscope.report.page import write
    from sharpscope.result import open_result

    if besides:
        raise UsageError(
            f"report {folder} only draws what was measured; --{besides[0].replace('_', '-')} changes nothing in it",
            "leave out the folder to measure anew, or the flag to draw again",
        )
    result = open_result(folder)
    write(result, folder, audit=audit)
    _show(result, folder)


@app.command(short_help="Gate a saved scan by rules.")
@guarded
def check(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A saved scan.")],
    rules: Annotated[
        str, typer.Option(metavar="FILE", help="TOML with [tool.sharpscope.check], or with that table's content.")
    ],
    junit: Annotated[str | None, typer.Option(metavar="FILE", help="Write JUnit XML, a test case a rule.")] = None,
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Write everything as JSON.")] = None,
    md: Annotated[str | None, typer.Option(metavar="FILE", help="Write a table for a pull request.")] = None,
    fail_on: Annotated[
        str, typer.Option(metavar="fail|never", help="never: end with 0 where a rule failed; not where none could.")
    ] = "fail",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the last line only.")] = False,
) -> None:
    """Judge a saved scan by rules: 0 passed, 1 failed, 3 not measured. Needs neither a model nor torch."""
    from sharpscope.commands.check import gate

    if fail_on not in ("fail", "never"):
        raise UsageError(f"--fail-on is {fail_on!r}", "fail or never")
    found = gate(folder, rules, {"junit": junit, "json": json, "md": md})
    typer.echo(found.headline if quiet else str(found))
    if found.exit_code != GateError.exit_code or fail_on == "fail":
        raise typer.Exit(found.exit_code)


@app.command(short_help="Show what the layers of a model are.")
@guarded
def layers(
    model: Annotated[str, typer.Option(metavar="REF", help=REF)],
    granularity: Granular = None,
) -> None:
    """Print which tensors of a model form which layer; no data, no compute."""
    from sharpscope.models import load
    from sharpscope.partition import layers as partition

    typer.echo(repr(partition(load(model), granularity or "block")))  # type: ignore[arg-type]


@app.command(short_help="Rewrite weights as safetensors.")
@guarded
def convert(
    source: Annotated[str, typer.Argument(metavar="FILE|DIR", help="Weights.")],
    out: Annotated[str, typer.Option(metavar="FILE", help="The .safetensors file to write.")],
    to: Annotated[str | None, typer.Option(metavar="open_clip|transformers", help="Names of that library.")] = None,
    unsafe_pickle: Annotated[
        bool, typer.Option("--unsafe-pickle", help="Unpickle a whole module: runs code from the file.")
    ] = False,
) -> None:
    """Write the weights of a checkpoint as safetensors: from a pickled module, or under another library's names."""
    from sharpscope.commands.convert import convert as written

    typer.echo(f"{written(Path(source), Path(out), to=to, unsafe_pickle=unsafe_pickle)} tensors: {out}")


@app.command(short_help="Write the checkpoint that a recipe says.")
@guarded
def merge(
    out: Annotated[str, typer.Option(metavar="DIR|FILE", help="What is written, whole or not at all.")],
    folder: Annotated[str | None, typer.Argument(metavar="[DIR]", help="A saved scan.")] = None,
    recipe: Annotated[
        str, typer.Option(metavar="recommended|ALPHA|FILE", help="An alpha for all layers, or a TOML file of rules.")
    ] = "recommended",
    keep_id: Annotated[
        float | None, typer.Option(metavar="POINTS", help="ID accuracy the recommendation may give up, e.g. -0.5.")
    ] = None,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Recommend an alpha per layer, if that beats one for all.")
    ] = False,
    zero_shot: Annotated[
        str | None, typer.Option(metavar="REF", help="Its weights, if not where the scan read them.")
    ] = None,
    fine_tuned: Annotated[str | None, typer.Option(metavar="REF", help="The same of the fine-tuned model.")] = None,
    id: Annotated[str | None, typer.Option(metavar="DIR", help="Judge the result on these images.")] = None,
    ood: Annotated[list[str] | None, typer.Option(metavar="NAME=DIR", help="And on these; repeatable.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, show the alphas, stop.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a merge that is there already.")] = False,
) -> None:
    """Write the checkpoint between the two of a scan, in the layout of the fine-tuned one, and judge it again."""
    from sharpscope.commands.merge import Request, merged, prepared
    from sharpscope.config import named_places

    ready = prepared(Request(recipe, folder, zero_shot, fine_tuned, keep_id, per_layer, id, named_places(ood or [])))
    typer.echo(repr(ready.plan))
    if not dry_run:
        for line in merged(ready, out, overwrite=overwrite):
            typer.echo(line)


@app.command(short_help="Compare two saved scans.")
@guarded
def diff(
    first: Annotated[str, typer.Argument(metavar="DIR", help="A saved scan.")],
    second: Annotated[str, typer.Argument(metavar="DIR", help="Another one.")],
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Write all of it as JSON.")] = None,
) -> None:
    """Show what differs between two saved scans: settings, accuracy, sharpness, verdicts."""
    from sharpscope.commands.diff import compared

    typer.echo(compared(first, second, json))


@app.command(short_help="Check this installation.")
@guarded
def doctor() -> None:
    """Check versions, attention and second derivatives of this installation."""
    from sharpscope.doctor import examine

    failed = []
    for check in examine():
        typer.echo(str(check))
        failed += [check.name] * (check.passed is False)
    if failed:
        _say(f"error: {len(failed)} checks failed: {', '.join(failed)}")
        raise typer.Exit(SharpscopeError.exit_code)


def main() -> None:
    """Run the command line."""
    # Threads that spin while they wait make small models ten times slower on a machine that others use too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app(prog_name="sharpscope")


if __name__ == "__main__":
    main()
