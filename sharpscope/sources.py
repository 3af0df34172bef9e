"""Labelled images from wherever they are: a folder, a webdataset, a data set object, a function of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sharpscope import factory
from sharpscope.classnames import ClassNames
from sharpscope.collection import Choice
from sharpscope.data import Split, as_split
from sharpscope.errors import UsageError
from sharpscope.folders import image_folder
from sharpscope.home import at_home
from sharpscope.items import is_items, item_collection
from sharpscope.pictures import UNREADABLE
from sharpscope.rows import is_table, table_collection
from sharpscope.webdataset import webdataset_collection

WEBDATASET = "wds:"


def is_folder(ref: str) -> bool:
    """Return whether a reference means a directory with a folder per class."""
    return not ref.startswith((WEBDATASET, factory.PREFIX))


def absolute(ref: str) -> str:
    """Return the reference as it is meant in every working directory; ``py:`` stays, its modules are found by name.

    >>> absolute("py:my.data:make")
    'py:my.data:make'
    """
    if ref.startswith(factory.PREFIX):
        return ref
    kind = WEBDATASET if ref.startswith(WEBDATASET) else ""
    return f"{kind}{at_home(ref.removeprefix(kind)).absolute()}"


def images(
    source: Any,
    model: Any,
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
    captions: bool = False,
) -> Split:
    """Return labelled images as a split, preprocessed as the model wants them.

    Parameters
    ----------
    source
        A directory with a folder per class; ``wds:DIR`` or ``wds:PATTERN``, tar archives in the layout of
        CLIP_benchmark; ``py:pkg.mod:factory``, a function that is given the model if it takes one, and returns any of
        these or a loader; a ``datasets`` object; a data set of (PIL image, class number) with ``classes``, as those of
        torchvision are; any loader of ready batches.
    model
        What :func:`sharpscope.load` returned, or any callable from a PIL image to a tensor. Not used for loaders.
    name
        For rows and messages.
    classes
        The ID data's classes, ``id_.classes``: those found here are mapped to them by name, classes that do not occur
        are masked. Default: the source's own classes.
    classnames
        Words of class folders (:func:`sharpscope.classnames.read_classnames`), or of labels.
    subset
        Leave out what is none of ``classes`` instead of refusing it; said in the notes.
    limit, seed
        Most images, as even over the classes as they allow, drawn with the seed.
    batch_size
        Images read at once.
    max_unreadable
        Share of the images that may be left out because they cannot be decoded.
    progress
        False: no bar while a long reading goes on.
    captions
        Take the images' captions, too, for ``objective="contrastive"``: ``key.txt`` of a webdataset, the column
        ``caption`` or ``text`` of a data set. Labels may then be absent, if only sharpness is measured on these data.
        Loaders give them as they are, as lists of texts in mappings.

    Raises
    ------
    UsageError, DataError
        See :func:`sharpscope.folder`; naming what cannot be measured on and the way out.
    """
    choice = Choice(classes, subset, limit, seed, batch_size, max_unreadable, progress, captions)
    return _read(source, model, name, classnames, choice)


def _read(source: Any, model: Any, name: str | None, classnames: ClassNames | None, choice: Choice) -> Split:
    if isinstance(source, str) and source.startswith(factory.PREFIX):
        title = name or source.rpartition(":")[2]
        return _read(factory.made(source, model), model, title, classnames, choice)
    if isinstance(source, str) and source.startswith(WEBDATASET):
        place = source.removeprefix(WEBDATASET)
        return webdataset_collection(place, name, classnames, captions=choice.captions).split(model, choice)
    if isinstance(source, str | Path):
        if choice.captions:
            raise UsageError(
                f"{source} is a folder of images, which have no captions",
                "without --captions (captions=False): class prompts",
            )
        subset = choice.subset and choice.classes is not None
        return image_folder(source, name, classnames, subset=subset).split(model, choice)
    if is_table(source):
        return table_collection(source, name, classnames, captions=choice.captions).split(model, choice)
    if is_items(source):
        return item_collection(source, name, classnames).split(model, choice)
    return _loader(source, name or getattr(source, "name", None) or "data", choice)


def _loader(loader: Any, name: str, choice: Choice) -> Split:
    """Return ready batches as a split, their classes matched by name where they have names."""
    if choice.limit is not None:
        raise UsageError(f"{name!r} is a loader: limit={choice.limit} chooses among pictures", "choose in the loader")
    return as_split(loader, name, progress=choice.progress).named(name).numbered_as(choice.classes)
