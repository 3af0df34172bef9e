"""From the keys of a checkpoint to the names that tensors have in the model, and from these to layers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from sharpscope.errors import MismatchError, UsageError
from sharpscope.models.wrappers import bare_names
from sharpscope.partition import Granularity, partition
from sharpscope.recipe import Recipe

_LISTED = 20  # layers in a message


def _containers(names: Iterable[str]) -> set[str]:
    """Return the modules that look like lists: all their children are numbers."""
    children: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for depth in range(1, len(parts) - 1):
            children.setdefault(".".join(parts[:depth]), set()).add(parts[depth])
    return {module for module, found in children.items() if all(child.isdigit() for child in found)}


def layers_of(
    names: Mapping[str, str],
    whole: Collection[str],
    granularity: Granularity,
    scanned: Mapping[str, Sequence[str]] | None = None,
    *,
    uniform: bool = False,
) -> dict[str, str]:
    """Return key -> layer id, in depth order.

    Parameters
    ----------
    names
        Key -> name in the model, of the floating-point tensors of a checkpoint.
    whole
        All such names of the model, of which the checkpoint may hold one tower.
    granularity
        See :func:`sharpscope.partition.partition`.
    scanned
        Layer -> names as a scan had them; what was not on its path (a text tower) falls to the rules, and so does all
        that has another name on disk, where these come to the layers of the scan.
    uniform
        All layers get one alpha, so that those of the scan need not be found.

    Raises
    ------
    MismatchError
        If the scan had a tensor that the checkpoint lacks.
    """
    found = partition([*whole], granularity=granularity, containers=_containers(whole))
    by_rule = {name: layer for layer, mine in found.layers.items() for name in mine}
    by_scan = {name: layer for layer, mine in (scanned or {}).items() for name in mine}
    bare = bare_names(by_scan)
    by_bare = {bare[name]: layer for name, layer in by_scan.items()}
    present = {*names, *whole}
    made = any(layer.partition(".")[0] == "text" for layer in by_rule.values())  # of the text tower: the head
    lost = [n for n in by_scan if n not in present and bare[n] not in present and not (made and n.startswith("head."))]
    if lost and not uniform and not _has_layers(found.layers, scanned or {}):
        raise MismatchError(
            f"the checkpoint lacks {lost[0]!r}, which the scan had in layer {by_scan[lost[0]]!r}; "
            "by the names on disk its layers are others",
            "merge the checkpoints that were scanned, with one alpha for all layers if their library has other names "
            "on disk than in memory; or without the scan: --zero-shot REF --fine-tuned REF --recipe FILE",
        )
    keys_of = {name: key for key, name in names.items()}
    return {
        keys_of[n]: by_scan.get(keys_of[n]) or by_bare.get(n) or layer for n, layer in by_rule.items() if n in keys_of
    }


def _has_layers(found: Mapping[str, Sequence[str]], scanned: Mapping[str, Sequence[str]]) -> bool:
    """Return whether each layer of a scan is found, with as many tensors or, on disk, buffers besides.

    transformers 5 computes with other names than it saves (``vit.layers.0`` is ``vit.encoder.layer.0`` on disk), and
    the rules for names know both.
    """
    return all(len(names) <= len(found.get(layer, ())) for layer, names in scanned.items())


def alphas_of(recipe: Recipe, layers: Collection[str]) -> dict[str, float]:
    """Return layer -> alpha.

    A rule for ``head`` also speaks for the text tower of a CLIP that has no head of its own: the text tower is what a
    scan makes the head from.

    Raises
    ------
    UsageError
        If a rule matches no layer; the nearest id is named.
    """
    ids = {layer: _ids(layer, layers) for layer in dict.fromkeys(layers)}
    known = [name for mine in ids.values() for name in mine]
    for pattern, _ in recipe.rules[:-1]:
        if not any(fnmatchcase(name, pattern) for name in known):
            near = get_close_matches(pattern, known, n=1, cutoff=0.0)
            raise UsageError(
                f"the recipe's pattern {pattern!r} matches no layer; the nearest is {near[0]!r}",
                f"layers: {', '.join([*ids][:_LISTED])}{', ...' if len(ids) > _LISTED else ''}",
            )
    return {layer: _first(recipe, mine) for layer, mine in ids.items()}


def _ids(layer: str, layers: Collection[str]) -> tuple[str, ...]:
    return (layer, "head") if layer.partition(".")[0] == "text" and "head" not in layers else (layer,)


def _first(recipe: Recipe, ids: tuple[str, ...]) -> float:
    return next(alpha for pattern, alpha in recipe.rules if any(fnmatchcase(name, pattern) for name in ids))
