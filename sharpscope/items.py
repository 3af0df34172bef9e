"""Data sets of (picture, class number), as torchvision's are without a transform; the library is not imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from PIL.Image import Image

from sharpscope.classnames import ClassNames, read_label_names
from sharpscope.collection import Collection
from sharpscope.errors import DataError
from sharpscope.loaders import class_names
from sharpscope.pictures import Picture


def is_items(data: Any) -> bool:
    """Return whether these are items by number, the first a picture with its label."""
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")) or isinstance(data, Mapping) or not len(data):
        return False
    first = data[0]
    return isinstance(first, tuple | list) and len(first) == 2 and isinstance(first[0], Image)


def item_collection(dataset: Any, name: str | None, classnames: ClassNames | None) -> Collection:
    """Return the items of a data set in their order, and the words of its labels.

    Parameters
    ----------
    dataset
        Items (PIL image, class number); with ``targets``, the labels are read from there.
    name
        For rows and messages; default that of its class.
    classnames
        Label -> words, or a file of that; default the data set's ``classes``.

    Raises
    ------
    DataError
        If labels are no class numbers, or have no names.
    """
    title = name or type(dataset).__name__
    labels = _labels(dataset)
    if odd := next((label for label in labels if not isinstance(label, int) or label < 0), None):
        raise DataError(f"{title!r} has the label {odd!r}", "class numbers, 0 or more")
    names = class_names(dataset)
    if classnames is None and names is None:
        raise DataError(
            f"{title!r}: the labels have no names, and numbers of two data sets cannot be compared",
            'classnames={"0": "cat", ...}, or dataset.classes = [...]',
        )
    known = {str(i): word.replace("_", " ") for i, word in enumerate(names or ())}
    words = known if classnames is None else read_label_names(classnames)
    if high := next((label for label in labels if str(label) not in words), None):
        raise DataError(f"{title!r} has the label {high}, there are names for {len(words)} classes", "a name for each")
    pictures = [Picture(f"{title} item {i}", str(y), partial(_picture, dataset, i)) for i, y in enumerate(labels)]
    return Collection(title, pictures, words, what="label")


def _labels(dataset: Any) -> Sequence[Any]:
    known = getattr(dataset, "targets", None)
    found = known if known is not None and len(known) == len(dataset) else [dataset[i][1] for i in range(len(dataset))]
    return [label.item() if hasattr(label, "item") else label for label in found]


def _picture(dataset: Any, index: int) -> Image:
    found: Image = dataset[index][0]
    return found
