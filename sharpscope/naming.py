"""How transformers, open_clip and timm name the tensors of image towers and CLIPs: tensor name -> its place."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

Rules = tuple[tuple[re.Pattern[str], str], ...]


class Place(NamedTuple):
    """Where a tensor stands: ``kind`` is embed, block, norm, pool, proj or "" (head, logit_scale, other).

    ``number`` is that of the block, or stage and number in a network of stages; ``inside`` the name within the block.
    """

    tower: str
    kind: str = ""
    number: tuple[int, ...] = ()
    inside: str = ""


# A network is known by names that it must have, one for each pattern; the value is the tower of names without prefix.
_SIGNATURES: tuple[tuple[tuple[str, ...], str], ...] = (
    ((r"^(vision_model|text_model)\.encoder\.layers\.",), ""),  # transformers CLIP, SigLIP
    ((r"^visual\.(transformer\.resblocks|trunk|layer1)\.",), "text"),  # open_clip
    ((r"^vit\.embeddings\.",), ""),
    ((r"^embeddings\.token_embedding\.", r"^encoder\.layers\.\d"), "text"),  # bare towers since transformers 5.6
    ((r"^embeddings\.(patch|class)", r"^(encoder\.)?layers?\.\d"), "visual"),
    ((r"^patch_embed\.", r"^(blocks|layers)\.\d"), "visual"),  # timm ViT, Swin
    ((r"^stem\.", r"^stages\.\d+\.blocks\."), "visual"),  # timm ConvNeXt
    ((r"^conv1\.", r"^layer1\.0\."), "visual"),  # timm and torchvision ResNet
)
_PREFIXES = (
    ("vision_model.", "visual"),
    ("visual.trunk.", "visual"),
    ("visual.", "visual"),
    ("vit.", "visual"),
    ("text_model.", "text"),
    ("text_decoder.", "decoder"),
    ("text.", "text"),
)


def _compiled(*rules: tuple[str, str]) -> Rules:
    return tuple((re.compile(pattern), meaning) for pattern, meaning in rules)


# By the whole name; the head of a trunk maps to the common space, a head at the root to classes.
_WHOLE = _compiled(
    (r"^logit_(scale|bias)$", "logit_scale"),
    (r"^(classifier|classification_head)\.", "head"),
    (r"^(visual\.(trunk\.)?)?head\.norm\.", "visual.norm"),
    (r"^(visual_projection\.|visual\.proj\b|visual\.(trunk\.)?(head|fc)\.)", "visual.proj"),
    (r"^text(_model\.head|_projection|\.proj|\.text_projection)\b", "text.proj"),
)
_ROOT_HEAD = re.compile(r"^(head|fc)(\.fc)?\.(weight|bias)$")
_OUTER_HEAD = re.compile(r"^(classification_head|classifier|head|fc)\.")
_STAGED = (
    re.compile(r"^(?:stages|layers)\.(\d+)\.blocks\.(\d+)\.(.+)$"),
    re.compile(r"^layer(\d)\.(\d+)\.(.+)$"),
    re.compile(r"^stages\.(\d+)()\.((?:downsample|pos_emb)\b.+)$"),  # what a stage begins with
    re.compile(r"^layers\.(\d+)()\.(downsample\..+)$"),
)
_BLOCK = re.compile(
    r"^(?:transformer\.)?(?:encoder\.)?(?:layers|layer|block|resblocks|blocks|cross_attn)\.(\d+)\.(.+)$"
)
_LOCAL = _compiled(
    (r"^(attn_?pool|pooler|final_conv|head)\b", "pool"),
    (r"^(text_projection|proj)\b", "proj"),
    (r"^(post_layernorm|final_layer_norm|ln_post|ln_final|layernorm|norm|fc_norm)\b", "norm"),
    (r"^(transformer\.)?(embeddings|pre_layrnorm|token_embedding|positional_embedding|class_embedding)\b", "embed"),
    (r"^(conv\d|bn\d|ln_pre|stem|patch_embed|cls_token|cls_emb|dist_token|reg_token|pos_embed|norm_pre)\b", "embed"),
)
# A layer scale belongs to the branch that it scales.
_PARTS = _compiled(
    (r"^(self_attn|attn|attention|token_mixer|ls_?1|gamma_1|layer_scale_1)\b", "attn"),
    (r"^(mlp|intermediate|output|ls_?2|gamma(_2)?|layer_scale(_2)?)\b", "mlp"),
    (r"^(layer_norm\d|ln_\w+|norm\d?|layernorm_(before|after)|bn\d)\b", "ln"),
    (r"^(conv\w*|downsample|pos_emb)\b", "conv"),
)


def _tower_of_bare_names(names: Collection[str]) -> str | None:
    """Return what a name without prefix belongs to; None if the network is not a known one."""
    for patterns, tower in _SIGNATURES:
        if all(any(re.match(pattern, name) for name in names) for pattern in patterns):
            return tower
    return None


def _block(local: str) -> tuple[tuple[int, ...], str] | None:
    for pattern in _STAGED:
        if match := pattern.match(local):
            return (int(match[1]), int(match[2] or 0)), match[3]
    match = _BLOCK.match(local)
    return ((int(match[1]),), match[2]) if match else None


def _place(name: str, bare: str) -> Place:
    meaning = next((meaning for pattern, meaning in _WHOLE if pattern.match(name)), "")
    if not meaning and bare != "text" and _ROOT_HEAD.match(name):
        meaning = "head"
    if meaning:
        tower, _, kind = meaning.partition(".")
        return Place(tower, kind)
    prefix, tower = next(((p, t) for p, t in _PREFIXES if name.startswith(p)), ("", bare or "other"))
    local = name.removeprefix(prefix)
    if tower == "other":
        return Place("other")
    if found := _block(local):
        return Place(tower, "block", *found)
    kind = next((kind for pattern, kind in _LOCAL if pattern.match(local)), "")
    return Place(tower, kind) if kind else Place("other")


def _unwrapped(names: Collection[str]) -> dict[str, str] | None:
    """Return name -> name without the modules that hold all tensors but a head; None if no known network is inside."""
    heads = {name for name in names if _OUTER_HEAD.match(name)}
    paths = [name.split(".") for name in names if name not in heads]
    for depth in range(1, min(map(len, paths), default=0)):
        if len({tuple(path[:depth]) for path in paths}) > 1:
            return None
        inner = {name: name if name in heads else ".".join(name.split(".")[depth:]) for name in names}
        if len(set(inner.values())) == len(inner) and _tower_of_bare_names(inner.values()) is not None:
            return inner
    return None


def places(names: Collection[str]) -> dict[str, Place] | None:
    """Return where each tensor stands; None if the names are of no known network.

    Stages are unrolled: the blocks of a ResNet, ConvNeXt or Swin carry one running number through all stages. Known,
    too, is a known network inside a module that adds at most a head: WiSE-FT's ``image_encoder.model.``.
    """
    bare = _tower_of_bare_names(names)
    if bare is None:
        inner = _unwrapped(names)
        inside = None if inner is None else places(inner.values())
        return None if inner is None or inside is None else {name: inside[inner[name]] for name in names}
    found = {name: _place(name, bare) for name in names}
    if bare == "text" and "head.weight" in found and not any(name.startswith("visual.") for name in names):
        found |= {name: Place("text", "proj") for name in names if name.startswith("head.")}
    staged = sorted({(place.tower, place.number) for place in found.values() if len(place.number) > 1})
    running = {key: (number,) for number, key in enumerate(staged)}
    return {
        name: place._replace(number=running.get((place.tower, place.number), place.number))
        for name, place in found.items()
    }


def part(inside: str) -> str | None:
    """Return which part of its block a tensor belongs to: attn, mlp, ln, conv; None if it is none of them."""
    return next((kind for pattern, kind in _PARTS if pattern.match(inside)), None)
