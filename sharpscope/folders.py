"""Folders of images, one folder per class, as labelled data."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sharpscope.classnames import ClassNames, read_classnames
from sharpscope.collection import Choice, Collection
from sharpscope.data import Split
from sharpscope.errors import DataError, UsageError
from sharpscope.home import at_home
from sharpscope.pictures import SUFFIXES, UNREADABLE, Picture, Preprocess

if TYPE_CHECKING:
    from sharpscope.models.clip import ClipModel

_LAYOUT = "one folder per class: DIR/cat/1.jpg, DIR/dog/2.jpg"
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "dev"})


class Listing(NamedTuple):
    """Images of each class folder, and what else lies there."""

    images: dict[str, list[Path]]
    others: list[Path]  # visible files that are no images
    hidden: int  # files and folders

    def notes(self, title: str) -> tuple[str, ...]:
        """Return what must be said about files that are left out."""
        if not self.others:
            return ()
        hidden = f", and {self.hidden} hidden" if self.hidden else ""
        return (f"{title}: {len(self.others)} files that are no images are left out ({self.others[0].name}){hidden}",)


def class_folders(path: str | Path) -> Listing:
    """Return the images of each class folder, folders and images in sorted order whatever the file system's.

    Folders inside a class folder belong to the class. Links to folders are followed unless they lead back. Hidden
    files and folders, and files that are no images, are left out and counted.

    Raises
    ------
    UsageError
        If there is no such directory.
    DataError
        If it cannot be read, has no class folders, a class without an image or whose name is no text, or splits in the
        place of classes.
    """
    root = at_home(path)
    if not root.is_dir():
        raise UsageError(f"there is no directory {root}", _LAYOUT)
    try:
        return _checked(root, _listing(root))
    except OSError as error:
        raise DataError(
            f"{error.filename or root} cannot be read: {error.strerror or error}", "check the permissions and the disk"
        ) from error


def _listing(root: Path) -> Listing:
    entries = sorted(root.iterdir())
    hidden = sum(entry.name.startswith(".") for entry in entries)
    others = [entry for entry in entries if entry.is_file() and not entry.name.startswith(".")]
    images: dict[str, list[Path]] = {}
    for folder in (entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")):
        files = sorted(_files(folder, [root.resolve()]))
        seen = [file for file in files if not _is_hidden(file, folder)]
        hidden += len(files) - len(seen)
        images[folder.name] = [file for file in seen if file.suffix.lower() in SUFFIXES]
        others += [file for file in seen if file.suffix.lower() not in SUFFIXES]
    return Listing(images, others, hidden)


def _files(folder: Path, above: list[Path]) -> Iterator[Path]:
    """Yield all files below, broken links included, without walking in circles."""
    here = folder.resolve()
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and Path(entry.path).is_dir()):
                yield from _files(Path(entry.path), [*above, here])
            else:
                yield Path(entry.path)


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def is_text(name: str) -> bool:
    """Whether a name can be written to a file or read by a tokenizer: a file system may hold others."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _checked(root: Path, found: Listing) -> Listing:
    tars = [file for file in found.others if file.suffix == ".tar"]
    if tars and not any(found.images.values()):
        raise DataError(f"{root} holds archives ({tars[0].name}) and no class folders", f"wds:{root}")
    if not found.images:
        loose = sum(file.suffix.lower() in SUFFIXES for file in found.others)
        held = f"{loose} images but no class folders" if loose else "neither class folders nor images"
        needed = ": accuracy and loss are measured, which need labels" if loose else ""
        raise DataError(f"{root} holds {held}{needed}", _LAYOUT)
    if empty := [name for name, images in found.images.items() if not images]:
        raise DataError(
            f"class folder {root / empty[0]} holds no image ({len(empty)} of {len(found.images)} folders are empty)",
            f"fill or remove it; images end in {', '.join(sorted(SUFFIXES))}",
        )
    if odd := [name for name in found.images if not is_text(name)]:
        raise DataError(
            f"the name of class folder {str(root / odd[0])!r} is no UTF-8, and names of classes are text",
            "rename the folder",
        )
    nested = all(image.parent != root / name for name, images in found.images.items() for image in images)
    if nested and {name.casefold() for name in found.images} <= _SPLITS:
        raise DataError(
            f"{root} holds the folders {', '.join(found.images)}, which are splits, not classes",
            f"one of them: {root / min(found.images, key=len)}",
        )
    return found


def folder(
    path: str | Path,
    model: ClipModel | Preprocess,
    *,
    name: str | None = None,
    classes: Sequence[str] | None = None,
    classnames: ClassNames | None = None,
    subset: bool = False,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    max_unreadable: float = UNREADABLE,
    progress: bool | None = None,
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
        are masked. Default: this folder's own classes, sorted by folder name. Names that differ in case or ``_``
        only are taken for the same if there is no other candidate, which is said.
    classnames
        Words of each folder: a mapping, a JSON, CSV or TSV file of it, or a text file with a line per folder in
        sorted order. Default: the folder's name with spaces for underscores.
    subset
        Leave out folders that are none of ``classes`` instead of refusing them; said in the notes.
    limit, seed
        Most images, as even over the classes as they allow, drawn with the seed.
    batch_size
        Images read at once.
    max_unreadable
        Share of the images that may be left out because they cannot be decoded.
    progress
        False: no bar while a long reading goes on.

    Raises
    ------
    UsageError
        If the directory or the class names cannot be meant.
    DataError
        If there are no images, a folder is no class, or too many images cannot be read. Fewer are left out, with a
        warning that names the first.

    Notes
    -----
    The split's ``classes`` are words, as they go into templates. How images are converted:
    :func:`sharpscope.pictures.rgb`.
    """
    return image_folder(path, name, classnames, subset=subset and classes is not None).split(
        model, Choice(classes, subset, limit, seed, batch_size, max_unreadable, progress)
    )


def image_folder(path: str | Path, name: str | None, classnames: ClassNames | None, *, subset: bool) -> Collection:
    """Return the images of a folder and the words of its classes; with ``subset`` only those that have words."""
    title, listing = name or at_home(path).resolve().name, class_folders(path)
    words = {found: found.replace("_", " ") for found in listing.images}
    if classnames is not None:
        words = read_classnames(classnames, [*listing.images], partial=subset)
    unnamed = listing.images.keys() - words.keys()
    dropped = f"{title}: {len(unnamed)} folders have no class name and are left out ({min(unnamed, default='')})"
    return Collection(
        title,
        [Picture(str(file), found, partial(Path, file)) for found in words for file in listing.images[found]],
        words,
        notes=(*listing.notes(title), *((dropped,) if unnamed else ())),
    )
