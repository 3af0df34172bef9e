"""A merged checkpoint in the layout of the fine-tuned one, written beside and then put in place in one step."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sharpscope.errors import SharpscopeError, UsageError
from sharpscope.home import at_home
from sharpscope.merging.plan import MergePlan
from sharpscope.models.weight_files import SafetensorsFile, TorchFile, WeightsFile
from sharpscope.recipe_file import NAME, RecipeFile, write_recipe
from sharpscope.storage import check_writable

# Configuration, tokenizer and preprocessing; not the weights, nor what a training run tells about itself.
_COPIED = (".json", ".txt", ".model", ".jinja", ".gz")
_NOT_COPIED = ("trainer_state.json", "_results.json", ".index.json")
_SPARE = 1 << 20  # bytes beside the tensors: headers, configuration

Tensors = Callable[[str], Tensor]


def write_merge(plan: MergePlan, out: str | Path, stored: RecipeFile, *, overwrite: bool = False) -> Path:
    """Write the merged checkpoint and its recipe; return ``out``.

    Parameters
    ----------
    plan
        What is written.
    out
        A directory if the fine-tuned checkpoint is one, else a file; it appears whole or not at all. The recipe is
        ``recipe.toml`` in the directory, ``OUT.recipe.toml`` beside a file.
    stored
        The recipe with what is known of it.
    overwrite
        Replace a merge that is there already, and a recipe beside a file; anything else is never replaced.

    Raises
    ------
    UsageError
        If something is at ``out`` or where its recipe goes, or it is one of the sources.
    SharpscopeError
        If it cannot be written there.
    """
    target = check_output(plan, out, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _published(target) as beside:
            if plan.fine_tuned.root.is_dir():
                _write_directory(plan, beside, stored)
            else:
                _write_file(plan, plan.fine_tuned.files[0], beside)
                write_recipe(stored, _recipe_place(beside))  # now: the disk may have room for the weights only
                # A kill between the two files leaves no recipe rather than one of other weights.
                _recipe_place(target).unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(target, error) from error
    return Path(out)


def check_output(plan: MergePlan, out: str | Path, *, overwrite: bool = False) -> Path:
    """Return the absolute place of a merge, after what :func:`write_merge` refuses; nothing is left there."""
    target = Path(os.path.abspath(at_home(out)))  # noqa: PTH100  # not through links: they would be replaced
    try:
        _check_target(plan, target, overwrite)
        _check_room(plan, target, check_writable(target.parent))
    except OSError as error:
        raise _unwritable(target, error) from error
    return target


def _unwritable(target: Path, error: OSError) -> SharpscopeError:
    return SharpscopeError(
        f"the merge cannot be written to {target}: {error.strerror or error}", "choose another --out"
    )


def _recipe_place(target: Path) -> Path:
    # The whole name: mix.recipe.toml is what people call their own, and model.pt is not model.safetensors.
    return target.with_name(f"{target.name}.{NAME}")


def _check_target(plan: MergePlan, target: Path, overwrite: bool) -> None:
    _check_name(target)
    _check_sources(plan, target)
    source, exists = plan.fine_tuned.root, os.path.lexists(target)
    if not exists and not source.is_dir() and target.suffix != source.suffix:
        raise UsageError(
            f"{target} has not the ending of {source.name}, whose format it gets",
            f"--out {target.with_suffix(source.suffix).name}",
        )
    places = [target] if source.is_dir() else [target, _recipe_place(target)]
    taken = next((place for place in places if os.path.lexists(place)), None)
    if taken and not overwrite:
        raise UsageError(f"{taken} exists already", "--overwrite (overwrite=True) replaces it, or choose another --out")
    is_merge = (target / NAME).is_file() if target.is_dir() else _recipe_place(target).is_file()
    if exists and (not is_merge or target.is_dir() != source.is_dir()):
        raise UsageError(f"{target} is no merge that was written before; it is not replaced", "choose another --out")


def _check_name(target: Path) -> None:
    """Raise for a name that safetensors cannot open what was written by."""
    try:
        str(target).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{str(target)!r} is no UTF-8, which names of weights are", "choose another --out") from error


def _check_sources(plan: MergePlan, target: Path) -> None:
    """Raise if writing would change a source, whether it is named itself or through a link."""
    place = target.resolve()
    for weights in (plan.zero_shot, plan.fine_tuned):
        for source in (weights.root, *(file.path for file in weights.files)):
            if any(place == p or place in p.parents or p in place.parents for p in (source, source.resolve())):
                raise UsageError(f"{target} is, holds or lies in {source}, which is merged", "choose another --out")


def _check_room(plan: MergePlan, target: Path, there: Path) -> None:
    free, needed = (
        shutil.disk_usage(there).free,
        (1 + isinstance(plan.fine_tuned.files[0], TorchFile)) * plan.nbytes + _SPARE,
    )
    if free < needed:
        raise SharpscopeError(
            f"{target.parent} has {free / 1e6:,.0f} MB left, the merge takes {needed / 1e6:,.0f} MB",
            "make room, or choose another --out",
        )


@contextmanager
def _published(target: Path) -> Iterator[Path]:
    """Give a place beside the target; what was made there takes the target's place at the end, or is removed."""
    beside = target.with_name(f"{target.name}.{os.getpid()}.part")
    _remove(beside)  # of a killed process that had this number
    try:
        yield beside
        if target.is_dir():
            _exchange(beside, target)
        else:
            beside.replace(target)
            if _recipe_place(beside).exists():
                _recipe_place(beside).replace(_recipe_place(target))
    finally:
        _remove(beside)
        _recipe_place(beside).unlink(missing_ok=True)


def _remove(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():  # a link that was replaced: rmtree refuses it
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)


def _exchange(new: Path, old: Path) -> None:
    """Let two directories change places, in one step where the system can: a kill leaves one whole or the other."""
    at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 and renameat2(at_cwd, os.fsencode(new), at_cwd, os.fsencode(old), exchange) == 0:
        return
    aside = old.with_name(f"{old.name}.{os.getpid()}.old")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    _remove(aside)


def _write_directory(plan: MergePlan, folder: Path, stored: RecipeFile) -> None:
    folder.mkdir()
    source, weights = plan.fine_tuned.root, plan.fine_tuned
    names = {file.path.name for file in weights.files}
    for path in sorted(source.iterdir()):
        wanted = path.name.endswith(_COPIED) and not path.name.endswith(_NOT_COPIED) and path.name != NAME
        if path == weights.index or (wanted and path.is_file() and path.name not in names):
            shutil.copyfile(path, folder / path.name)
    for file in weights.files:
        _write_file(plan, file, folder / file.path.name)
    write_recipe(stored, folder / NAME)


def _write_file(plan: MergePlan, source: WeightsFile, target: Path) -> None:
    if isinstance(source, SafetensorsFile):
        write_safetensors(source, target, plan.tensor, plan.facts())
    else:
        write_torch(source, target, plan.tensor)


def write_safetensors(like: SafetensorsFile, target: Path, tensor: Tensors, facts: dict[str, str]) -> None:
    """Write a file with the tensors of another one, in its order and at its offsets, holding one at a time.

    The library takes all tensors at once, so the format is written here: the length of the header in 8 bytes, the
    header as JSON, the data. What was written is then opened with the library.
    """
    with like.path.open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    # transformers refuses metadata that do not say which framework wrote them.
    header["__metadata__"] = {"format": "pt", **like.metadata, **facts}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    order = sorted(like.specs, key=lambda key: int(header[key]["data_offsets"][0]))
    with target.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            _append(file, tensor(key))
        file.flush()
        os.fsync(file.fileno())
    if SafetensorsFile(target).specs != like.specs:
        raise SharpscopeError(
            f"{target.name} was written, but reads back otherwise", "report this with both checkpoints"
        )


def _append(file: BinaryIO, tensor: Tensor) -> None:
    if tensor.numel():
        file.write(_bytes(tensor).numpy().data)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def write_torch(like: TorchFile, target: Path, tensor: Tensors) -> None:
    """Write a state dict with the keys and wrapper of another one; names that share a tensor there share an equal one.

    ``torch.save`` takes all tensors at once, so each is written to a file of its own first and mapped from there.
    What stood beside the weights (optimiser, epoch) is left out: it belongs to other weights.
    """
    groups = {key: keys for keys in like.shared() for key in keys}
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=target.name) as scratch:
        state: dict[str, Any] = {}
        for i, key in enumerate(like.specs):
            twins = [state[other] for other in groups.get(key, ()) if other in state]
            state[key] = _twin_or_mapped(tensor(key), twins, Path(scratch) / str(i))
        with target.open("wb") as file:
            for wrapper in reversed(like.wrappers):
                state = {wrapper: state}
            _save(state, file)


def _save(state: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:  # how torch says that a disk is full
        raise OSError(f"torch.save gave up: {str(error).splitlines()[0]}") from error
    file.flush()
    os.fsync(file.fileno())


def _twin_or_mapped(tensor: Tensor, twins: list[Tensor], path: Path) -> Tensor:
    """Return the twin of the same bytes, else the tensor as a mapping of a file."""
    # What is one tensor in the fine-tuned model may be two in the zero-shot one, and so between them.
    twin = next((twin for twin in twins if torch.equal(_bytes(twin), _bytes(tensor))), None)
    return _mapped(tensor, path) if twin is None else twin


def _mapped(tensor: Tensor, path: Path) -> Tensor:
    """Return the tensor as a mapping of a file, which it is written to."""
    if not tensor.numel():
        return tensor
    with path.open("wb") as file:
        _append(file, tensor)
    storage = torch.UntypedStorage.from_file(str(path), False, tensor.nbytes)
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape)  # type: ignore[call-overload,no-any-return]
