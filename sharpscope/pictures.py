"""Pictures on disk, in archives or in tables, decoded and preprocessed into batches in a fixed order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sharpscope.errors import DataError, UsageError
from sharpscope.objective import Batch

UNREADABLE = 0.01  # share of the images; above it the data are not what they were taken for
THREADS = min(8, os.cpu_count() or 1)
# Also of images that Pillow may need a plugin for (.heic): unreadable ones are counted and named, others left out.
SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".pbm", ".bmp", ".gif", ".tif", ".tiff", ".webp"),
        *(".avif", ".heic", ".heif"),
    }
)
UNLABELLED = "\0"  # key of pictures that have a caption only
_DEEP = {"I", "F"}  # modes of more than 8 bits, beside those that begin with I;16
_DOUBT = "sharpscope"  # key of a converted picture's info: what its white was taken for, where that is a guess

Preprocess = Callable[[Image.Image], Tensor]


class Picture(NamedTuple):
    """An image that has not been read yet."""

    name: str  # for messages
    key: str  # its class folder, or its label as text
    source: Callable[[], Path | BinaryIO | Image.Image]
    caption: str | None = None


def rgb(image: Image.Image) -> Image.Image:
    """Return the picture as CLIP's own processors take it: RGB of 8 bits; the first frame, upright.

    Greyscale is repeated, CMYK and palettes are converted, transparency is dropped, as by ``Image.convert("RGB")``.
    Different from it on purpose: 16-bit and float greyscale is scaled, not clipped to white, and EXIF orientation is
    applied. Integers of 32 bits that stay below 256 are 8 bits, there as here.

    Raises
    ------
    ValueError
        If a greyscale of 32 bits or of floats lies outside 0..65535 or 0..1: its white is unknown.
    """
    upright, doubt = ImageOps.exif_transpose(image), ""
    if upright.mode in _DEEP or upright.mode.startswith("I;16"):
        upright, doubt = _eight_bits(np.asarray(upright))
    elif upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")  # PIL warns of the direct way
    found = upright.convert("RGB")
    if doubt:
        found.info[_DOUBT] = doubt
    return found


def _eight_bits(values: np.ndarray) -> tuple[Image.Image, str]:
    """Return the picture with its white at 255, and what must be said if that white is a guess."""
    low, high = float(values.min()), float(values.max())
    narrow = values.dtype.kind != "f" and values.dtype.itemsize > 2 and high <= 255
    white = 1.0 if values.dtype.kind == "f" else 255.0 if narrow else 65535.0
    if not (low >= 0 and high <= white):
        raise ValueError(f"greyscale of {values.dtype} from {low:g} to {high:g}, where 0 to {white:g} can be scaled")
    doubt = ""
    if narrow and high > 0:
        doubt = "hold integers of 32 bits up to 255 and are taken for 8 bits"
    elif 0 < 16 * high <= white:
        doubt = "are nowhere brighter than a 16th of their range, as 12 bits in 16 are, and stay as dark"
    return Image.fromarray(np.asarray((values * (255 / white)).round(), dtype=np.uint8)), doubt


class PictureBatches:
    """Batches of preprocessed pictures, decoded anew in each pass by several threads; nothing is kept.

    Parameters
    ----------
    pictures
        In order; the order of the threads changes nothing.
    numbers
        Key of a picture -> its class number.
    preprocess
        PIL image -> tensor, the same shape for all.
    name
        For messages.
    batch_size
        Images in a batch.
    max_unreadable
        Share of the pictures that may be left out because they cannot be decoded.
    notes
        What else a result must say about these data.
    threads
        That decode and preprocess; default the number of cores, at most 8.

    Attributes
    ----------
    unreadable
        Pictures that could not be decoded so far, left out of the batches, and why.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        numbers: Mapping[str, int],
        preprocess: Preprocess,
        name: str,
        *,
        batch_size: int = 64,
        max_unreadable: float = UNREADABLE,
        notes: Sequence[str] = (),
        threads: int = THREADS,
    ) -> None:
        if batch_size < 1 or threads < 1 or not 0 <= max_unreadable < 1:
            raise UsageError(
                f"batch_size={batch_size}, threads={threads}, max_unreadable={max_unreadable}",
                "the first two 1 or more, the last a share in [0, 1)",
            )
        self._pictures = pictures
        self._numbers = numbers
        self._preprocess = preprocess
        self._name = name
        self._batch_size = batch_size
        self._max_unreadable = max_unreadable
        self._notes = tuple(notes)
        self._threads = threads
        self.unreadable: dict[str, str] = {}
        self._doubts: dict[str, set[str]] = {}
        self._read_before = False

    def __len__(self) -> int:
        return -(-len(self._pictures) // self._batch_size)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a result must say about these data."""
        total = len(self._pictures)
        doubts = (
            f"{self._name}: {len(names)} of {total} images {doubt} ({min(names)})"
            for doubt, names in sorted(self._doubts.items())
        )
        if not self.unreadable:
            return (*self._notes, *doubts)
        return (
            *self._notes,
            *doubts,
            f"{self._name}: {len(self.unreadable)} of {total} images could not be read and are left out "
            f"({self._first_unreadable()})",
        )

    def _first_unreadable(self) -> str:
        first = [f"{name}: {reason}" for name, reason in self.unreadable.items()]
        return "; ".join(first[:3]) + (f"; {len(first) - 3} more" if len(first) > 3 else "")

    def _read(self, picture: Picture) -> Tensor | str:
        """Return the preprocessed picture, or why it cannot be decoded."""
        try:
            image = decoded(picture)
        except Exception as error:  # decoders of damaged files raise nearly anything
            return str(error).replace(picture.name, "file") or type(error).__name__
        if doubt := image.info.get(_DOUBT):
            self._doubts.setdefault(doubt, set()).add(picture.name)
        return torch.as_tensor(self._preprocess(image))

    def _in_order(self) -> Iterator[tuple[Picture, Tensor | str]]:
        """Yield every picture read, a few ahead in threads."""
        waiting: deque[tuple[Picture, Future[Tensor | str]]] = deque()
        with ThreadPoolExecutor(self._threads) as pool:
            for place, picture in enumerate(self._pictures):
                waiting.append((picture, pool.submit(self._read, picture)))
                # The first alone: a processor that is loaded at first use may not be loaded twice at once.
                while len(waiting) > (2 * self._threads if place else 0):
                    done, future = waiting.popleft()
                    yield done, future.result()
            for done, future in waiting:
                yield done, future.result()

    def _refuse(self, picture: Picture, reason: str) -> None:
        """Count an unreadable picture; raise if they are too many, or if it could be read before."""
        if self._read_before and picture.name not in self.unreadable:
            raise DataError(
                f"{picture.name} of {self._name!r} could be read before and now cannot: {reason}",
                "restore it and run the same again: what was finished is kept",
            )
        self.unreadable[picture.name] = reason
        if len(self.unreadable) > self._max_unreadable * len(self._pictures):
            raise DataError(
                f"{self._name!r}: {len(self.unreadable)} images cannot be read so far ({self._first_unreadable()}), "
                f"more than {self._max_unreadable:.3g} of all {len(self._pictures)}",
                "copy the data anew, convert or remove these files; in Python, max_unreadable=0.05 allows more",
            )

    def __iter__(self) -> Iterator[Batch | dict[str, Any]]:
        images: list[Tensor] = []
        kept: list[Picture] = []
        shape = None
        for picture, found in self._in_order():
            if isinstance(found, str):
                self._refuse(picture, found)
                continue
            shape = shape or found.shape
            if found.shape != shape:
                raise DataError(
                    f"{picture.name} is {tuple(found.shape)} after preprocessing, the images before it {tuple(shape)}",
                    "a preprocessing that resizes and crops to one size",
                )
            images.append(found)
            kept.append(picture)
            if len(images) == self._batch_size:
                yield self._batch(images, kept)
                images, kept = [], []
        if images:
            yield self._batch(images, kept)
        self._read_before = True

    def _batch(self, images: list[Tensor], pictures: list[Picture]) -> Batch | dict[str, Any]:
        """Return a batch, as a mapping if the pictures have captions."""
        labels = [] if pictures[0].key == UNLABELLED else [self._numbers[picture.key] for picture in pictures]
        if pictures[0].caption is None:
            return Batch(torch.stack(images), torch.tensor(labels))
        found = {"image": torch.stack(images), "caption": [picture.caption for picture in pictures]}
        return {**found, "label": torch.tensor(labels)} if labels else found


def decoded(picture: Picture) -> Image.Image:
    """Return the picture in RGB; any exception if it is damaged."""
    source = picture.source()
    if isinstance(source, Image.Image):
        return rgb(source)
    empty = not source.stat().st_size if isinstance(source, Path) else not source.seek(0, os.SEEK_END)
    if empty:
        raise ValueError("0 bytes")
    if not isinstance(source, Path):
        source.seek(0)
    with Image.open(source) as image:
        return rgb(image)  # decodes here: a damaged file fails inside this block
