"""Which tensors form a layer: every tensor in exactly one, in network order."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sharpscope.errors import ModelError, UsageError
from sharpscope.naming import Place, part, places
from sharpscope.table import MODEL

Granularity = Literal["tower", "block", "part", "tensor"]
GRANULARITIES: tuple[Granularity, ...] = ("tower", "block", "part", "tensor")


@dataclass(frozen=True)
class Partition:
    """Layer id -> names of its tensors, in depth order; every tensor in exactly one layer."""

    layers: Mapping[str, tuple[str, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names."""
        return tuple(name for names in self.layers.values() for name in names)

    def only(self, names: Collection[str]) -> Partition:
        """Return the partition of the given tensors; a layer left without any is dropped."""
        kept = {layer: tuple(n for n in mine if n in names) for layer, mine in self.layers.items()}
        return Partition({layer: mine for layer, mine in kept.items() if mine})

    def __repr__(self) -> str:
        return "\n".join(f"{layer:<24} {len(names):>4} tensors" for layer, names in self.layers.items())


_DEPTH = ("embed", "block", "norm", "pool", "proj")
_TOWERS = ("visual", "text", "decoder", "head", "logit_scale", "other")


def _known_layer(name: str, place: Place, granularity: Granularity) -> str:
    if granularity == "tower" or not place.kind:
        return place.tower
    if place.kind != "block":
        return f"{place.tower}.{place.kind}"
    block = f"{place.tower}.block.{place.number[0]:02d}"
    if granularity == "block":
        return block
    if (inside := part(place.inside)) is None:
        warnings.warn(f"{name!r} is no known part of a transformer block; it stays in {block!r}", stacklevel=2)
        return block
    return f"{block}.{inside}"


def _depth(place: Place) -> tuple[int, int, tuple[int, ...]]:
    return _TOWERS.index(place.tower), _DEPTH.index(place.kind) if place.kind else 0, place.number


def _known(found: Mapping[str, Place], names: Collection[str], granularity: Granularity) -> dict[str, list[str]]:
    layers: dict[str, list[str]] = {}
    # Parts of a block in the order of their names, so that two libraries list them alike.
    keys = {name: (*_depth(found[name]), _known_layer(name, found[name], granularity)) for name in names}
    for name in sorted(names, key=keys.__getitem__):
        layers.setdefault(keys[name][-1], []).append(name)
    return layers


def _plain_layer(name: str, granularity: Granularity, containers: Collection[str]) -> str:
    """Return the child of the root; inside a list or Sequential its member; for parts one component more."""
    parts = name.split(".")[:-1] or [name]
    depth = 1
    if granularity != "tower":
        while ".".join(parts[:depth]) in containers and depth < len(parts):
            depth += 1
        depth += granularity == "part"
    return ".".join(parts[:depth])


def partition(
    names: Collection[str],
    *,
    granularity: Granularity = "block",
    containers: Collection[str] = (),
    patterns: Mapping[str, str] | None = None,
) -> Partition:
    """Return the layers that the tensor names fall into.

    Parameters
    ----------
    names
        Tensor names in network order.
    granularity
        ``"tower"``, ``"block"``, ``"part"`` (attention, MLP and norms of a block apart) or ``"tensor"``.
        q, k, v and out of a block stay together except at ``"tensor"``: attention is invariant under
        exchanging scale between them, so their separate sharpness means nothing. A layer that the network calls
        ``model`` gets the id ``model_``, as ``model`` stands for the whole network.
    containers
        Names of the modules that are lists or Sequentials, for networks that are no known CLIP.
    patterns
        Layer id -> regular expression searched in the name; first match wins, the rest falls to the rules above.

    Raises
    ------
    UsageError
        If there are no names, the granularity is unknown, or a pattern matches nothing or is called ``model``.

    Examples
    --------
    >>> partition(["stem.weight", "body.0.weight", "body.1.weight"], containers=["body"])
    stem                        1 tensors
    body.0                      1 tensors
    body.1                      1 tensors
    """
    if granularity not in GRANULARITIES:
        raise UsageError(f"granularity {granularity!r} is unknown", f"one of {', '.join(GRANULARITIES)}")
    if not names:
        raise UsageError("the model has no floating-point parameters", "pass a model with weights")
    own = _by_pattern(names, patterns or {})
    rest = [name for name in names if name not in own]
    if granularity == "tensor":
        found = {name: [name] for name in rest}
    elif (known := places(names)) is not None:
        found = _known(known, rest, granularity)
    else:
        found = {}
        for name in rest:
            found.setdefault(_plain_layer(name, granularity, containers), []).append(name)
    if MODEL in found:
        free = _free(MODEL, {*found, *own.values()})
        found = {free if layer == MODEL else layer: mine for layer, mine in found.items()}
    for name, layer in own.items():
        found.setdefault(layer, []).append(name)
    return Partition({layer: tuple(mine) for layer, mine in found.items()})


def _free(layer: str, taken: Collection[str]) -> str:
    """Return the id with as many underscores behind it as it takes to be another's."""
    return layer if layer not in taken else _free(f"{layer}_", taken)


def _compiled(layer: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise UsageError(
            f"the pattern {pattern!r} of {layer!r} is no regular expression: {error}", r"e.g. '\.qkv\.'"
        ) from error


def _by_pattern(names: Collection[str], patterns: Mapping[str, str]) -> dict[str, str]:
    if not isinstance(patterns, Mapping):
        raise UsageError(
            f"patterns={patterns!r}: needs layer ids with regular expressions", r"e.g. patterns={'mixers': r'\.qkv\.'}"
        )
    if MODEL in patterns:
        raise UsageError(f"a layer of patterns is called {MODEL!r}, which stands for the whole network", "another id")
    compiled = {layer: _compiled(layer, pattern) for layer, pattern in patterns.items()}
    own = {}
    for name in names:
        layer = next((layer for layer, pattern in compiled.items() if pattern.search(name)), None)
        if layer is not None:
            own[name] = layer
    if unmatched := compiled.keys() - set(own.values()):
        layer = min(unmatched)
        raise UsageError(f"pattern {patterns[layer]!r} of layer {layer!r} matches no tensor", "see sharpscope layers")
    return own


def container_names(module: Any) -> list[str]:
    """Return the names of the submodules that are lists, dicts or Sequentials, the root as ``""``."""
    return _of_kinds(module, "Sequential", "ModuleList", "ModuleDict")


def batch_norms(module: Any) -> list[str]:
    """Return the names of the submodules that are batch norms, also those with frozen statistics."""
    return _of_kinds(module, "_BatchNorm", "FrozenBatchNorm2d")


def _of_kinds(module: Any, *kinds: str) -> list[str]:
    return [n for n, sub in module.named_modules() if {*kinds} & {kind.__name__ for kind in type(sub).__mro__}]


def layers(model: Any, granularity: Granularity = "block", patterns: Mapping[str, str] | None = None) -> Partition:
    """Return the layers of a model, printable, without data or compute.

    Parameters
    ----------
    model
        Any ``torch.nn.Module``, or what :func:`sharpscope.load` returns.
    granularity, patterns
        See :func:`partition`.

    Raises
    ------
    ModelError
        If it is neither.
    """
    module = getattr(model, "network", model)
    if not hasattr(module, "named_parameters"):  # torch is not imported here
        raise ModelError(f"the model is a {type(model).__name__}", "a torch.nn.Module, or what sharpscope.load returns")
    names = [name for name, tensor in module.named_parameters() if tensor.is_floating_point()]
    return partition(names, granularity=granularity, containers=container_names(module), patterns=patterns)
