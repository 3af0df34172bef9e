"""The commands on checkpoints: what their layers are, other names for them, a mix of two."""

from __future__ import annotations

from typing import Annotated

import typer

from sharpscope.commands.terminal import tell
from sharpscope.home import at_home

REF = "Directory, hub id, oc:NAME/TAG, timm:NAME, weights file, py:MODULE:FUNCTION."
Granular = Annotated[str | None, typer.Option(metavar="tower|block|part|tensor", help="What a layer is.")]


def layers(
    model: Annotated[str, typer.Option(metavar="REF", help=REF.replace("weights file", "oc:NAME/FILE"))],
    granularity: Granular = None,
) -> None:
    """Print which tensors of a model form which layer; no data, no compute."""
    from sharpscope.models import load
    from sharpscope.partition import layers as partition

    tell(repr(partition(load(model), granularity or "block")))  # type: ignore[arg-type]


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

    places = at_home(source), at_home(out)
    tell(f"{written(*places, to=to, unsafe_pickle=unsafe_pickle)} tensors: {out}")


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
    templates: Annotated[
        str | None, typer.Option(metavar="FILE", help="Sentences with {} for the class name, if not the scan's.")
    ] = None,
    classnames: Annotated[
        str | None, typer.Option(metavar="FILE", help="Words of the class folders, if not the scan's.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, show the alphas, stop.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a merge that is there already.")] = False,
) -> None:
    """Write the checkpoint between the two of a scan, in the layout of the fine-tuned one, and judge it again."""
    from sharpscope.commands.merge import Request, check_all, merged, prepared
    from sharpscope.config import named_places

    places = named_places(ood or [])
    request = Request(
        recipe,
        folder,
        zero_shot,
        fine_tuned,
        keep_id,
        per_layer,
        id,
        places,
        templates=templates,
        classnames=classnames,
    )
    ready = prepared(request)
    tell(repr(ready.plan))
    if dry_run:
        check_all(ready, out, overwrite=overwrite)
        for note in ready.plan.notes:
            tell(f"note: {note}")
        return
    for line in merged(ready, out, overwrite=overwrite):
        tell(line)
