"""A CLIP checkpoint: weights, tokenizer and preprocessing, and the classifier they make."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sharpscope.errors import UsageError
from sharpscope.models import checkpoint
from sharpscope.models.classifier import ImageClassifier, zero_shot_head
from sharpscope.models.templates import DEFAULT, checked_templates

if TYPE_CHECKING:
    from PIL.Image import Image


class ClipModel:
    """A CLIP as :func:`load` read it.

    Attributes
    ----------
    name
        The reference it was loaded by.
    where
        The directory or hub id that it was read from.
    network
        The ``transformers.CLIPModel``, float32, in evaluation mode.
    templates
        Sentences that class names are put into.
    """

    def __init__(self, name: str, where: str, network: Any, templates: tuple[str, ...]) -> None:
        self.name = name
        self.network = network
        self.templates = templates
        self.where = where

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers; ``ModelError`` if the checkpoint has none."""
        return checkpoint.read_tokenizer(self.where)

    @cached_property
    def image_processor(self) -> Any:
        """The image processor of transformers, the one without torchvision; ``ModelError`` if there is none."""
        return checkpoint.read_image_processor(self.where)

    def classifier(self, classes: Sequence[str], *, like: ClipModel | None = None) -> ImageClassifier:
        """Return the image tower with a zero-shot head of these classes; its weights are shared with this model.

        Parameters
        ----------
        classes
            Words that go into the templates, in the order of the logits.
        like
            A model whose tokenizer, templates and logit scale are taken instead of its own: the other end of a path.
        """
        if not classes or isinstance(classes, str):
            raise UsageError(f"classes={classes!r}: needs a list of class names", "e.g. ['cat', 'dog']")
        words = like or self
        head = zero_shot_head(self.network, words.tokenizer, classes, words.templates)
        return ImageClassifier(self.network, head, words.network.logit_scale)

    def preprocess(self, image: Image) -> Tensor:
        """Return the image as the model takes it, (3, height, width) float32."""
        found = self.image_processor(images=image, return_tensors="pt")["pixel_values"]
        return torch.as_tensor(found)[0]

    def __repr__(self) -> str:
        vision = self.network.config.vision_config
        size = sum(tensor.numel() for tensor in self.network.parameters())
        return (
            f"CLIP {self.name}: {size:,} weights, {vision.num_hidden_layers} vision blocks, "
            f"{vision.image_size} pixels, {len(self.templates)} templates"
        )


def load(ref: str | Path, *, templates: Iterable[str] | None = None) -> ClipModel:
    """Return the CLIP that a reference means, ready for :func:`sharpscope.scan` and :func:`sharpscope.folder`.

    Parameters
    ----------
    ref
        A directory as ``CLIPModel.save_pretrained`` writes it, with the files of tokenizer and image processor, or
        a hub id such as ``openai/clip-vit-base-patch32``; either may be preceded by ``hf:``.
    templates
        Sentences with ``{}`` for the class name; default ``"a photo of a {}."``.

    Raises
    ------
    ModelError
        If the checkpoint is damaged, incomplete, not a CLIP, or pickled code; nothing of it is executed.
    UsageError
        If nothing is there, a template has no place for the class name, or transformers is not installed.
    """
    sentences = checked_templates(DEFAULT if templates is None else templates)
    checkpoint.transformers()
    where = checkpoint.source(ref)
    checkpoint.read_config(where)
    return ClipModel(str(ref), where, checkpoint.read_model(where), sentences)
