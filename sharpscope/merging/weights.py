"""Weights on disk: which files hold them, under which keys, read one tensor at a time. Nothing in them is executed."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sharpscope.errors import ModelError, UsageError

# In the order in which transformers and open_clip look for them.
_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net")  # where training loops put the weights
_AGAIN = "copy or save the checkpoint anew"
_DAMAGE = (OSError, ValueError, RuntimeError, EOFError, KeyError, SafetensorError)


@dataclass(frozen=True)
class Spec:
    """What a tensor is, without its numbers."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.shape} {str(self.dtype).removeprefix('torch.')}"


class SafetensorsFile:
    """A safetensors file, opened anew for each tensor so that nothing stays mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, "pt") as file:
                self.metadata: dict[str, str] = file.metadata() or {}
                self.specs = {key: _spec(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
        except _DAMAGE as error:
            raise _damaged(path, error) from error

    def tensor(self, key: str) -> Tensor:
        """Return one tensor; only it is read."""
        with safe_open(self.path, "pt") as file:
            found: Tensor = file.get_tensor(key)
        return found


class TorchFile:
    """What ``torch.save`` wrote, mapped into memory: a page is read when its tensor is.

    Attributes
    ----------
    wrapper
        Key that the weights stand under, None if the file is the state dict itself.
    besides
        Other keys of the file (optimiser, epoch).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        stored = _stored(path)
        self.wrapper = next((key for key in _WRAPPERS if isinstance(stored.get(key), dict)), None)
        weights = stored if self.wrapper is None else stored[self.wrapper]
        self.besides = sorted(str(key) for key in stored) if self.wrapper else []
        self.besides = [key for key in self.besides if key != self.wrapper]
        self._weights = {str(key): value for key, value in weights.items() if isinstance(value, Tensor)}
        if len(self._weights) < len(weights) or not weights:
            odd = next((f"{key!r} is {type(v).__name__}" for key, v in weights.items() if key not in self._weights), "")
            raise ModelError(f"{path} holds no state dict{odd and f': {odd}'}", "torch.save(model.state_dict(), FILE)")
        self.specs = {key: _spec(tensor) for key, tensor in self._weights.items()}

    def tensor(self, key: str) -> Tensor:
        """Return one tensor; only it is read."""
        return self._weights[key].detach()

    def shared(self) -> list[list[str]]:
        """Return the groups of keys that are one tensor under several names."""
        groups: dict[Any, list[str]] = {}
        for key, tensor in self._weights.items():
            if tensor.numel():
                place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
                groups.setdefault(place, []).append(key)
        return [keys for keys in groups.values() if len(keys) > 1]


WeightsFile = SafetensorsFile | TorchFile


def _spec(tensor: Tensor) -> Spec:
    return Spec(tensor.dtype, tuple(tensor.shape))


def _stored(path: Path) -> dict[str, Any]:
    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError):  # the format before torch 1.6 cannot be mapped
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} is a pickled module, not tensors; loading it runs code from the file",
            f"sharpscope convert {path} --unsafe-pickle --out {path.with_suffix('.safetensors').name}   "
            "(only if you trust its source)",
        ) from error
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    if not isinstance(found, dict):
        raise ModelError(
            f"{path} holds a {type(found).__name__}, no state dict", "torch.save(model.state_dict(), FILE)"
        )
    return found


def _damaged(path: Path, error: BaseException) -> ModelError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return ModelError(f"{path} cannot be read: {reason}", _AGAIN)


class Weights:
    """All weights of a checkpoint: a directory, or a single file.

    Attributes
    ----------
    root
        The directory or file, absolute.
    files
        The files of weights, in their order.
    index
        The file that says which shard holds which key, if there are shards.
    """

    def __init__(self, root: Path, paths: list[Path], index: Path | None = None) -> None:
        self.root = root
        self.index = index
        self.files = [SafetensorsFile(p) if p.suffix == ".safetensors" else TorchFile(p) for p in paths]
        self._place: dict[str, WeightsFile] = {}
        for file in self.files:
            for key in file.specs:
                if key in self._place:
                    raise ModelError(f"{key!r} is in {self._place[key].path.name} and in {file.path.name}", _AGAIN)
                self._place[key] = file

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys, file by file."""
        return tuple(self._place)

    def spec(self, key: str) -> Spec:
        """Return dtype and shape of a tensor."""
        return self._place[key].specs[key]

    def tensor(self, key: str) -> Tensor:
        """Return one tensor; only it is read."""
        return self._place[key].tensor(key)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file; of shards, that of their lines ``HASH  NAME`` as the sha256sum command writes them."""
        hashes = {file.path.name: _file_hash(file.path) for file in self.files}
        if len(hashes) == 1:
            return next(iter(hashes.values()))
        return hashlib.sha256("".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(ref: str | Path) -> Weights:
    """Return the weights of a directory, of a single file, or of a hub id that was downloaded before.

    Parameters
    ----------
    ref
        A directory as transformers or open_clip save it (one file or shards), a ``.safetensors`` file, or a state
        dict written by ``torch.save``, also one under ``state_dict`` beside other things. ``hf:`` may precede it.

    Raises
    ------
    UsageError
        If there is nothing.
    ModelError
        If a shard is missing, a file is damaged or is pickled code.
    """
    text = str(ref).removeprefix("hf:")
    place = Path(text).expanduser()
    if place.is_file():
        return Weights(place.resolve(), [place.resolve()])
    if not place.is_dir():
        place = _downloaded(text)
    root = place.resolve()
    found = next((root / name for name in _NAMES if (root / name).is_file()), None) or _only_file(root)
    if found.name.endswith(".index.json"):
        return _sharded(root, found)
    return Weights(root, [found])


def _downloaded(text: str) -> Path:
    missing = UsageError(f"there are no weights at {text!r}", "a directory, or a .safetensors, .pt or .bin file")
    if text.count("/") != 1 or text.startswith((".", "/", "~")) or Path(text).parent.is_dir():
        raise missing
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(text, local_files_only=True))
    except (ImportError, OSError, ValueError) as error:
        raise missing from error


def _only_file(root: Path) -> Path:
    found = sorted(path for path in root.iterdir() if path.suffix in _SUFFIXES and path.is_file())
    if len(found) != 1:
        held = f"{len(found)} files that may be weights ({found[0].name}, ...)" if found else "no file of weights"
        raise ModelError(f"{root} holds {held}", "name the file itself")
    return found[0]


def _sharded(root: Path, index: Path) -> Weights:
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(index, error) from error
    names = list(dict.fromkeys(places.values()))
    if absent := next((name for name in names if not (root / name).is_file()), None):
        count = sum(name == absent for name in places.values())
        raise ModelError(f"{root} lacks the shard {absent}, which holds {count} tensors", "copy the missing file")
    found = Weights(root, [root / name for name in names], index)
    if lost := sorted(places.keys() ^ set(found.keys)):
        raise ModelError(f"{index.name} and the shards of {root} disagree about {lost[0]!r}", _AGAIN)
    return found
