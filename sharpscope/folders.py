"""Folders of images, one folder per class, as labelled data."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sharpscope.data import Split, stratified
from sharpscope.errors import DataError, UsageError
from sharpscope.objective import Batch

if TYPE_CHECKING:
    from sharpscope.models.clip import ClipModel

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})
UNREADABLE_SHARE = 0.01  # of the images; above it the data are not what they were taken for
_LAYOUT = "one folder per class: DIR/cat/1.jpg, DIR/dog/2.jpg"

Preprocess = Callable[[Image.Image], Tensor]
ClassNames = Mapping[str, str] | str | Path


class ImageFolder:
    """Batches of preprocessed images, read anew in each pass; nothing is kept.

    Parameters
    ----------
    samples
        Path and class number of each image, in order.
    preprocess
        PIL image -> tensor, the same shape for all.
    name
        For messages.
    batch_size
        Images in a batch.

    Attributes
    ----------
    unreadable
        Files that could not be decoded so far, left out of the batches.
    """

    def __init__(self, samples: Sequence[tuple[Path, int]], preprocess: Preprocess, name: str, batch_size: int) -> None:
        self._samples = samples
        self._preprocess = preprocess
        self._name = name
        self._batch_size = batch_size
        self.unreadable: dict[Path, str] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a result must say about these data."""
        if not self.unreadable:
            return ()
        first, reason = next(iter(self.unreadable.items()))
        return (
            f"{self._name}: {len(self.unreadable)} of {len(self._samples)} images could not be read and are left out "
            f"({first}: {reason})",
        )

    def _opened(self, path: Path) -> Image.Image | None:
        try:
            with Image.open(path) as image:
                return image.convert("RGB")  # decodes here: a damaged file fails inside this block
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            self.unreadable[path] = str(error).replace(str(path), path.name)
        if len(self.unreadable) > UNREADABLE_SHARE * len(self._samples):
            raise DataError(
                f"{self._name!r}: {path} cannot be read ({self.unreadable[path]}), one of {len(self.unreadable)} so "
                f"far, more than {UNREADABLE_SHARE:.0%} of {len(self._samples)} images",
                "copy the data anew, or remove the damaged files",
            )
        return None

    def _tensor(self, image: Image.Image, path: Path, shape: torch.Size | None) -> Tensor:
        found = torch.as_tensor(self._preprocess(image))
        if shape is not None and found.shape != shape:
            raise DataError(
                f"{path} is {tuple(found.shape)} after preprocessing, the images before it {tuple(shape)}",
                "a preprocessing that resizes and crops to one size",
            )
        return found

    def __iter__(self) -> Iterator[Batch]:
        images: list[Tensor] = []
        labels: list[int] = []
        shape = None
        for path, label in self._samples:
            image = self._opened(path)
            if image is None:
                continue
            images.append(self._tensor(image, path, shape))
            labels.append(label)
            shape = images[0].shape
            if len(images) == self._batch_size:
                yield Batch(torch.stack(images), torch.tensor(labels))
                images, labels = [], []
        if images:
            yield Batch(torch.stack(images), torch.tensor(labels))


def class_folders(path: str | Path) -> dict[str, list[Path]]:
    """Return the images of each class folder, both in sorted order; hidden files and folders are left out.

    Raises
    ------
    UsageError
        If there is no such directory.
    DataError
        If it has no class folders, or a class without an image.
    """
    root = Path(path)
    if not root.is_dir():
        raise UsageError(f"there is no directory {root}", _LAYOUT)
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        loose = len(_images(root))
        held = f"{loose} images but no class folders" if loose else "neither class folders nor images"
        raise DataError(f"{root} holds {held}", _LAYOUT)
    found = {folder.name: _images(folder) for folder in folders}
    if empty := [name for name, images in found.items() if not images]:
        raise DataError(
            f"class folder {root / empty[0]} holds no image ({len(empty)} of {len(found)} folders are empty)",
            f"fill or remove it; images end in {', '.join(sorted(SUFFIXES))}",
        )
    return found


def _images(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def read_classnames(source: ClassNames, folders: Sequence[str]) -> dict[str, str]:
    """Return the words of each folder.

    Parameters
    ----------
    source
        Folder -> words; or a JSON file of that; or a text file with a line per folder, in sorted order.
    folders
        Sorted folder names.

    Raises
    ------
    UsageError
        If the file is missing or of another form, names too few folders, or the number of lines is not that of the
        folders.
    """
    found = source if isinstance(source, Mapping) else _classnames_file(Path(source), folders)
    if missing := [folder for folder in folders if folder not in found]:
        raise UsageError(
            f"the class names have no words for folder {missing[0]!r} ({len(missing)} of {len(folders)} are missing)",
            "a JSON file {folder: words} that names every folder",
        )
    return {folder: found[folder] for folder in folders}


def _classnames_file(path: Path, folders: Sequence[str]) -> Mapping[str, str]:
    if not path.is_file():
        raise UsageError(f"there is no file of class names at {path}", "a line per class folder, or JSON")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return _classnames_json(path, text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) != len(folders):
        raise UsageError(
            f"{path} has {len(lines)} lines for {len(folders)} class folders",
            "a line per folder in sorted order, or a JSON file {folder: words}, which also serves subsets",
        )
    if sorted(lines) == list(folders) != lines:
        raise UsageError(
            f"{path} lists the folders themselves, but not in sorted order: its first line {lines[0]!r} would name "
            f"folder {folders[0]!r}",
            "no class names are needed where folders carry them; else a JSON file {folder: words}",
        )
    return dict(zip(folders, lines, strict=True))


def _classnames_json(path: Path, text: str) -> dict[str, str]:
    try:
        stored: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is no JSON: {error}", 'e.g. {"n01440764": "tench"}') from error
    if not isinstance(stored, dict) or not all(isinstance(words, str) for words in stored.values()):
        raise UsageError(f"{path} does not map folders to words", 'e.g. {"n01440764": "tench"}')
    return stored


def folder(
    path: str | Path,
    model: ClipModel | Preprocess,
    *,
    name: str | None = None,
    classes: Sequence[str] | None = None,
    classnames: ClassNames | None = None,
    subset: bool = False,
    limit: int | None = None,
    batch_size: int = 64,
) -> Split:
    """Return a folder of images, one folder per class, as a split.

    Parameters
    ----------
    path
        Directory with a folder per class (the layout of torchvision's ImageFolder).
    model
        What :func:`sharpscope.load` returned, whose own preprocessing is applied, or any callable from a PIL image
        to a tensor.
    name
        For rows and messages; default the directory's name.
    classes
        The ID data's classes, ``id_.classes``: folders are mapped to them by name, classes that do not occur here
        are masked. Default: this folder's own classes, sorted by folder name.
    classnames
        Words of each folder: a mapping, a JSON file of it, or a text file with a line per folder in sorted order.
        Default: the folder's name with spaces for underscores.
    subset
        Leave out folders that are none of ``classes`` instead of refusing them.
    limit
        Most images, as even over the classes as they allow, always the same ones.
    batch_size
        Images read at once.

    Raises
    ------
    UsageError
        If the directory or the class names cannot be meant.
    DataError
        If there are no images, a folder is no class, or more than 1 % of the images cannot be read. Fewer are left
        out, with a warning that names the first.

    Notes
    -----
    The split's ``classes`` are words, as they go into templates.
    """
    title = name or Path(path).resolve().name
    files = class_folders(path)
    words = (
        {found: found.replace("_", " ") for found in files}
        if classnames is None
        else read_classnames(classnames, [*files])
    )
    known = _own_classes(title, words) if classes is None else list(classes)
    number = _numbers(title, words, known, subset=subset)
    samples = [(image, number[found]) for found in files if found in number for image in files[found]]
    if limit is not None:
        kept = np.sort(stratified(np.array([label for _, label in samples]), limit, seed=0))
        samples = [samples[i] for i in kept]
    preprocess: Preprocess = model if callable(model) else model.preprocess
    loader = ImageFolder(samples, preprocess, title, batch_size)
    columns = sorted(set(number.values()))
    split = Split(loader, title, classes=known, columns=columns if len(columns) < len(known) else None)
    for note in loader.notes:
        warnings.warn(note, stacklevel=2)
    return split


def _own_classes(title: str, words: Mapping[str, str]) -> list[str]:
    """Return the words in folder order; two folders with the same words would be one class with two numbers."""
    seen: dict[str, str] = {}
    for found, word in words.items():
        if word in seen:
            raise DataError(
                f"{title!r}: folders {seen[word]!r} and {found!r} are both {word!r}",
                "give each class words of its own (classnames)",
            )
        seen[word] = found
    return list(seen)


def _numbers(title: str, words: Mapping[str, str], known: Sequence[str], *, subset: bool) -> dict[str, int]:
    """Return the class number of each folder, by its words."""
    place = {word: number for number, word in enumerate(known)}
    unknown = {found: word for found, word in words.items() if word not in place}
    if unknown and not subset:
        found, word = next(iter(unknown.items()))
        near = get_close_matches(word, known, n=1)
        called = f" ({word!r})" if word != found else ""
        raise DataError(
            f"{title!r}: folder {found!r}{called} is none of the {len(known)} classes"
            + (f"; the nearest is {near[0]!r}" if near else "")
            + f" ({len(unknown)} of {len(words)} folders are unknown)",
            "rename it, map it with classnames, or leave such folders out: subset=True (--subset)",
        )
    if len(unknown) == len(words):
        raise DataError(f"{title!r}: no folder is one of the {len(known)} classes", "map them with classnames")
    return {found: place[word] for found, word in words.items() if found not in unknown}
