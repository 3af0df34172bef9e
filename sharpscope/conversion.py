"""Pickled weights as safetensors."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sharpscope.errors import ModelError, UsageError
from sharpscope.merging.weights import WRAPPERS


def to_safetensors(source: str | Path, out: str | Path, *, unsafe_pickle: bool = False) -> int:
    """Write the weights of a file that ``torch.save`` wrote as safetensors; return the number of tensors.

    Parameters
    ----------
    source
        A state dict, or a pickled module; either alone or under ``state_dict`` beside other things.
    out
        The ``.safetensors`` file. Tied tensors are written under each of their names.
    unsafe_pickle
        Load a pickled module, which **runs code from the file**: only if you trust its source.

    Raises
    ------
    ModelError
        If the file is pickled code and ``unsafe_pickle`` is not set, is damaged, or holds no weights.
    UsageError
        If there is no such file, or something is at ``out``.
    """
    file, target = Path(source), Path(out)
    if not file.is_file():
        raise UsageError(f"there is no file {file}", "what torch.save wrote")
    if target.exists() or target.suffix != ".safetensors":
        problem = "exists already" if target.exists() else "does not end in .safetensors"
        raise UsageError(f"{target} {problem}", "choose another --out")
    weights = dict(_weights(file, _loaded(file, unsafe_pickle)))
    beside = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        save_file(weights, beside, metadata={"format": "pt"})
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
    return len(weights)


def _loaded(file: Path, unsafe_pickle: bool) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=not unsafe_pickle)
    except pickle.UnpicklingError as error:
        if unsafe_pickle:
            raise ModelError(f"{file} cannot be read: {error}", "copy it anew") from error
        raise ModelError(
            f"{file} is a pickled module, not tensors; loading it runs code from the file",
            "--unsafe-pickle (unsafe_pickle=True), only if you trust its source",
        ) from error
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"{file} needs code that is not installed here: {error}", "install what it was made with, or convert there"
        ) from error
    except (OSError, ValueError, RuntimeError, EOFError) as error:
        raise ModelError(f"{file} cannot be read: {error}", "copy it anew") from error


def _weights(file: Path, stored: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(stored, dict):
        stored = next((stored[key] for key in WRAPPERS if isinstance(stored.get(key), dict | nn.Module)), stored)
    found = stored.state_dict() if isinstance(stored, nn.Module) else stored
    if not isinstance(found, dict) or not any(isinstance(value, Tensor) for value in found.values()):
        raise ModelError(f"{file} holds {type(stored).__name__}, no weights", "a module or a state dict")
    # Copies: the format has no tensor under two names.
    yield from (
        (str(key), value.detach().clone().contiguous()) for key, value in found.items() if isinstance(value, Tensor)
    )
