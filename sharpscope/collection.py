"""Pictures whose classes have names, as labelled data: classes matched, a sample drawn, batches preprocessed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from sharpscope.classes import Numbering, numbering, own_classes
from sharpscope.data import Split, stratified
from sharpscope.errors import UsageError
from sharpscope.pictures import UNLABELLED, UNREADABLE, Picture, PictureBatches, Preprocess


@dataclass(frozen=True)
class Choice:
    """Which pictures of a collection are taken, and how they are read.

    Parameters
    ----------
    classes
        Classes in the order of their numbers; default the collection's own.
    subset
        Leave out what is none of them instead of refusing it.
    limit, seed
        Most images, as even over the classes as they allow, drawn with the seed.
    batch_size
        Images read at once.
    max_unreadable
        Share of the images that may be left out because they cannot be decoded.
    progress
        False: no bar while a long reading goes on.
    captions
        Take a caption for each image, too; labels may then be absent.
    """

    classes: Sequence[str] | None = None
    subset: bool = False
    limit: int | None = None
    seed: int = 0
    batch_size: int = 64
    max_unreadable: float = UNREADABLE
    progress: bool | None = None
    captions: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.classes, str) or (self.classes is not None and not len(self.classes)):
            raise UsageError(f"classes={self.classes!r}: needs a list of class names", "e.g. id_.classes")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"limit={self.limit}: needs a number of images, 1 or more")


@dataclass(frozen=True)
class Collection:
    """Pictures in a fixed order, and what their classes are called.

    Parameters
    ----------
    title
        For rows and messages.
    pictures
        In order; the key of each is its class.
    words
        Key -> words, in the order of class numbers; keys without a picture are classes that do not occur. Empty if
        the pictures have captions and no labels.
    what
        A key is called: ``"folder"`` or ``"label"``.
    notes
        What a result must say about these data.
    """

    title: str
    pictures: Sequence[Picture]
    words: Mapping[str, str]
    what: str = "folder"
    notes: tuple[str, ...] = ()

    def split(self, model: Any, choice: Choice) -> Split:
        """Return the chosen pictures as data, preprocessed as the model does; warns of all that was left out.

        Raises
        ------
        DataError
            If a class cannot be matched, or too many images cannot be read.
        """
        preprocess = preprocessing(model)
        known, found = self._numbered(choice)
        loader = PictureBatches(
            limited([picture for picture in self.pictures if picture.key in found.numbers], choice),
            found.numbers,
            preprocess,
            self.title,
            batch_size=choice.batch_size,
            max_unreadable=choice.max_unreadable,
            notes=(*self.notes, *found.notes),
        )
        columns = sorted(set(found.numbers.values()))
        masked = bool(self.words) and choice.classes is not None and len(columns) < len(known)
        split = Split(
            loader, self.title, classes=known or None, columns=columns if masked else None, progress=choice.progress
        )
        for note in split.notes:
            warnings.warn(note, stacklevel=3)
        return split

    def _numbered(self, choice: Choice) -> tuple[list[str], Numbering]:
        """Return the classes, and the number of each key that is one."""
        if not self.words:
            return [], Numbering({UNLABELLED: 0}, ())
        if choice.classes is None:
            known = own_classes(self.title, self.words, self.what)
            return known, Numbering({key: number for number, key in enumerate(self.words)}, ())
        occurring = {picture.key for picture in self.pictures}
        words = {key: word for key, word in self.words.items() if key in occurring}
        return [*choice.classes], numbering(self.title, words, choice.classes, subset=choice.subset, what=self.what)


def limited(pictures: Sequence[Picture], choice: Choice) -> list[Picture]:
    """Return at most ``choice.limit`` pictures in their order, as even over the classes as they allow."""
    if choice.limit is None:
        return [*pictures]
    keys = np.unique([picture.key for picture in pictures], return_inverse=True)[1]
    return [pictures[i] for i in np.sort(stratified(keys, choice.limit, choice.seed))]


def preprocessing(model: Any) -> Callable[[Image.Image], Tensor]:
    """Return the preprocessing of a model, or the model itself if it is a function from a picture to a tensor."""
    found = getattr(model, "preprocess", model)
    if isinstance(found, nn.Module | type) or not callable(found):
        raise UsageError(
            f"a {type(model).__name__} has no preprocessing of images",
            "what sharpscope.load returned, or a function PIL image -> tensor",
        )
    preprocess: Preprocess = found
    return preprocess
