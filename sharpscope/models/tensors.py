"""Weights on disk: one file, shards, or what a training loop wrapped around them. Nothing in them is executed."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sharpscope.errors import ModelError
from sharpscope.models.installed import first_line

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_FILES = (  # in the order in which the libraries look for them
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
_KEYS = ("state_dict", "model_state_dict", "model", "module", "net")  # where training loops put the weights
_INSIDE = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_BEFORE = ("module.", "image_encoder.model.", "base_model.model.", "model.")
HEAD = "classification_head."  # WiSE-FT keeps it beside the model that it wraps
_UNREADABLE = (
    OSError,
    ValueError,
    RuntimeError,
    EOFError,
    KeyError,
    TypeError,
    SafetensorError,
    pickle.UnpicklingError,
)
_AGAIN = "copy or save the checkpoint anew"


class Tensors(Mapping[str, Tensor]):
    """Tensors of a checkpoint, each read when it is asked for, by their names without what wrappers put before them.

    Attributes
    ----------
    where
        The directory or file.
    """

    def __init__(self, where: Path, readers: Mapping[str, Callable[[], Tensor]]) -> None:
        self.where = where
        self._readers = {bare: readers[key] for key, bare in bare_names(readers).items()}
        _check_merged(where, self._readers)

    def __getitem__(self, name: str) -> Tensor:
        read = self._readers[name]
        try:
            return read()
        except _UNREADABLE as error:
            raise ModelError(f"{self.where}: {name!r} cannot be read: {first_line(error)}", _AGAIN) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def __len__(self) -> int:
        return len(self._readers)


class Renamed(Mapping[str, Tensor]):
    """Some tensors of a mapping under other names, still read one at a time.

    Parameters
    ----------
    tensors
        Where they are.
    names
        New name -> name there.
    """

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __len__(self) -> int:
        return len(self._names)


def without_head(tensors: Mapping[str, Tensor]) -> Renamed:
    """Return the tensors without a WiSE-FT head."""
    return Renamed(tensors, {name: name for name in tensors if not name.startswith(HEAD)})


def stored_head(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None] | None:
    """Return weight and bias of a WiSE-FT head, None if there is none."""
    return (tensors[f"{HEAD}weight"], tensors.get(f"{HEAD}bias")) if f"{HEAD}weight" in tensors else None


def bare_names(keys: Iterable[str]) -> dict[str, str]:
    """Return key -> name without what DDP, FSDP, compile, PEFT and WiSE-FT put before and into it.

    A prefix is taken off if every key has it, a WiSE-FT head apart.

    >>> bare_names(["module._orig_mod.visual.proj", "module._orig_mod.logit_scale"])["module._orig_mod.visual.proj"]
    'visual.proj'
    """
    names = {key: ".".join(part for part in key.split(".") if part not in _INSIDE) for key in keys}
    while prefix := next((prefix for prefix in _BEFORE if _on_all(prefix, names.values())), None):
        names = {key: name.removeprefix(prefix) for key, name in names.items()}
    return names


def _on_all(prefix: str, names: Collection[str]) -> bool:
    inside = [name for name in names if not name.startswith(HEAD)]
    return bool(inside) and all(name.startswith(prefix) for name in inside)


def _check_merged(where: Path, names: Iterable[str]) -> None:
    if lora := next((name for name in names if "lora_" in name or ".modules_to_save." in name), None):
        raise ModelError(
            f"{where} holds LoRA adapters that are not merged into the weights ({lora}, ...)",
            "merge them where it was trained: model.merge_and_unload().save_pretrained(DIR)",
        )


def read_tensors(where: Path, *, first: str = "") -> Tensors:
    """Return the tensors of a directory as transformers, open_clip and timm write it, or of a single file.

    Parameters
    ----------
    where
        The directory or file.
    first
        How names of files begin that are preferred: a directory may hold a model for two libraries.

    Raises
    ------
    ModelError
        If there are no weights, a shard is missing, a file is damaged or pickled code, or holds unmerged adapters.
    """
    if where.is_file():
        return Tensors(where, _readers(where))
    if (where / "adapter_config.json").is_file():
        raise ModelError(
            f"{where} holds LoRA adapters that are not merged into the weights (adapter_config.json)",
            "merge them where it was trained: model.merge_and_unload().save_pretrained(DIR)",
        )
    for name in sorted(_FILES, key=lambda name: not (first and name.startswith(first))):
        if (where / name).is_file():
            return Tensors(where, _readers(where / name))
        if (where / f"{name}.index.json").is_file():
            return Tensors(where, _shards(where / f"{name}.index.json"))
    raise ModelError(f"{where} holds no weights ({', '.join(_FILES)})", "save the model there, or give its file")


def _readers(file: Path) -> dict[str, Callable[[], Tensor]]:
    return _safe(file) if file.suffix == ".safetensors" else _saved_by_torch(file)


def _safe(file: Path) -> dict[str, Callable[[], Tensor]]:
    try:
        with safe_open(file, "pt") as stored:
            keys = list(stored.keys())
    except _UNREADABLE as error:
        raise ModelError(f"{file} cannot be read: {first_line(error)}", _AGAIN) from error

    def reader(key: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            with safe_open(file, "pt") as stored:
                found: Tensor = stored.get_tensor(key)
            return found

        return read

    return {key: reader(key) for key in keys}


def _shards(index: Path) -> dict[str, Callable[[], Tensor]]:
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{index} is no index of shards: {first_line(error)}", _AGAIN) from error
    found: dict[str, Callable[[], Tensor]] = {}
    for shard in dict.fromkeys(places.values()):
        if not (index.parent / shard).is_file():
            absent = sum(place == shard for place in places.values())
            raise ModelError(f"{index.parent} lacks the shard {shard} with {absent} tensors", "copy it there, too")
        found |= _readers(index.parent / shard)
    if lost := places.keys() - found.keys():
        raise ModelError(f"the shards of {index} lack {min(lost)!r} ({len(lost)} tensors)", _AGAIN)
    return found


def _saved_by_torch(file: Path) -> dict[str, Callable[[], Tensor]]:
    stored = _unpickled(file)
    while wrapper := next((key for key in _KEYS if isinstance(stored.get(key), dict)), None):
        stored = stored[wrapper]
    odd = next((f"{key!r} is a {type(v).__name__}" for key, v in stored.items() if not isinstance(v, Tensor)), None)
    if odd or not stored:
        raise ModelError(f"{file} holds no state dict ({odd or 'it is empty'})", "torch.save(model.state_dict(), FILE)")
    return {str(key): tensor.detach for key, tensor in stored.items()}


def _loaded(file: Path, device: str, *, mapped: bool) -> Any:
    """Return what ``torch.save`` wrote, if it needs no code but ``argparse.Namespace``, which training loops put in."""
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
        warnings.simplefilter("ignore", UserWarning)  # that a file is of an unusual pickle protocol
        return torch.load(file, map_location=device, weights_only=True, mmap=mapped)


def _unpickled(file: Path) -> dict[str, Any]:
    try:
        try:  # mapped: a page is read when its tensor is
            found = _loaded(file, "cpu", mapped=True)
        except (RuntimeError, ValueError):  # the format before torch 1.6 cannot be mapped
            found = _loaded(file, "cpu", mapped=False)
    except pickle.UnpicklingError as error:
        raise _pickled(file, error) from error
    except _UNREADABLE as error:
        if "TorchScript" in str(error):
            raise ModelError(
                f"{file} is a TorchScript archive, a program, as OpenAI's original files are",
                "oc:NAME/openai; or, if you trust its source: torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)",
            ) from error
        raise ModelError(f"{file} cannot be read: {first_line(error)}", _AGAIN) from error
    if not isinstance(found, dict):
        raise ModelError(
            f"{file} holds a {type(found).__name__}, no state dict", "torch.save(model.state_dict(), FILE)"
        )
    return found


def is_pickled_code(file: Path) -> bool:
    """Return whether loading the file would run code from it, without running any."""
    try:
        _loaded(file, "meta", mapped=False)
    except pickle.UnpicklingError:
        return True
    except _UNREADABLE:
        return False
    return False


def _pickled(file: Path, error: BaseException) -> ModelError:
    needed = re.search(r"GLOBAL (\S+)", str(error))
    return ModelError(
        f"{file} is a pickled module, not tensors; loading it would run code from the file"
        + (f" (it calls {needed[1]})" if needed else ""),
        f"sharpscope convert {file} --unsafe-pickle --out {file.with_suffix('.safetensors').name}   "
        "(only if you trust its source), or save it where it was trained: torch.save(model.state_dict(), FILE)",
    )
