"""``datasets`` objects of Hugging Face as labelled data; known by what they can do, the library is not imported."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from PIL.Image import Image

from sharpscope.batches import CAPTION_KEYS, IMAGE_KEYS, LABEL_KEYS
from sharpscope.classnames import ClassNames, read_label_names
from sharpscope.collection import Collection
from sharpscope.errors import DataError, UsageError
from sharpscope.pictures import UNLABELLED, Picture

STREAM_BYTES = 2 << 30  # of encoded images; a streaming data set is kept, as it cannot be drawn from


def is_table(data: Any) -> bool:
    """Return whether this is a data set with named columns, or a mapping of split names to such."""
    return hasattr(data, "features") or (
        isinstance(data, Mapping) and any(hasattr(v, "features") for v in data.values())
    )


def table_collection(
    dataset: Any, name: str | None, classnames: ClassNames | None, *, captions: bool = False
) -> Collection:
    """Return the rows of a data set with an image and a label column, in their order, and the words of its labels.

    Its own formatting and transforms are set aside: the model's preprocessing is applied, to images as stored.

    Parameters
    ----------
    dataset
        ``datasets.Dataset`` or ``IterableDataset``, or anything with ``features``, rows that are mappings, and
        columns by name. A streaming one is read once and its encoded images are kept, up to 2 GB.
    name
        For rows and messages; default the data set's own.
    classnames
        Label -> words, or a file of that; default the names of the label column.
    captions
        Take the caption column, too (of a list of captions the first); there need not be a label column then.

    Raises
    ------
    UsageError
        If this is several splits, or has not one image and one label column.
    DataError
        If labels have no names, or a row has no label.
    """
    if isinstance(dataset, Mapping):
        raise UsageError(
            f"this holds the splits {', '.join(map(str, dataset))}", f"one of them: data[{next(iter(dataset))!r}]"
        )
    title = name or str(getattr(getattr(dataset, "info", None), "dataset_name", None) or "data")
    image = _image_column(title, dataset)
    label = None if captions and not _labels(dataset) else _label_column(title, dataset)
    rows = _rows(dataset, title, image)
    texts = _captions(title, dataset, rows) if captions else [None] * len(rows)
    words: dict[str, str] = {}
    if label is None:
        keys = [UNLABELLED] * len(rows)
    else:
        values = _column(rows, label)
        words = _words(title, dataset.features[label], values, classnames)
        keys = _keys(title, values, words)
    pictures = [
        Picture(f"{title} row {i}", key, partial(_cell, rows, i, image), texts[i]) for i, key in enumerate(keys)
    ]
    if not pictures:
        raise DataError(f"{title!r} gave no example", "a data set with rows")
    return Collection(title, pictures, words, what="label")


def _image_column(title: str, dataset: Any) -> str:
    features = _features(title, dataset)
    found = [key for key, feature in features.items() if type(feature).__name__ == "Image"]
    return _only(title, features, found or [key for key in IMAGE_KEYS if key in features], "image", IMAGE_KEYS)


def _label_column(title: str, dataset: Any) -> str:
    return _only(title, _features(title, dataset), _labels(dataset), "label", LABEL_KEYS)


def _labels(dataset: Any) -> list[str]:
    """Return the columns that may be labels."""
    usual = [key for key in LABEL_KEYS if key in dataset.features]
    return usual or [key for key, feature in dataset.features.items() if hasattr(feature, "names")]


def _column(rows: Any, name: str) -> list[Any]:
    return [*rows[name]] if hasattr(rows, "features") else [row[name] for row in rows]


def _captions(title: str, dataset: Any, rows: Any) -> list[str | None]:
    """Return a caption for each row."""
    found = [key for key in CAPTION_KEYS if key in dataset.features]
    column = _only(title, dataset.features, found, "caption", CAPTION_KEYS)
    texts = [cell[0] if isinstance(cell, list | tuple) and cell else cell for cell in _column(rows, column)]
    if (odd := next((i for i, text in enumerate(texts) if not isinstance(text, str) or not text), None)) is not None:
        raise DataError(f"{title!r}: row {odd} has {texts[odd]!r} in the place of a caption", "a text for each image")
    return texts


def _features(title: str, dataset: Any) -> Mapping[str, Any]:
    if not dataset.features:
        raise UsageError(
            f"{title!r} does not say what its columns are",
            "load it without streaming=True, or dataset.cast(Features(...))",
        )
    found: Mapping[str, Any] = dataset.features
    return found


def _only(title: str, features: Mapping[str, Any], found: Sequence[str], what: str, usual: Sequence[str]) -> str:
    if len(found) == 1:
        return found[0]
    many = f"several {what} columns: {', '.join(found)}" if found else f"no {what} column among {', '.join(features)}"
    needed = "; accuracy and loss are measured, which need labels" if what == "label" and not found else ""
    way = f"dataset.remove_columns({found[1:]})" if found else f"dataset.rename_column('...', '{usual[0]}')"
    raise UsageError(f"{title!r} has {many}{needed}", way)


def _rows(dataset: Any, title: str, image: str) -> Any:
    """Return the rows with encoded images where the data set can give them."""
    plain = dataset.with_format(None) if hasattr(dataset, "with_format") else dataset
    feature = dataset.features[image]
    if hasattr(plain, "cast_column") and hasattr(feature, "decode"):
        plain = plain.cast_column(image, type(feature)(decode=False))
    return plain if hasattr(plain, "__len__") else _kept(plain, title, image)


def _kept(rows: Iterable[Mapping[str, Any]], title: str, image: str) -> list[Mapping[str, Any]]:
    kept, size = [], 0
    for row in rows:
        kept.append(row)
        encoded = row[image].get("bytes") if isinstance(row[image], Mapping) else None
        size += len(encoded) if encoded else 0
        if size > STREAM_BYTES:
            raise DataError(
                f"{title!r} is streamed and holds more than the {STREAM_BYTES / 2**30:.3g} GB that are kept in memory",
                "load it without streaming=True, or a part of it: dataset.take(10_000)",
            )
    return kept


def _words(title: str, feature: Any, values: Sequence[Any], classnames: ClassNames | None) -> dict[str, str]:
    if classnames is not None:
        return read_label_names(classnames)
    if names := getattr(feature, "names", None):
        return {str(number): word.replace("_", " ") for number, word in enumerate(names)}
    if values and all(isinstance(value, str) for value in values):
        return {value: value.replace("_", " ") for value in sorted(set(values))}
    raise DataError(
        f"{title!r}: the labels have no names, and numbers of two data sets cannot be compared",
        'classnames={"0": "cat", ...}, or dataset.cast_column("label", ClassLabel(names=[...]))',
    )


def _keys(title: str, values: Sequence[Any], words: Mapping[str, str]) -> list[str]:
    keys = [str(value) for value in values]
    if odd := {key: count for key, count in Counter(keys).items() if key not in words}:
        label, count = next(iter(odd.items()))
        unlabelled = " (-1 and None stand for 'no label', as in many test splits)" if label in ("-1", "None") else ""
        raise DataError(
            f"{title!r}: {count} rows have the label {label}{unlabelled}, there are names for {len(words)} classes",
            "a split with labels; accuracy and loss are measured, which need them",
        )
    return keys


def _cell(rows: Any, index: int, image: str) -> Path | BinaryIO | Image:
    cell = rows[index][image]
    if isinstance(cell, Mapping):
        return io.BytesIO(cell["bytes"]) if cell.get("bytes") is not None else Path(cell["path"])
    if isinstance(cell, Image):
        return cell
    raise TypeError(f"a {type(cell).__name__} in the place of an image")
