"""The weights that training stays near: matched to parameters by name, verified by hash."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sharpscope.errors import MismatchError, UsageError
from sharpscope.optim import shards

Source = nn.Module | Mapping[str, Tensor] | Literal["init"] | None
Parameters = Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]

# What wrappers put into names: DDP, torch.compile, FSDP, activation checkpointing, PEFT.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PEFT = "base_model.model."
ZEROS = "zeros"


@cache  # asked for every parameter in every step
def plain_name(name: str) -> str:
    """Return the name as the model had it before it was wrapped.

    >>> plain_name("module._orig_mod.head.weight"), plain_name("base_model.model.fc.lora_A.default.weight")
    ('head.weight', 'fc.lora_A.default.weight')
    """
    return _WRAPPERS.sub("", name).removeprefix(_PEFT)


def excluded(name: str, patterns: Sequence[str]) -> bool:
    """Return whether one of the regular expressions (a substring is one) is found in the name."""
    return any(re.search(pattern, name) for pattern in patterns)


def checked_patterns(exclude: str | Iterable[str]) -> tuple[str, ...]:
    """Return the patterns; ``UsageError`` if one is no regular expression."""
    if not isinstance(exclude, Iterable):
        raise UsageError(f"exclude={exclude!r}", "regular expressions: exclude=['head', 'logit_scale'], or [] for none")
    found = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    for pattern in found:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as problem:
            raise UsageError(f"exclude={pattern!r} is no regular expression: {problem}", "escape it") from problem
    return found


def tensors_of(source: Source) -> Mapping[str, Tensor]:
    """Return the tensors of a module or mapping by plain name.

    Raises
    ------
    UsageError
        If it is neither, or a tensor is not floating point.
    """
    named = dict(source.named_parameters(remove_duplicate=False)) if isinstance(source, nn.Module) else source
    if not isinstance(named, Mapping):
        raise UsageError(f"anchor={source!r}", "a module, a mapping name -> tensor, 'init', or None for zeros")
    return {plain_name(name): tensor for name, tensor in named.items()}


def found_for(name: str, parameter: Tensor, source: Source) -> Tensor | None:
    """Return the anchor of one parameter as the source has it, None for zeros.

    Raises
    ------
    MismatchError
        If the source has no such tensor or one of another shape.
    """
    if source is None:
        return None
    if isinstance(source, str):
        if source != "init":
            raise UsageError(f"anchor={source!r}", "a module, a mapping name -> tensor, 'init', or None for zeros")
        return parameter.detach()
    tensor = source.get(name) if isinstance(source, Mapping) else None
    if tensor is None:
        raise MismatchError(
            f"parameter {name!r} has no anchor",
            f"exclude=[{name!r}] if it is new, or an anchor that holds it",
        )
    if not isinstance(tensor, Tensor):
        raise MismatchError(f"the anchor of {name!r} is a {type(tensor).__name__}", "tensors of torch")
    if tensor.shape != parameter.shape:
        raise MismatchError(
            f"parameter {name!r} is {tuple(parameter.shape)}, its anchor {tuple(tensor.shape)}",
            "the zero-shot weights of this very model, or exclude it",
        )
    if not tensor.is_floating_point():
        raise MismatchError(f"the anchor of {name!r} is {tensor.dtype}", "floating-point weights")
    return tensor.detach()


def placed(source: Tensor, parameter: Tensor) -> Tensor:
    """Return a copy with device, dtype, strides and sharding of the parameter."""
    part = shards.split_like(source, parameter)
    return torch.empty_like(shards.local(parameter), requires_grad=False).copy_(part)


def digest(source: Tensor | None) -> str:
    """Return a hash of shape and values: the same on every device, sharding and dtype that holds the values exactly."""
    if source is None:
        return ZEROS
    values = shards.whole(source).detach().cpu()
    single = values.float()
    if values.dtype != torch.float64 or torch.equal(single.double(), values):
        values = single
    flat = values.contiguous().reshape(-1)
    found = hashlib.sha256(f"{tuple(source.shape)}".encode())
    found.update(flat.numpy().data)
    return found.hexdigest()


def joint_digest(digests: Mapping[str, str]) -> str:
    """Return one hash of all names and their hashes."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()
