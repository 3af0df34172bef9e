"""The commands that measure, or draw what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sharpscope.commands.terminal import show, tell
from sharpscope.commands.weights import REF, Granular
from sharpscope.errors import UsageError

OUT = "sharpscope-report"
NO_SETTINGS = ("config", "dry_run", "fresh", "quiet", "audit")  # flags of report that say how, not what

Out = Annotated[str | None, typer.Option(help=f"Folder that everything is written to.  [default: {OUT}]")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Discard what --out holds instead of resuming it.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]


def demo(
    out: Out = None,
    failure: Annotated[bool, typer.Option("--failure", help="The pair whose interpolation fails.")] = False,
    fresh: Fresh = False,
    quiet: Quiet = False,
) -> None:
    """Write the full report on an embedded pair of small CLIPs: offline, in under two minutes."""
    from sharpscope.commands.report import measure
    from sharpscope.demo import settings
    from sharpscope.storage import writing

    with writing(Path(out or OUT)):  # which the images are unpacked to
        chosen = settings(out or OUT, "failure" if failure else "success")
    show(measure(chosen, fresh=fresh, progress=False if quiet else None), chosen.out)


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
    subset: Annotated[
        bool | None, typer.Option("--subset", help="Leave out folders that are no ID class, or no output.")
    ] = None,
    measures: Annotated[
        str | None, typer.Option(metavar="A,B", help="trace, lambda_max, m_sharpness, directional, ...")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(metavar="TIMES", help="Times the usual target errors; 2: a quarter of the probes.")
    ] = None,
    m: Annotated[
        int | None, typer.Option("--m", metavar="N", help="Images per group of m-sharpness.  [default: 32]")
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
    recipe_limit: Annotated[int | None, typer.Option(metavar="N", help="Most recipes that are tried.")] = None,
    audit: Annotated[
        str | None, typer.Option(metavar="FILE", help="Log of an SPD training; [default: DIR/spd.jsonl, if there].")
    ] = None,
    chains: Annotated[int | None, typer.Option(metavar="N", help="Measure N runs of alphas independently.")] = None,
    parallel: Annotated[
        str | None, typer.Option(metavar="data|alphas|weights", help="What the processes of torchrun share.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What a process may take of its device, e.g. 40GiB.")
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

    chosen = settings({name: value for name, value in given.items() if name not in NO_SETTINGS}, config)
    if dry_run:
        tell(plan_line(chosen, fresh=fresh, audit=audit))
        return
    show(measure(chosen, fresh=fresh, progress=False if quiet else None, audit=audit), chosen.out)


def _again(folder: str, besides: list[str], audit: str | None) -> None:
    """Write the page of a saved scan; needs neither a model nor torch."""
    from sharpscope.report.page import write
    from sharpscope.saved import open_result

    result = open_result(folder)
    if besides:
        raise UsageError(
            f"report {folder} only draws what was measured; --{besides[0].replace('_', '-')} changes nothing in it",
            "leave out the folder to measure anew, or the flag to draw again",
        )
    write(result, folder, audit=audit)
    show(result, folder)
