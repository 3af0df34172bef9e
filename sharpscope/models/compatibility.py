"""Whether two CLIPs belong to one path, beyond the shapes of their tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sharpscope.errors import MismatchError, ModelError
from sharpscope.models.classifier import ImageClassifier
from sharpscope.models.clip import ClipModel

# What changes the function without changing a shape comes first; two of these load silently into each other.
_TOWER = (
    "hidden_act",
    "num_attention_heads",
    "layer_norm_eps",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
)
_VISION = ("image_size", "patch_size")
_IMAGES = (
    "image_mean",
    "image_std",
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "do_convert_rgb",
)
_FIX = "a checkpoint and its fine-tuned self, saved with the same configuration"


def _architecture(model: ClipModel) -> dict[str, Any]:
    config = model.network.config
    found = {"projection_dim": config.projection_dim}
    for tower in ("vision_config", "text_config"):
        part = getattr(config, tower)
        names = _TOWER + (_VISION if tower == "vision_config" else ())
        found |= {f"{tower}.{name}": getattr(part, name) for name in names}
    return found


def _preprocessing(model: ClipModel) -> dict[str, Any] | None:
    """Return the settings in a form that compares across versions, None if the checkpoint has none."""
    try:
        stored = model.image_processor.to_dict()
    except ModelError:
        return None
    return {name: _plain(stored.get(name)) for name in _IMAGES}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):  # {"height": 224, "width": 224}; other sides are None in some versions
        return {key: side for key, side in sorted(value.items()) if side is not None}
    return list(value) if isinstance(value, tuple) else value


def _vocabulary(model: ClipModel) -> dict[str, int] | None:
    try:
        found: dict[str, int] = model.tokenizer.get_vocab()
    except ModelError:
        return None
    return found


def _differences(a: ClipModel, b: ClipModel) -> Iterator[tuple[str, Any, Any]]:
    """Yield name and both values of what differs; a fine-tuned model may lack tokenizer and preprocessing files."""
    pairs = [(_architecture(a), _architecture(b)), (_preprocessing(a), _preprocessing(b))]
    for first, second in pairs:
        if first is None or second is None:
            continue
        yield from ((name, value, second[name]) for name, value in first.items() if value != second[name])
    words, others = _vocabulary(a), _vocabulary(b)
    if words is not None and others is not None and words != others:
        yield "the tokenizer's vocabulary", f"{len(words)} tokens", f"{len(others)} tokens"
    if a.templates != b.templates:
        yield "templates", list(a.templates), list(b.templates)


def check_compatible(zero_shot: ClipModel, fine_tuned: ClipModel) -> None:
    """Raise if the two differ in anything that decides what their weights mean.

    Activation, heads, image size, preprocessing and vocabulary are compared: they change the function, not the
    shapes, so that weights of one load silently into the other.

    Raises
    ------
    MismatchError
        Naming the first setting that differs and both values.
    """
    found = list(_differences(zero_shot, fine_tuned))
    if found:
        name, first, second = found[0]
        others = f" ({len(found)} settings differ)" if len(found) > 1 else ""
        raise MismatchError(
            f"{name} is {first!r} in {zero_shot.name} but {second!r} in {fine_tuned.name}{others}", _FIX
        )


def pair(
    zero_shot: ClipModel, fine_tuned: ClipModel, classes: Sequence[str]
) -> tuple[ImageClassifier, ImageClassifier, list[str]]:
    """Return both ends of a path as classifiers with one frozen logit scale, and what a result must say about it.

    The scale is the zero-shot model's, as are tokenizer and templates. Each head comes from its own text tower, and
    between the ends the heads themselves are interpolated, not the text towers.

    Raises
    ------
    MismatchError
        See :func:`check_compatible`.
    """
    check_compatible(zero_shot, fine_tuned)
    start, end = zero_shot.classifier(classes), fine_tuned.classifier(classes, like=zero_shot)
    own, taken = (float(model.network.logit_scale.detach().exp()) for model in (fine_tuned, zero_shot))
    notes = []
    if own != taken:
        notes.append(
            f"the logit scale is {taken:.4g} in the zero-shot and {own:.4g} in the fine-tuned model; "
            f"{taken:.4g} is used along the whole path, as curvature grows with its square"
        )
    return start, end, notes
