"""What training loops put around weights: keys that a state dict stands under, and parts of names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from sharpscope.errors import ModelError

KEYS = ("state_dict", "model_state_dict", "model", "module", "net")  # a state dict stands under one of these, ...
_INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # ... these are anywhere in a name, ...
# ... and these before every name.
_BEFORE = ("module.", "image_encoder.model.", "base_model.model.", "model.", "clip_model.", "clip.", "backbone.")
HEAD = "classification_head."  # WiSE-FT keeps it beside the model that it wraps
AVERAGED = "n_averaged"  # how many weights torch's AveragedModel has averaged, beside the model that it wraps


def unwrapped(stored: Mapping[Any, Any]) -> tuple[Mapping[Any, Any], tuple[str, ...]]:
    """Return the innermost dictionary and the keys that lead there."""
    path: tuple[str, ...] = ()
    while key := next((key for key in KEYS if isinstance(stored.get(key), dict)), None):
        stored, path = stored[key], (*path, key)
    return stored, path


def bare_names(keys: Iterable[str]) -> dict[str, str]:
    """Return key -> name without what wrappers (DDP, FSDP, compile, PEFT, WiSE-FT, SWA) put before and into it.

    A prefix is taken off only if every key has it, a WiSE-FT head and a counter of averages apart.

    Raises
    ------
    ModelError
        If two keys would have one name.

    Examples
    --------
    >>> bare_names(["module._orig_mod.visual.proj", "module._orig_mod.logit_scale"])["module._orig_mod.visual.proj"]
    'visual.proj'
    """
    names = _peeled_off(keys)
    seen: dict[str, str] = {}
    for key, name in names.items():
        if name in seen:
            raise ModelError(f"{seen[name]!r} and {key!r} are the same tensor {name!r}", "save it once")
        seen[name] = key
    return names


def _peeled_off(keys: Iterable[str]) -> dict[str, str]:
    *_, names = peeled(keys)
    return names


def peeled(keys: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yield key -> name, first as it is, then without one after the other of what wrappers put around it."""
    names = {key: key for key in keys}
    yield names
    names = {key: ".".join(part for part in key.split(".") if part not in _INSIDE) for key in names}
    yield names
    while prefix := next((p for p in _BEFORE if _on_all(p, names.values())), None):
        names = {key: name.removeprefix(prefix) for key, name in names.items()}
        yield names


def _on_all(prefix: str, names: Collection[str]) -> bool:
    inside = [name for name in names if not name.startswith(HEAD) and name != AVERAGED]
    return bool(inside) and all(name.startswith(prefix) for name in inside)


def beneath(own: Collection[str], names: Collection[str]) -> list[str]:
    """Return what stands before all names of a network where a file holds them beside other things.

    >>> beneath(["conv.weight", "fc.weight"], ["criterion.weight", "model.conv.weight", "model.fc.weight"])
    ['model.']
    """
    known, first = set(names), next(iter(own), "")
    found = [name.removesuffix(first) for name in names if first and name.endswith(f".{first}")]
    return [prefix for prefix in found if all(f"{prefix}{name}" in known for name in own)]


def state_dicts(stored: Mapping[Any, Any]) -> dict[tuple[str, ...], Mapping[Any, Any]]:
    """Return what holds tensors alone, numbers among them, by the keys that lead there."""
    found = {}
    for key, value in stored.items():
        inner, path = unwrapped(value) if isinstance(value, dict) else ({}, ())
        tensors = [tensor for tensor in inner.values() if isinstance(tensor, Tensor)]
        if len(tensors) == len(inner) and any(tensor.is_floating_point() for tensor in tensors):
            found[(key, *path)] = inner
    return found


def same_network(first: Iterable[Any], second: Iterable[Any]) -> bool:
    """Return whether two state dicts hold weights of one network, of which one may leave some out."""
    one, other = (set(_peeled_off(map(str, keys)).values()) for keys in (first, second))
    return one <= other or other <= one


def unmerged(names: Iterable[str]) -> str | None:
    """Return the first name of an adapter (PEFT) that is not merged into the weights, None if there is none."""
    return next((name for name in names if "lora_" in name or ".modules_to_save." in name), None)
