"""Weights rewritten: out of a pickled module, or under the names of another library."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from sharpscope.errors import ModelError, OutputError, UsageError
from sharpscope.models.conversion import CONVERSIONS
from sharpscope.models.installed import first_line
from sharpscope.models.tensors import read_tensors
from sharpscope.models.transfer import library_of
from sharpscope.models.wrappers import KEYS


def convert(source: Path, out: Path, *, to: str | None = None, unsafe_pickle: bool = False) -> int:
    """Write the weights of a checkpoint to a safetensors file; return how many tensors it holds.

    Parameters
    ----------
    source
        A file or directory of weights.
    out
        A ``.safetensors`` file; written beside and renamed, so that it is whole or not there.
    to
        ``"open_clip"`` or ``"transformers"``: the names of that library; exact, for CLIPs of two ViTs.
    unsafe_pickle
        Unpickle a whole module, which runs code from the file.

    Raises
    ------
    UsageError
        If there is no source, or something is at ``out``.
    ModelError
        If the source cannot be read, or is code and ``unsafe_pickle`` is not set.
    OutputError
        If ``out`` cannot be written.
    """
    if not source.exists():
        raise UsageError(f"there is no file {source}", "a file or directory of weights")
    if not out.name:
        raise UsageError(f"--out {out} names no file", "--out FILE.safetensors")
    if out.suffix != ".safetensors":
        raise UsageError(f"--out {out} is no .safetensors file", f"--out {out.with_suffix('.safetensors')}")
    if out.exists():
        raise UsageError(f"{out} exists", "choose another --out, or remove it")
    if to is not None and to not in CONVERSIONS:
        raise UsageError(f"--to {to} is no library", f"one of {', '.join(CONVERSIONS)}")
    if unsafe_pickle and source.is_dir():
        raise UsageError(f"{source} is a folder, and one file is unpickled", f"name the file, as {source}/model.pt")
    weights: Mapping[str, Tensor] = _unpickled(source) if unsafe_pickle else read_tensors(source)
    if to is not None and library_of(weights)[0] != to:
        weights = CONVERSIONS[to](weights)
    # Tensors that share memory would be refused.
    _write({name: weights[name].clone().contiguous() for name in weights}, out)
    return len(weights)


def _write(weights: dict[str, Tensor], out: Path) -> None:
    beside = out.with_name(f"{out.name}.{os.getpid()}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, beside, metadata={"format": "pt"})
        beside.replace(out)
    except (OSError, SafetensorError) as error:  # the library has its own word for a full disk
        raise OutputError(f"{out} cannot be written: {error}", "make room, or choose another --out") from error
    finally:
        with suppress(OSError):
            beside.unlink()


def _unpickled(source: Path) -> Mapping[str, Tensor]:
    try:
        found: Any = torch.load(source, map_location="cpu", weights_only=False)
    except Exception as error:
        raise ModelError(
            f"{source} cannot be unpickled: {first_line(error)}",
            "its classes must be importable here: run it where the model was trained",
        ) from error
    if isinstance(found, nn.Module):
        return found.state_dict()
    inner = next((found[key] for key in KEYS if isinstance(found, dict) and key in found), found)
    inner = inner.state_dict() if isinstance(inner, nn.Module) else inner
    if not isinstance(inner, dict) or not all(isinstance(tensor, Tensor) for tensor in inner.values()):
        raise ModelError(f"{source} holds a {type(found).__name__}, no weights", "a pickled module or state dict")
    return inner
