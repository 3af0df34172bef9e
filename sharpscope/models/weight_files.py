"""One file of weights, of safetensors or of torch, read one tensor at a time. Nothing in it is executed."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sharpscope.errors import ModelError
from sharpscope.models.installed import first_line
from sharpscope.models.wrappers import KEYS, same_network, state_dicts, unwrapped

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
AGAIN = "copy or save the checkpoint anew"
UNREADABLE = (
    OSError,
    ValueError,
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    SafetensorError,
    pickle.UnpicklingError,
)
AGAIN_LOADED = "load the weights into the model before they are saved"
STATE_DICT = "torch.save(model.state_dict(), FILE)"


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
    """A safetensors file, of which nothing stays mapped or open; nothing is around its weights."""

    wrappers: tuple[str, ...] = ()
    twins: Sequence[tuple[str, ...]] = ()

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, "pt") as file:
                self.metadata: dict[str, str] = file.metadata() or {}
                self.specs = {key: _spec(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
            self._starts = _starts(path)
        except UNREADABLE as error:
            _check_suffix(path, error)
            raise damaged(path, error) from error

    def tensor(self, key: str) -> Tensor:
        """Return one tensor; only it is read."""
        # Not by the library: it reads the whole header whenever a file is opened, 6 ms where it names 6,000 tensors.
        spec = self.specs[key]
        found = torch.empty(spec.nbytes, dtype=torch.uint8)
        with self.path.open("rb") as file:
            file.seek(self._starts[key])
            if spec.nbytes and file.readinto(found.numpy().data) < spec.nbytes:
                raise damaged(self.path, EOFError(f"it ends within {key!r}"))
        return found.view(spec.dtype).reshape(spec.shape)


def _starts(path: Path) -> dict[str, int]:
    """Return where each tensor begins: the length of the header in 8 bytes, the header as JSON, then the data."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {key: 8 + length + about["data_offsets"][0] for key, about in header.items() if key != "__metadata__"}


class TorchFile:
    """What ``torch.save`` wrote, mapped into memory: a page is read when its tensor is.

    Attributes
    ----------
    wrappers
        Keys that lead to the weights, from outside; none if the file is the state dict itself.
    besides
        Other keys that stand beside one of these (optimiser, epoch).
    twins
        Keys that lead to other weights of the same network: their moving average.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        stored = _unpickled(path)
        weights, self.wrappers = unwrapped(stored)
        self.besides: list[str] = []
        self.twins: list[tuple[str, ...]] = []
        for depth, wrapper in enumerate(self.wrappers):
            self.besides += sorted(str(key) for key in stored if key != wrapper)
            beside = state_dicts({key: value for key, value in stored.items() if key != wrapper})
            self.twins += [(*self.wrappers[:depth], *p) for p, t in beside.items() if same_network(t, weights)]
            stored = stored[wrapper]
        if not weights or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
            raise _no_state_dict(path, weights, self.wrappers)
        self._weights: dict[str, Tensor] = {str(key): tensor for key, tensor in weights.items()}
        _check_plain(path, self._weights)
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


def _no_state_dict(path: Path, stored: Mapping[Any, Any], wrappers: tuple[str, ...]) -> ModelError:
    if found := list(state_dicts(stored)):
        places = ", ".join(repr(keys[0]) for keys in found)
        return ModelError(
            f"{path} holds state dicts under {places}, and none under {', '.join(KEYS)}",
            extraction(path, (*wrappers, *found[0])),
        )
    odd = next((f"{k!r} is a {type(v).__name__}" for k, v in stored.items() if not isinstance(v, Tensor)), None)
    return ModelError(f"{path} holds no state dict ({odd or 'it is empty'})", STATE_DICT)


def _check_plain(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Raise if a tensor does not lie in memory entry by entry."""
    for key, tensor in weights.items():
        if tensor.is_meta:
            raise ModelError(f"{path} holds no values of {key!r}: it was saved from the device 'meta'", AGAIN_LOADED)
        if tensor.layout != torch.strided:
            raise ModelError(
                f"{path} holds {key!r} as a sparse tensor ({tensor.layout})", "tensor.to_dense() before it is saved"
            )


def extraction(path: Path, keys: Sequence[Any] = (), prefix: str = "") -> str:
    """Return the line that saves a part of a file: what these keys lead to, of it what this prefix stands before."""
    safe = path.suffix == ".safetensors"
    needs_code = not safe and is_pickled_code(path, passing_over=False)
    found = (
        f"safetensors.torch.load_file({str(path)!r})"
        if safe
        else f"torch.load({str(path)!r}, weights_only={not needs_code})" + "".join(f"[{key!r}]" for key in keys)
    )
    if prefix:
        inside = f"k.removeprefix({prefix!r}): v for k, v in {found}.items() if k.startswith({prefix!r})"
        found = f"{{{inside}}}"
    line = f"safetensors.torch.save_file({found}, 'NEW.safetensors')" if safe else f"torch.save({found}, 'NEW.pt')"
    return f"{line}   # only if you trust its source: it holds more than tensors" if needs_code else line


def _spec(tensor: Tensor) -> Spec:
    return Spec(tensor.dtype, tuple(tensor.shape))


def damaged(place: Path, error: BaseException) -> ModelError:
    """Return the error of a file that cannot be read."""
    return ModelError(f"{place} cannot be read: {first_line(error)}", AGAIN)


def _check_suffix(file: Path, error: BaseException) -> None:
    """Raise if the file is of the other format than its name says, which decides how it is read."""
    if not file.is_file():
        return
    with file.open("rb") as opened:
        head = opened.read(9)
    named = file.suffix == ".safetensors"
    if named and head.startswith((b"PK\x03\x04", b"\x80")):
        raise ModelError(
            f"{file} is no safetensors file, it begins as what torch.save writes", f"name it {file.stem}.pt"
        ) from error
    if not named and head[8:] == b"{":  # the length of a header in JSON, then the header
        raise ModelError(
            f"{file} is a safetensors file, its name says what torch.save writes", f"name it {file.stem}.safetensors"
        ) from error


class _Besides:
    """Stands for a number of numpy's, so that no code of numpy's is run for it."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _passed_over(module: str, name: str) -> type:
    return type(name, (_Besides,), {"__module__": module})


_NUMPY = [
    _passed_over("numpy._core.multiarray", "scalar"),
    _passed_over("numpy.core.multiarray", "scalar"),
    _passed_over("numpy", "dtype"),
]


def _loaded(file: Path, device: str, *, mapped: bool) -> Any:
    """Return what ``torch.save`` wrote, if it needs no code but what training loops put beside weights.

    That is ``argparse.Namespace``, and numpy's scalars, such as a best accuracy, which are passed over.
    """
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace, *_NUMPY]):
        warnings.simplefilter("ignore", UserWarning)  # that a file is of an unusual pickle protocol
        return torch.load(file, map_location=device, weights_only=True, mmap=mapped)


def _unpickled(file: Path) -> dict[str, Any]:
    try:
        try:  # mapped: a page is read when its tensor is
            found = _loaded(file, "cpu", mapped=True)
        except (RuntimeError, ValueError):  # the format before torch 1.6 cannot be mapped
            found = _loaded(file, "cpu", mapped=False)
    except pickle.UnpicklingError as error:
        _check_suffix(file, error)
        with file.open("rb") as opened:
            head = opened.read(16)
        if not head.startswith((b"\x80", b"PK")) and "GLOBAL" not in str(error):
            raise ModelError(f"{file} is no file of weights, it begins with {head!r}", STATE_DICT) from error
        raise _pickled(file, error) from error
    except UNREADABLE as error:
        if "TorchScript" in str(error):
            raise ModelError(
                f"{file} is a TorchScript archive, a program, as OpenAI's original files are",
                "oc:NAME/openai; or, if you trust its source: torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)",
            ) from error
        _check_suffix(file, error)
        raise damaged(file, error) from error
    if not isinstance(found, dict):
        raise ModelError(f"{file} holds a {type(found).__name__}, no state dict", STATE_DICT)
    return found


def is_pickled_code(file: Path, *, passing_over: bool = True) -> bool:
    """Return whether loading the file would run code from it, without running any.

    What training loops put beside weights counts as none where it is passed over, as it is here and not by torch.
    """
    try:
        if passing_over:
            _loaded(file, "meta", mapped=False)
        else:
            torch.load(file, map_location="meta", weights_only=True)
    except pickle.UnpicklingError:
        return True
    except UNREADABLE:
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
