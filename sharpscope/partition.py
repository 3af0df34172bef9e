"""Which tensors form a layer: every tensor in exactly one, in network order."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sharpscope.errors import UsageError

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


# How transformers, open_clip (= OpenAI) and timm trunks name a CLIP: pattern -> canonical layer, depth order key.
# {0} is the block number. The pre-norm of a tower belongs to its embedding, which it scales.
_BLOCK = {
    "visual": re.compile(
        r"^(?:vision_model\.encoder\.layers|visual\.transformer\.resblocks|visual\.trunk\.blocks)\.(\d+)\.(.+)$"
    ),
    "text": re.compile(
        r"^(?:text_model\.encoder\.layers|transformer\.resblocks|text\.transformer\.resblocks)\.(\d+)\.(.+)$"
    ),
}
_REST = tuple(
    (re.compile(pattern), layer)
    for pattern, layer in (
        (r"^vision_model\.(embeddings|pre_layrnorm)\.", "visual.embed"),
        (r"^visual\.(conv1|class_embedding|positional_embedding|ln_pre)\b", "visual.embed"),
        (r"^visual\.trunk\.(patch_embed|cls_token|reg_token|pos_embed|norm_pre)\b", "visual.embed"),
        (r"^vision_model\.post_layernorm\.", "visual.norm"),
        (r"^visual\.(ln_post|trunk\.norm|trunk\.fc_norm)\b", "visual.norm"),
        (r"^(vision_model\.head|visual\.attn_pool|visual\.trunk\.attn_pool)\b", "visual.pool"),
        (r"^(visual_projection\.|visual\.proj\b|visual\.head\.)", "visual.proj"),
        (r"^text_model\.embeddings\.", "text.embed"),
        (r"^(text\.)?(token_embedding|positional_embedding|cls_emb)\b", "text.embed"),
        (r"^(text_model\.final_layer_norm\.|(text\.)?ln_final\.)", "text.norm"),
        (r"^((text\.)?text_projection\b|text_model\.head\.)", "text.proj"),
        (r"^(head|classification_head|classifier)\.", "head"),
        (r"^logit_(scale|bias)$", "logit_scale"),
    )
)
_PARTS = (
    ("attn", re.compile(r"^(self_attn|attn)\.")),
    ("mlp", re.compile(r"^mlp\.")),
    ("ln", re.compile(r"^(layer_norm|ln_|norm)\d\.")),
)
_DEPTH = ("embed", "block", "norm", "pool", "proj")
_TOWERS = ("visual", "text", "head", "logit_scale", "other")


def _clip_layer(name: str, granularity: Granularity) -> str | None:
    for tower, pattern in _BLOCK.items():
        if match := pattern.match(name):
            block = f"{tower}.block.{int(match[1]):02d}"
            return block if granularity == "block" else _part(block, match[2], name)
    return next((layer for pattern, layer in _REST if pattern.match(name)), None)


def _part(block: str, rest: str, name: str) -> str:
    for part, pattern in _PARTS:
        if pattern.match(rest):
            return f"{block}.{part}"
    warnings.warn(f"{name!r} is no known part of a transformer block; it stays in {block!r}", stacklevel=2)
    return block


def _clip_depth(layer: str) -> tuple[int, int, str]:
    tower, _, rest = layer.partition(".")
    place = rest.partition(".")[0]
    return _TOWERS.index(tower), _DEPTH.index(place) if place in _DEPTH else len(_DEPTH), layer


def _is_clip(names: Iterable[str]) -> bool:
    return any(_BLOCK["visual"].match(name) for name in names)


def _clip(names: Collection[str], granularity: Granularity) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        layer = _clip_layer(name, "block" if granularity == "tower" else granularity) or "other"
        found.setdefault(layer.partition(".")[0] if granularity == "tower" else layer, []).append(name)
    return {layer: found[layer] for layer in sorted(found, key=_clip_depth)}


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
        exchanging scale between them, so their separate sharpness means nothing.
    containers
        Names of the modules that are lists or Sequentials, for networks that are no known CLIP.
    patterns
        Layer id -> regular expression searched in the name; first match wins, the rest falls to the rules above.

    Raises
    ------
    UsageError
        If there are no names, the granularity is unknown, or a pattern matches nothing.

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
    elif _is_clip(names):
        found = _clip(rest, granularity)
    else:
        found = {}
        for name in rest:
            found.setdefault(_plain_layer(name, granularity, containers), []).append(name)
    for name, layer in own.items():
        found.setdefault(layer, []).append(name)
    return Partition({layer: tuple(mine) for layer, mine in found.items()})


def _by_pattern(names: Collection[str], patterns: Mapping[str, str]) -> dict[str, str]:
    compiled = {layer: re.compile(pattern) for layer, pattern in patterns.items()}
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
    kinds = {"Sequential", "ModuleList", "ModuleDict"}
    return [name for name, sub in module.named_modules() if kinds & {kind.__name__ for kind in type(sub).__mro__}]


def layers(model: Any, granularity: Granularity = "block", patterns: Mapping[str, str] | None = None) -> Partition:
    """Return the layers of a model, printable, without data or compute.

    Parameters
    ----------
    model
        Any ``torch.nn.Module``, or what :func:`sharpscope.load` returns.
    granularity, patterns
        See :func:`partition`.
    """
    module = getattr(model, "network", model)
    names = [name for name, tensor in module.named_parameters() if tensor.is_floating_point()]
    return partition(names, granularity=granularity, containers=container_names(module), patterns=patterns)
