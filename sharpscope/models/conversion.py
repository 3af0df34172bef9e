"""The same ViT CLIP under the names of open_clip and of transformers: exact, only names and shapes change."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from sharpscope.errors import MismatchError

_TOWERS = (  # open_clip before the block number, transformers before it
    (r"visual\.transformer\.resblocks", "vision_model.encoder.layers"),
    (r"(?:text\.)?transformer\.resblocks", "text_model.encoder.layers"),
)
_INSIDE = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_OUTSIDE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_QKV = ("q_proj", "k_proj", "v_proj")
_INTO_OPEN_CLIP = {there: here for here, there in (_OUTSIDE | _TRANSPOSED).items()}
_IGNORED = re.compile(r"(^|\.)(position_ids|attn_mask)$")


def to_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return open_clip weights of a ViT CLIP under the names of transformers' ``CLIPModel``.

    Rows of ``in_proj`` are split into q, k, v; the two projections are transposed. Nothing is rounded.

    Raises
    ------
    MismatchError
        If a tensor has no counterpart: the network is no ViT CLIP.
    """
    found: dict[str, Tensor] = {}
    for name in _converted_names(weights):
        bare = name.removeprefix("text.")
        if bare in _OUTSIDE:
            found[_OUTSIDE[bare]] = weights[name]
        elif bare in _TRANSPOSED:
            found[_TRANSPOSED[bare]] = weights[name].T.contiguous()
        else:
            found |= _block_to_transformers(name, weights[name])
    return found


def _block_to_transformers(name: str, tensor: Tensor) -> dict[str, Tensor]:
    for pattern, tower in _TOWERS:
        if match := re.fullmatch(rf"{pattern}\.(\d+)\.(.+?)[._](weight|bias)", name):
            block, inside, kind = f"{tower}.{match[1]}", match[2], match[3]
            if inside == "attn.in_proj":
                parts = zip(_QKV, tensor.chunk(3), strict=True)
                return {f"{block}.self_attn.{part}.{kind}": rows.contiguous() for part, rows in parts}
            if inside in _INSIDE:
                return {f"{block}.{_INSIDE[inside]}.{kind}": tensor}
    raise _no_counterpart(name, "transformers' CLIPModel")


def to_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return transformers weights of a ``CLIPModel`` under the names of open_clip's native ``CLIP``.

    The inverse of :func:`to_transformers`, bit for bit.
    """
    found: dict[str, Tensor] = {}
    for name in _converted_names(weights):
        if name in _INTO_OPEN_CLIP:
            here = _INTO_OPEN_CLIP[name]
            found[here] = weights[name].T.contiguous() if here in _TRANSPOSED else weights[name]
        else:
            found |= _block_to_open_clip(name, weights)
    return found


def _block_to_open_clip(name: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    match = re.fullmatch(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    back = {there: here for here, there in _INSIDE.items()}
    if match:
        place = "visual.transformer" if match[1] == "vision" else "transformer"
        block, inside, kind = f"{place}.resblocks.{match[2]}", match[3], match[4]
        if inside in back:
            return {f"{block}.{back[inside]}.{kind}": weights[name]}
        if inside.removeprefix("self_attn.") in _QKV:
            rows = [weights[name.replace(inside, f"self_attn.{part}")] for part in _QKV]
            return {f"{block}.attn.in_proj_{kind}": torch.cat(rows)}
    raise _no_counterpart(name, "open_clip's CLIP")


def _converted_names(names: Iterable[str]) -> list[str]:
    """Return the names, k and v apart from q left out where open_clip has them in one tensor, buffers too."""
    return [n for n in names if not _IGNORED.search(n) and not re.search(r"self_attn\.(k|v)_proj\.", n)]


def _no_counterpart(name: str, where: str) -> MismatchError:
    return MismatchError(
        f"{name!r} has no counterpart in {where}: only CLIPs with two plain ViT towers are the same in both libraries",
        "save both models with one library",
    )


CONVERSIONS: Mapping[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {
    "transformers": to_transformers,
    "open_clip": to_open_clip,
}
