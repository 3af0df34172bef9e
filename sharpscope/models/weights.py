"""Weights on disk: which files hold them, under which keys, read one tensor at a time. Nothing in them is executed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from functools import cached_property
from pathlib import Path

from torch import Tensor

from sharpscope.errors import ModelError, UsageError
from sharpscope.models.installed import first_line
from sharpscope.models.reference import FORMS, parsed
from sharpscope.models.weight_files import (
    AGAIN,
    STATE_DICT,
    SUFFIXES,
    UNREADABLE,
    SafetensorsFile,
    Spec,
    TorchFile,
    WeightsFile,
    extraction,
)
from sharpscope.models.wrappers import bare_names, beneath, unmerged

_NAMES = (  # in the order in which the libraries look for them
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
_OF_TRAINER = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")  # beside the weights


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
                    raise ModelError(f"{key!r} is in {self._place[key].path.name} and in {file.path.name}", AGAIN)
                self._place[key] = file

        if adapter := unmerged(self._place):
            raise _adapters(root, adapter)

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys, file by file."""
        return tuple(self._place)

    def spec(self, key: str) -> Spec:
        """Return dtype and shape of a tensor."""
        return self._place[key].specs[key]

    def tensor(self, key: str) -> Tensor:
        """Return one tensor; only it is read."""
        try:
            return self._place[key].tensor(key)
        except UNREADABLE as error:
            raise ModelError(f"{self.root}: {key!r} cannot be read: {first_line(error)}", AGAIN) from error

    @cached_property
    def names(self) -> dict[str, str]:
        """Key -> name without what wrappers put around it, see :func:`~sharpscope.models.wrappers.bare_names`."""
        return bare_names(self.keys)

    @property
    def notes(self) -> tuple[str, ...]:
        """What must be said of the choice of these weights among others in the same file."""
        return tuple(
            f"{file.path} holds weights of the same network under {'/'.join(keys)}, too; those under "
            f"{'/'.join(file.wrappers)} are used. To use the others: {extraction(file.path, keys)}"
            for file in self.files
            for keys in file.twins
        )

    def inside(self, own: Collection[str]) -> tuple[str, str] | None:
        """Return a problem and the way out if all names of a network stand here, but deeper and beside others."""
        names = self.names.values()
        if not (found := beneath(own, names)):
            return None
        others = [name for name in names if not name.startswith(tuple(found))]
        besides = f", and besides {', '.join(others[:3])}{', ...' if others[3:] else ''}" if others else ""
        file = self.files[0]
        return (
            f"{self.root} holds the weights under {' and under '.join(map(repr, found))}{besides}",
            extraction(file.path, file.wrappers, found[0]) if len(self.files) == 1 else STATE_DICT,
        )

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
    """Return the weights that a reference of :func:`sharpscope.load` means, without a model around them.

    Parameters
    ----------
    ref
        A directory, a file, ``oc:NAME/FILE``, ``timm:NAME/FILE``, ``oc:DIR``, or a hub id that was downloaded before.

    Raises
    ------
    UsageError
        If there is nothing, or it is a name and not a file.
    ModelError
        See :func:`weights_at`.
    """
    reference = parsed(ref)
    if reference.kind == "hub":
        return weights_at(_downloaded(reference.name))
    place = reference.file if reference.kind in ("oc", "timm") else reference.path
    if place is None or reference.kind == "py":
        raise UsageError(f"{str(ref)!r} names no file of weights", FORMS)
    return weights_at(place, first="open_clip_" if reference.weights == "oc" else "")


def weights_at(place: Path, *, first: str = "") -> Weights:
    """Return the weights of a directory or of a single file.

    Parameters
    ----------
    place
        A directory as transformers, open_clip or timm save it (one file or shards), a ``.safetensors`` file, or a
        state dict written by ``torch.save``, also one under ``state_dict`` beside other things.
    first
        How names of files begin that are preferred: a directory may hold a model for two libraries.

    Raises
    ------
    ModelError
        If a shard is missing, a file is damaged or pickled code, or holds adapters that are not merged.
    """
    root = place.absolute()  # not resolved: the hub's files are links to files without an ending
    if root.is_file():
        return Weights(root, [root])
    if (root / "adapter_config.json").is_file():
        raise _adapters(root, "adapter_config.json")
    for name in sorted(_NAMES, key=lambda name: not (first and name.startswith(first))):
        if (root / name).is_file():
            return Weights(root, [root / name])
        if (root / f"{name}.index.json").is_file():
            return _sharded(root, root / f"{name}.index.json")
    return Weights(root, [_only_file(root)])


def _adapters(root: Path, found: str) -> ModelError:
    return ModelError(
        f"{root} holds LoRA adapters that are not merged into the weights ({found})",
        "merge them where it was trained: model.merge_and_unload().save_pretrained(DIR)",
    )


def _downloaded(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, local_files_only=True))
    except (ImportError, OSError, ValueError) as error:
        raise UsageError(f"there are no weights at {name!r}", FORMS) from error


def _only_file(root: Path) -> Path:
    candidates = (path for path in root.iterdir() if path.suffix in SUFFIXES and not path.name.startswith(_OF_TRAINER))
    found = sorted(path for path in candidates if path.is_file())
    if not found:
        raise ModelError(f"{root} holds no weights ({', '.join(_NAMES)})", "save the model there, or give its file")
    if len(found) > 1:
        raise ModelError(
            f"{root} holds {len(found)} files that may be weights ({found[0].name}, ...)", "name the file itself"
        )
    return found[0]


def _sharded(root: Path, index: Path) -> Weights:
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = list(dict.fromkeys(places.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is no index of shards: {first_line(error)}", AGAIN) from error
    if absent := next((name for name in names if not (root / name).is_file()), None):
        count = sum(name == absent for name in places.values())
        raise ModelError(f"{root} lacks the shard {absent} with {count} tensors", "copy it there, too")
    found = Weights(root, [root / name for name in names], index)
    if lost := sorted(places.keys() - set(found.keys)):
        raise ModelError(f"the shards of {index} lack {lost[0]!r} ({len(lost)} tensors)", AGAIN)
    if odd := sorted(set(found.keys) - places.keys()):
        raise ModelError(f"{index} lacks {odd[0]!r}, which a shard holds ({len(odd)} tensors)", AGAIN)
    return found
