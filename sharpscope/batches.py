"""What a loader yields, as inputs and class numbers; anything else is refused by the place it came from."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor, nn

from sharpscope.errors import DataError
from sharpscope.objective import Batch

IMAGE_KEYS = ("image", "images", "pixel_values")
LABEL_KEYS = ("label", "labels", "cls")
CAPTION_KEYS = ("caption", "captions", "text", "texts", "txt")
_FORM = f"a loader of (x, y) pairs, or of dicts with one of {IMAGE_KEYS} and one of {LABEL_KEYS}"
_MARKS = {  # labels that are none
    -1: " (-1 stands for 'no label' in many sets, often their test split)",
    -100: " (-100 stands for 'no label' in torch's losses; every image here is judged: leave out those without one)",
}
_FLAGS = (bool, int, float, str, type(None))  # of a batch: settings of the forward or nothing, no inputs
_PACKED = "several inputs packed into one tensor, which the forward of a wrapper around the model takes apart"


class Item(NamedTuple):
    """A batch as a loader gave it: with labels or, all zero then, without; with a caption for each image or without.

    ``unread`` are the keys of what else is there.
    """

    batch: Batch
    captions: tuple[str, ...] | None
    labelled: bool
    unread: frozenset[str]


def as_item(item: Any, name: str, index: int) -> Item:
    """Return what a loader gave: as :func:`as_batch`, and the captions of a mapping, which may stand for labels.

    Raises
    ------
    DataError
        See :func:`as_batch`; or if captions are no list of texts, one for each image.
    """
    captions = _captions(item, f"batch {index} of {name!r}") if isinstance(item, Mapping) else None
    labelled = captions is None or any(key in item for key in LABEL_KEYS)
    if not labelled:
        item = {**item, LABEL_KEYS[0]: torch.zeros(len(captions or ()), dtype=torch.long)}
    return Item(as_batch(item, name, index), captions, labelled, unread(item))


def unread(item: Any) -> frozenset[str]:
    """Return the keys of what a loader gave beside images and labels."""
    given = item[0] if isinstance(item, tuple | list) and item else item
    if not isinstance(given, Mapping):
        return frozenset()
    read = {_image_key(given), *LABEL_KEYS}
    return frozenset(key for key, value in given.items() if key not in read and not isinstance(value, _FLAGS))


def check_taken(keys: frozenset[str], module: nn.Module, name: str) -> None:
    """Raise if the model's forward takes what is not read: without it, it is another function."""
    known = inspect.signature(module.forward).parameters.values()
    taken = {taker.name for taker in known if taker.kind not in (taker.VAR_POSITIONAL, taker.VAR_KEYWORD)}
    if lost := sorted(keys & taken):
        raise DataError(
            f"{name!r} gives {', '.join(map(repr, lost))} beside the images; the model's forward takes that, and is "
            "given one tensor",
            f"{_PACKED}; or batches without that, if the model does as well",
        )


def _captions(item: Mapping[Any, Any], where: str) -> tuple[str, ...] | None:
    """Return the captions of a batch, None if it has none; tokens are none beside labels."""
    key = next((key for key in CAPTION_KEYS if key in item), None)
    if key is None:
        return None
    found = item[key]
    if isinstance(found, list | tuple) and all(isinstance(text, str) for text in found):
        images = item.get(_image_key(item), found)
        if len(images) != len(found):
            raise DataError(f"{where} has {len(images)} images and {len(found)} captions", "a caption for each image")
        return tuple(found)
    if any(key in item for key in LABEL_KEYS):
        return None
    raise DataError(
        f"{where} has {key!r} of type {type(found).__name__} and no labels",
        "captions as a list of str, which the model's own tokenizer reads; or class numbers",
    )


def as_batch(item: Any, name: str, index: int) -> Batch:
    """Return inputs and targets of what a loader gave: a pair or a mapping with the usual keys.

    Raises
    ------
    DataError
        If there is no label, the label is no class number, the lengths differ, the inputs are no tensor, or one is
        not finite.
    """
    where = f"batch {index} of {name!r}"
    inputs, targets = _pair(item, where)
    if isinstance(inputs, Mapping):  # what a processor of transformers returns
        inputs = _image(inputs, where)
    x, y = _tensor(inputs, "images", where), _tensor(targets, "labels", where)
    if fault := _label_fault(y):
        raise DataError(f"{where} has targets {tuple(y.shape)} {y.dtype}, {fault[0]}", fault[1])
    if not x.ndim or len(x) != len(y):
        raise DataError(
            f"{where} has inputs {tuple(x.shape)} and targets {tuple(y.shape)}",
            "one integer class per example: targets of shape (n,)",
        )
    _check_finite(x, where)
    return Batch(x, y.long())


def _image_key(item: Mapping[Any, Any]) -> str | None:
    return next((key for key in IMAGE_KEYS if key in item), None)


def _image(item: Mapping[Any, Any], where: str) -> Any:
    key = _image_key(item)
    if key is None:
        raise DataError(
            f"{where} is of keys {sorted(map(str, item))}, no image among them", f"one of {IMAGE_KEYS}; {_PACKED}"
        )
    return item[key]


def _pair(item: Any, where: str) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        inputs = _image(item, where)
        targets = next((item[key] for key in LABEL_KEYS if key in item), None)
        found = f"a mapping with keys {sorted(map(str, item))}"
    else:
        inputs, targets = item if isinstance(item, tuple | list) and len(item) == 2 else (None, None)
        found = f"a {type(item).__name__}" + (f" of {len(item)}" if isinstance(item, tuple | list) else "")
    if isinstance(item, tuple | list) and len(item) > 2:
        raise DataError(
            f"{where} is {found}; which of them are images and labels is not known",
            f"{_FORM}; of (x, y, more): DataLoader(..., collate_fn=lambda items: default_collate([i[:2] for i in "
            "items]))",
        )
    if inputs is None or targets is None:
        raise DataError(f"{where} is {found}, without labels; accuracy and loss are measured, which need them", _FORM)
    return inputs, targets


def _tensor(values: Any, what: str, where: str) -> Tensor:
    first = values[0] if isinstance(values, list | tuple) and values else values
    try:
        if isinstance(first, Image):  # it would make a tensor, of raw pixels
            raise TypeError
        whole = isinstance(values, list | tuple) and isinstance(first, Tensor) and first.ndim > 0
        return torch.stack(list(values)) if whole else torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{where} has {what} of type {type(first).__name__}, which make no tensor",
            "for pictures: sharpscope.images(dataset, model), which preprocesses them"
            if what == "images"
            else "class numbers, with the names in Split(loader, name, classes=[...])",
        ) from error


def _label_fault(targets: Tensor) -> tuple[str, str] | None:
    """Return what is wrong with labels and the way out."""
    shape = targets.shape
    if targets.ndim == 0:
        return "a single example", "batches: DataLoader(dataset, batch_size=64)"
    if targets.ndim == 2 and shape[1] > 1 and bool(((targets == 0) | (targets == 1)).all()):
        one_hot = bool((targets.sum(dim=1) == 1).all())
        return ("one-hot", "class numbers: y.argmax(dim=1)") if one_hot else ("several labels an image", "one each")
    if targets.is_floating_point():
        return "no whole numbers by type", "one integer class per example: y.long(), if they are class numbers"
    if targets.ndim == 2 and shape[1] == 1:
        return "a column", "one integer class per example, of shape (n,): y.squeeze(1)"
    return None if targets.ndim == 1 else ("too many axes", "one integer class per example, of shape (n,)")


def check_range(targets: Tensor, classes: int, name: str) -> None:
    """Raise if a label is no number of one of so many outputs."""
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= classes:
        unlabelled = _MARKS.get(low, "")
        raise DataError(
            f"{name!r} has labels {low}..{high}, the model has {classes} outputs (0..{classes - 1})" + unlabelled,
            "check that labels and model number the same classes",
        )


def _check_finite(inputs: Tensor, where: str) -> None:
    if not inputs.is_floating_point() or bool(inputs.isfinite().all()):
        return
    bad = ~inputs.isfinite().reshape(len(inputs), -1).all(dim=1)
    raise DataError(
        f"{where} holds NaN or infinities in {int(bad.sum())} of {len(inputs)} examples, the first at place "
        f"{int(bad.nonzero()[0, 0])}",
        "check the preprocessing (a division by a zero deviation?) and the files",
    )
