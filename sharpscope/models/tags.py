"""What open_clip's trained weights say of a configuration, where a file of weights does not say it itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sharpscope.models.installed import imported

_FIELDS = ("mean", "std", "interpolation", "resize_mode")  # size comes with the configuration
Kinds = dict[tuple[Any, ...], list[str]]


def preprocessing_of(name: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the preprocessing that most tags of a configuration have, and what must be said if others differ.

    Without tags it is empty: open_clip's default, which its training loop has too.
    """
    found = imported("open_clip")
    kinds: Kinds = {}
    for tag in found.list_pretrained_tags_by_model(name):
        stored = found.get_pretrained_cfg(name, tag) or {}
        kinds.setdefault(tuple(stored.get(field) for field in _FIELDS), []).append(tag)
    if not kinds:
        return {}, ()
    taken = max(kinds, key=lambda kind: len(kinds[kind]))
    agreed = {field: value for field, value in zip(_FIELDS, taken, strict=True) if value is not None}
    return agreed, _of_others(name, kinds, taken)


def _of_others(name: str, kinds: Kinds, taken: tuple[Any, ...]) -> tuple[str, ...]:
    others = [kind for kind in kinds if kind != taken]
    if not others:
        return ()
    differ = [i for i, value in enumerate(taken) if any(kind[i] != value for kind in others)]

    def words(kind: tuple[Any, ...]) -> str:
        return ", ".join(f"{_FIELDS[i]} {kind[i]}" for i in differ)

    but = "; ".join(f"{_few(kinds[kind])} with {words(kind)}" for kind in others)
    return (
        f"a file of {name} does not say its preprocessing: {words(taken)} is assumed, as of {_few(kinds[taken])}, but "
        f"open_clip also has {but}; the other end as a tag or directory would say it",
    )


def activation_of(name: str) -> tuple[str, ...]:
    """Return what must be said where some tags were trained with QuickGELU and the configuration is without.

    open_clip reads a file with the activation of the configuration; nothing in it tells which it was trained with.
    """
    found = imported("open_clip")
    if (found.get_model_config(name) or {}).get("quick_gelu"):
        return ()
    tags = found.list_pretrained_tags_by_model(name)
    quick = [tag for tag in tags if (found.get_pretrained_cfg(name, tag) or {}).get("quick_gelu")]
    if not quick:
        return ()
    other = f"{name}-quickgelu"
    way = f"oc:{other}/FILE" if other in found.list_models() else "a configuration with quick_gelu"
    return (
        f"a file of {name} does not say its activation: GELU is assumed, as open_clip does; {way} if it was made from "
        f"{_few(quick)}, which were trained with QuickGELU",
    )


def _few(tags: Iterable[str]) -> str:
    listed = list(tags)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
