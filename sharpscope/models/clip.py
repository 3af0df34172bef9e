"""A CLIP checkpoint: weights, tokenizer and preprocessing, and the classifier they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from sharpscope.errors import DataError, UsageError
from sharpscope.models.classifier import TEXTS, Head, ImageClassifier, fixed_head, mean_direction
from sharpscope.models.conversion import CONVERSIONS
from sharpscope.models.library import ClipLibrary
from sharpscope.models.openclip import OpenClip, as_own
from sharpscope.models.templates import prompted
from sharpscope.models.tensors import Renamed, stored_head, without_head
from sharpscope.models.transfer import (
    check_same_library,
    library_of,
    load_into,
    lone_tower,
    may_be_absent,
    of_tower,
    own_names,
    prefixed,
)

if TYPE_CHECKING:
    from PIL.Image import Image


class ClipModel:
    """A CLIP as :func:`load` read it.

    Attributes
    ----------
    name
        The reference it was loaded by.
    library
        The CLIP as its library knows it; see :class:`sharpscope.models.library.ClipLibrary`.
    network
        The ``transformers.CLIPModel``, ``open_clip.CLIP`` etc., float32, in evaluation mode.
    templates
        Sentences that class names are put into.
    where
        The directory or file that the weights were read from, None if that is a name.
    stored_head
        Weight and bias of a head that the checkpoint brings along (WiSE-FT), scale included.
    notes
        What a result must say about the model.
    """

    def __init__(
        self,
        name: str,
        library: ClipLibrary,
        templates: tuple[str, ...],
        *,
        where: Path | None = None,
        stored_head: tuple[Tensor, Tensor | None] | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.library = library
        self.templates = templates
        self.where = where
        self.stored_head = stored_head
        self.notes = notes

    @property
    def network(self) -> Any:
        """The module of the library that holds both towers."""
        return self.library.network

    @property
    def tokenizer(self) -> Any:
        """The library's tokenizer; ``ModelError`` if the checkpoint has none."""
        return self.library.tokenizer  # type: ignore[attr-defined]

    @property
    def image_processor(self) -> Any:
        """The library's image preprocessing; ``ModelError`` if the checkpoint has none."""
        return self.library.image_processor  # type: ignore[attr-defined]

    def preprocess(self, image: Image) -> Tensor:
        """Return the image as the model takes it, (3, height, width) float32."""
        return self.library.preprocess(image)

    def head(self, classes: Sequence[str], words: ClipModel) -> Head:
        """Return one row per class: the head stored with the checkpoint, or a zero-shot head.

        Parameters
        ----------
        classes
            Words that go into the templates, in the order of the logits.
        words
            The model whose tokenizer, templates and logit scale are taken.
        """
        if not classes or isinstance(classes, str):
            raise UsageError(f"classes={classes!r}: needs a list of class names", "e.g. ['cat', 'dog']")
        if self.stored_head is None:
            return zero_shot_head(self.library, words.library, classes, words.templates)
        if len(self.stored_head[0]) != len(classes):
            raise DataError(
                f"the head in {self.name} has {len(self.stored_head[0])} classes, the data {len(classes)}",
                "data with the classes that it was trained on, in their order",
            )
        return fixed_head(*self.stored_head, words.network.logit_scale)

    def classifier(
        self, classes: Sequence[str], *, like: ClipModel | None = None, head: Head | None = None
    ) -> ImageClassifier:
        """Return the image tower with a head of these classes; its weights are shared with this model.

        Parameters
        ----------
        classes
            Words that go into the templates, in the order of the logits.
        like
            A model whose tokenizer, templates and logit scale are taken instead of its own: the other end of a path.
        head
            Default: see :meth:`head`.
        """
        words = like or self
        rows = head or self.head(classes, words)
        return ImageClassifier(
            {name: getattr(self.network, name) for name in self.library.towers},
            self.library.image_features,
            rows,
            words.network.logit_scale,
            self.library.size,
            logit_bias=None if self.stored_head else getattr(words.network, "logit_bias", None),
        )

    def with_tensors(
        self, name: str, tensors: Mapping[str, Tensor], *, where: Path | None = None, convert: bool = False
    ) -> ClipModel:
        """Return a copy of this model with other weights: those of a file, or of a model of the other library.

        One tower without the other is taken, with or without its prefix; the other tower is then this model's.

        Raises
        ------
        MismatchError
            If they are of another architecture, or of the other library and ``convert`` is not set.
        ModelError
            If they are incomplete, or not finite.
        """
        head, bare = stored_head(tensors), cast(Mapping[str, Tensor], without_head(tensors))
        own = self.network.state_dict()
        if convert and library_of(bare)[0] not in ("", self.library.name):
            bare = CONVERSIONS[self.library.name](Renamed(bare, prefixed(bare)))
        check_same_library(own, bare, (self.name, name))
        if isinstance(self.library, OpenClip):
            bare = as_own(bare, self.network)
        names = own_names(own, bare)
        notes: tuple[str, ...] = ()
        if (tower := lone_tower(names)) is not None:
            names = {own_name: names[own_name] for own_name in of_tower(names, tower)}
            notes = (f"{name} holds one tower only, {tower}; the rest is that of {self.name}",)
        library = copy(self.library)
        library.network = deepcopy(self.network)
        optional = may_be_absent(own, tower)
        load_into(library.network, Renamed(bare, names), where or name, optional=optional)
        return ClipModel(name, library, self.templates, where=where, stored_head=head, notes=notes)

    def __repr__(self) -> str:
        size = sum(tensor.numel() for tensor in self.network.parameters())
        height, width = self.library.size
        return (
            f"CLIP {self.name} ({self.library.name}): {size:,} weights, {height} x {width} pixels, "
            f"{len(self.templates)} templates"
        )


@torch.no_grad()
def zero_shot_head(clip: ClipLibrary, words: ClipLibrary, classes: Sequence[str], templates: Sequence[str]) -> Head:
    """Return one unit vector per class; see :func:`sharpscope.models.classifier.mean_direction`.

    Parameters
    ----------
    clip
        Whose text tower is read.
    words
        Whose tokenizer is used.
    classes, templates
        Every class is put into every template.
    """
    texts = [text for prompts in prompted(classes, templates) for text in prompts]
    tokens = (words.tokens(texts[at : at + TEXTS]) for at in range(0, len(texts), TEXTS))
    parts = [clip.text_features(clip.network, some) for some in tokens]
    return Head(mean_direction(torch.cat(parts), len(classes)))
