"""Whether two checkpoints on disk belong to one path, and which tensor belongs to which."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from sharpscope.errors import MismatchError, ModelError
from sharpscope.models.transfer import lone_tower, may_be_absent, own_names
from sharpscope.models.weights import Weights
from sharpscope.models.wrappers import AVERAGED

_NOT_SHARED = "the models do not share an architecture: "
_ONE = "two checkpoints of one architecture, saved by the same library"
_RENAMED = (
    "save both in one way; transformers' save_pretrained may write other names than the state dict has in memory: "
    "sharpscope.load(FILE, like=sharpscope.load(DIR)).network.save_pretrained(NEW_DIR)"
)


def partners_of(zero_shot: Weights, fine_tuned: Weights) -> dict[str, str]:
    """Return key in the fine-tuned checkpoint -> key in the zero-shot one.

    The fine-tuned one may hold one tower alone, under the names that its library gives it.

    Raises
    ------
    MismatchError
        If a name, a shape or a kind of number differs between the two; the first is named.
    """
    place = {name: key for key, name in zero_shot.names.items()}
    whole = {stored: name for name, stored in own_names(place, fine_tuned.names.values()).items()}
    tower = lone_tower(whole.values()) if lone_tower(place) is None else None
    besides = may_be_absent(place, tower) if tower else set()  # stays that of the zero-shot model
    # Older versions of transformers saved these indices, newer ones make them; one end alone may be an average.
    may_differ = ("position_ids", AVERAGED)
    odd = sorted(n for n in (place.keys() ^ set(whole.values())) - besides if not n.endswith(may_differ))
    if odd:
        deeper = fine_tuned.inside(place) or zero_shot.inside(whole.values())
        if deeper:
            raise MismatchError(*deeper)
        culprit = zero_shot if odd[0] not in place else fine_tuned
        alike = _shapes(zero_shot) == _shapes(fine_tuned)
        raise MismatchError(
            ("the models have tensors of the same shapes, by other names: " if alike else _NOT_SHARED)
            + f"{len(place)} tensors in {zero_shot.root}, {len(whole)} in {fine_tuned.root}; "
            f"{odd[0]!r} is missing in {culprit.root} ({len(odd)} names differ)",
            _way_out(odd, alike),
        )
    found = {key: place[whole[name]] for key, name in fine_tuned.names.items() if whole[name] in place}
    for key, partner in found.items():
        first, second = zero_shot.spec(partner), fine_tuned.spec(key)
        mixable = first.dtype == second.dtype or (first.dtype.is_floating_point and second.dtype.is_floating_point)
        if first.shape != second.shape or not mixable:
            name = fine_tuned.names[key]
            raise MismatchError(
                f"tensor {name!r} is {first} in {zero_shot.root} but {second} in {fine_tuned.root}", _ONE
            )
    return found


def _shapes(weights: Weights) -> list[tuple[int, ...]]:
    return sorted(weights.spec(key).shape for key in weights.keys)


def _way_out(odd: Sequence[str], alike: bool) -> str:
    if any(name.startswith("visual.") for name in odd) and any(name.startswith("vision_model.") for name in odd):
        return "one is open_clip's, the other transformers': sharpscope convert REF --to transformers --out FILE"
    return _RENAMED if alike else _ONE


# Settings that change the function and no shape: weights of one load silently into the other.
_FUNCTION = ("hidden_act", "num_attention_heads", "layer_norm_eps", "image_size", "patch_size", "quick_gelu", "heads")


def check_configurations(zero_shot: Weights, fine_tuned: Weights) -> None:
    """Raise ``MismatchError`` if the configurations beside the weights differ in what changes the function."""
    first, second = _config(zero_shot), _config(fine_tuned)
    tower = "text_config" if "text" in str(second.get("model_type")) else "vision_config"
    for name, value in second.items():
        other = first.get(name, first.get(f"{tower}.{name}", value))  # one tower's settings have no prefix
        if name.rpartition(".")[2] in _FUNCTION and other != value:
            raise MismatchError(
                f"{name} is {other!r} in {zero_shot.root} but {value!r} in {fine_tuned.root}",
                "a checkpoint and its fine-tuned self, saved with the same configuration",
            )


def _config(weights: Weights) -> dict[str, Any]:
    """Return the configuration beside the weights, flat; empty if there is none."""
    names = ("config.json", "open_clip_config.json")
    file = next((weights.root / n for n in names if weights.root.is_dir() and (weights.root / n).is_file()), None)
    try:
        return {} if file is None else dict(_flat(json.loads(file.read_text(encoding="utf-8")), ""))
    except ValueError as error:
        raise ModelError(f"{file} is no JSON: {error}", "copy the checkpoint anew") from error


def _flat(found: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(found, dict):
        for key, value in found.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, found
