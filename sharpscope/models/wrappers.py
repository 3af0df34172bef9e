"""What training loops put around weights: keys that a state dict stands under, and parts of names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

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
    *_, names = peeled(keys)
    seen: dict[str, str] = {}
    for key, name in names.items():
        if name in seen:
            raise ModelError(f"{seen[name]!r} and {key!r} are the same tensor {name!r}", "save it once")
        seen[name] = key
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


def unmerged(names: Iterable[str]) -> str | None:
    """Return the first name of an adapter (PEFT) that is not merged into the weights, None if there is none."""
    return next((name for name in names if "lora_" in name or ".modules_to_save." in name), None)
