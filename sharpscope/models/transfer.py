"""Tensors put into a network that was built for them, and what to say if they do not fit."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from sharpscope.errors import MismatchError, ModelError
from sharpscope.naming import places

_HALF = (torch.float16, torch.bfloat16)
_FLOATS = (torch.float32, torch.float64, *_HALF)
_POSITIONS = re.compile(r"pos(itional|ition)?_?emb")
_DROPPED = re.compile(
    r"(^|\.)(position_ids|num_batches_tracked|n_averaged|attn_mask)$|^(input_resolution|context_length|vocab_size)$"
)
_LIBRARIES = (
    ("transformers", r"^(vision_model|text_model)\.", "vision_model.encoder.layers.*, q_proj/k_proj/v_proj"),
    ("open_clip", r"^visual\.trunk\.", "visual.trunk.*"),
    ("open_clip", r"^visual\.transformer\.", "visual.transformer.resblocks.*, fused in_proj_weight"),
    ("open_clip", r"^visual\.", "visual.*"),
    ("transformers", r"^embeddings\.", "encoder.layers.*, q_proj/k_proj/v_proj, one tower"),
    ("transformers", r"^vit\.", "vit.*"),
    ("timm", r"^(patch_embed|stem|conv1)\.", "patch_embed or stem, blocks or stages"),
)
CONVERT = (
    "--convert auto, or sharpscope.load(REF, like=MODEL, convert=True)  "
    "(exact: splits in_proj rows q,k,v; transposes the two projections)"
)


def library_of(names: Iterable[str]) -> tuple[str, str]:
    """Return the library whose names these are, and an example of them; ``("", "")`` if none is known."""
    listed = list(names)
    for library, pattern, example in _LIBRARIES:
        if any(re.match(pattern, name) for name in listed):
            return library, example
    return "", ""


def check_same_library(first: Mapping[str, object], second: Mapping[str, object], words: tuple[str, str]) -> None:
    """Raise ``MismatchError`` if two models name their tensors as two different libraries do.

    Parameters
    ----------
    first, second
        Tensors by name.
    words
        What the two are called.
    """
    a, b = library_of(first), library_of(second)
    if not (a[0] and b[0]) or a[0] == b[0]:
        return
    lines = (f"  {word:<10} {found[0]} ({found[1]})" for word, found in zip(words, (a, b), strict=True))
    raise MismatchError(
        f"models do not share an architecture: {len(first)} vs {len(second)} tensors\n" + "\n".join(lines), CONVERT
    )


def lone_tower(names: Collection[str]) -> str | None:
    """Return ``"visual"`` or ``"text"`` if there are blocks of that tower only, else None.

    WiSE-FT deletes the blocks of the text tower and keeps its embeddings: that is an image tower.
    """
    found = (places(names) or {}).values()
    towers = {place.tower for place in found if place.kind == "block"}
    return next(iter(towers)) if len(towers) == 1 else None


def prefixed(names: Collection[str]) -> dict[str, str]:
    """Return name in a whole model of transformers -> name, for those of a bare tower of it."""
    bare = any(name.startswith("embeddings.") for name in names)
    prefix = f"{'text' if lone_tower(names) == 'text' else 'vision'}_model." if bare else ""
    return {f"{prefix}{name}": name for name in names}


def of_tower(names: Collection[str], tower: str) -> set[str]:
    """Return the names that belong to a tower, the scale, and what belongs nowhere."""
    kept = (tower, "logit_scale", "other")
    return {name for name, place in (places(names) or {}).items() if place.tower in kept}


def may_be_absent(names: Collection[str], tower: str | None) -> set[str]:
    """Return what a checkpoint of one tower, or of all if None, may leave out: the rest and its projection."""
    if tower is None:
        return {"logit_bias"}
    return {name for name, place in (places(names) or {}).items() if place.tower != tower or place.kind == "proj"}


def lacking(network: nn.Module, names: Collection[str]) -> list[str]:
    """Return the names of the network's tensors that are not among these, but for those that versions differ in."""
    return [name for name in network.state_dict() if name not in names and not _DROPPED.search(name)]


def load_into(
    network: nn.Module, tensors: Mapping[str, Tensor], where: object, *, optional: Collection[str] = ()
) -> None:
    """Copy the tensors into the network in its own precision, one at a time.

    Parameters
    ----------
    network
        Built for them; parameters and persistent buffers are overwritten.
    tensors
        By name; half precision is widened.
    where
        For messages.
    optional
        Names that may be absent and keep their values.

    Raises
    ------
    MismatchError
        If a shape is another one.
    ModelError
        If a tensor is missing, left over, no floating-point number, or not finite.
    """
    own = network.state_dict()
    kind = type(network).__name__
    absent = [name for name in lacking(network, tensors) if name not in optional]
    if absent:
        raise ModelError(
            f"{where} lacks {len(absent)} weights of a {kind} ({absent[0]}, ...)",
            "save the whole model, both towers: model.save_pretrained(DIR), or torch.save(model.state_dict(), FILE)",
        )
    besides = sorted(name for name in tensors if name not in own and not _DROPPED.search(name))
    if besides:
        raise ModelError(
            f"{where} holds {len(besides)} weights that a {kind} does not have ({besides[0]}, ...)",
            "give the architecture that it was made for; merge adapters and remove wrappers before saving",
        )
    with torch.no_grad():
        for name, target in own.items():
            if name in tensors:
                target.copy_(_fitting(name, tensors[name], target, where))


def _fitting(name: str, tensor: Tensor, target: Tensor, where: object) -> Tensor:
    if tensor.numel() == target.numel() == 1:  # a scale is a number in one version, a vector of one in another
        tensor = tensor.reshape(target.shape)
    if tensor.shape != target.shape:
        raise other_shape(name, tensor.shape, target.shape, where)
    if target.is_floating_point():
        if tensor.dtype not in _FLOATS:
            raise ModelError(
                f"{where}: {name!r} is {tensor.dtype}, not a floating-point number",
                "save the model before it is quantised",
            )
        check_finite_tensor(name, tensor, where)
    return tensor


def other_shape(name: str, shape: Sequence[int], own: Sequence[int], where: object) -> MismatchError:
    """Return the error of a tensor that has another shape than the network's own."""
    found = f"{where}: {name!r} is {tuple(shape)}, the architecture has {tuple(own)}"
    if _POSITIONS.search(name):
        return MismatchError(
            f"{found}: it was trained at another image or text size, and resized position embeddings are no path",
            "two models of one resolution; for open_clip the configuration of that size, e.g. oc:ViT-L-14-336",
        )
    return MismatchError(found, "two models of one architecture, e.g. a checkpoint and its fine-tuned self")


def check_finite_tensor(name: str, tensor: Tensor, where: object) -> None:
    """Raise ``ModelError`` if a value is NaN or infinite."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ModelError(
            f"{where}: {name!r} has {bad} of {tensor.numel()} values that are not finite",
            "take an earlier checkpoint of that training run; it diverged",
        )


def check_finite_weights(network: nn.Module, where: object) -> None:
    """Raise ``ModelError`` naming the first weight that is NaN or infinite."""
    for name, tensor in network.state_dict().items():
        check_finite_tensor(name, tensor, where)


def own_names(names: Collection[str], tensors: Collection[str]) -> dict[str, str]:
    """Return name in the network -> name in a source that holds one tower without its prefix, or both with it.

    transformers 5.6 dropped the prefix ``vision_model.`` of bare towers; both layouts exist on disk.
    """
    for prefix in ("", "vision_model.", "text_model.", "visual.", "visual.trunk."):
        if all(f"{prefix}{name}" in names or _DROPPED.search(name) for name in tensors):
            return {f"{prefix}{name}": name for name in tensors}
    return {name: name for name in tensors}
