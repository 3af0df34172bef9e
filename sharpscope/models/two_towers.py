"""Both towers of a CLIP as one function of their weights: images against class texts, or against texts of their own."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import normalize

from sharpscope.models.classifier import TEXTS, TextFeatures, check_pixels, mean_direction
from sharpscope.models.library import ClipLibrary
from sharpscope.models.templates import prompted

IMAGE = "image"
_SCALE = ("logit_scale", "logit_bias")


class TwoTowers(nn.Module):
    """A CLIP whose zero-shot head is made anew in every forward, as a function of the text tower's weights.

    Parameters carry the names they have in the CLIP. Scale and bias are buffers, as in
    :class:`sharpscope.models.classifier.ImageClassifier`.

    Parameters
    ----------
    library
        The CLIP; its modules are shared, not copied.
    words
        The CLIP whose tokenizer is used.
    classes, templates
        Every class is put into every template.
    logit_scale, logit_bias
        Scalars.

    Notes
    -----
    Cost of a forward: all class texts through the text tower, besides the images. Without gradients the head is kept
    while the text tower's weights stay the same tensors.
    """

    logit_scale: Tensor
    logit_bias: Tensor | None

    def __init__(
        self,
        library: ClipLibrary,
        words: ClipLibrary,
        classes: Sequence[str],
        templates: Sequence[str],
        logit_scale: Tensor,
        *,
        logit_bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        clip = library.network
        for name, child in clip.named_children():
            self.add_module(name, child)
        for name, parameter in clip.named_parameters(recurse=False):
            if name not in _SCALE:
                self.register_parameter(name, parameter)
        for name, buffer in clip.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=False)
        self._at_root = [*self._parameters, *self._buffers]
        self.register_buffer("logit_scale", logit_scale.detach().clone())
        self.register_buffer("logit_bias", None if logit_bias is None else logit_bias.detach().clone())
        self.prompts = prompted(classes, templates)
        self.tokens = words.tokens
        for name, tokens in self.tokens([text for texts in self.prompts for text in texts]).items():
            self.register_buffer(f"class_{name}", tokens)
        # In a tuple: its modules are children of this one already.
        self._text_tower = (_TextTower(clip, library.text_features),)
        self._image_features, self._image_side, self._size = library.image_features, library.towers, library.size
        self._known: tuple[list[tuple[weakref.ref[Tensor], int]], Tensor] | None = None
        self.eval()

    def forward(self, inputs: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Return logits (n, classes) of images (n, 3, height, width).

        Of a mapping with the images as ``image`` and tokens of as many texts: similarities (n, n), images in rows.
        """
        images = inputs if isinstance(inputs, Tensor) else inputs[IMAGE]
        check_pixels(images, self._size)
        features = normalize(self._image_features(self, images), dim=-1)
        if isinstance(inputs, Tensor):
            texts = self._head()
        else:
            texts = normalize(self._texts({name: t for name, t in inputs.items() if name != IMAGE}), dim=-1)
        logits: Tensor = self.logit_scale.exp() * features @ texts.T
        return logits if self.logit_bias is None else logits + self.logit_bias

    def _texts(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Return text features by the library's own function, with the tensors that stand here now."""
        root = {f"clip.{name}": getattr(self, name) for name in self._at_root}
        features: Tensor = functional_call(self._text_tower[0], root, (dict(tokens),))
        return features

    def _head(self) -> Tensor:
        """Return one unit vector per class."""
        now: list[Tensor] = [t for name, t in self.named_parameters() if name.partition(".")[0] not in self._image_side]
        # Tensors that are differentiated may be written to where autograd does not see it.
        if torch.is_grad_enabled() or any(tensor.requires_grad for tensor in now):
            return self._made_head()
        if self._known is None or not _are(self._known[0], now):
            self._known = ([(weakref.ref(t), t._version) for t in now], self._made_head())
        return self._known[1]

    def _made_head(self) -> Tensor:
        tokens = {
            name.removeprefix("class_"): t for name, t in self.named_buffers(recurse=False) if name.startswith("class_")
        }
        count = len(next(iter(tokens.values())))
        parts = [self._texts({n: t[at : at + TEXTS] for n, t in tokens.items()}) for at in range(0, count, TEXTS)]
        return mean_direction(torch.cat(parts), len(self.prompts))


class _TextTower(nn.Module):
    """The text side of a CLIP as a forward, so that ``functional_call`` can put tensors in at its root."""

    def __init__(self, clip: nn.Module, features: TextFeatures) -> None:
        super().__init__()
        self.clip = clip
        self._features = features

    def forward(self, tokens: Mapping[str, Tensor]) -> Any:
        return self._features(self.clip, tokens)


def _are(known: Sequence[tuple[weakref.ref[Tensor], int]], now: Sequence[Tensor]) -> bool:
    """Return whether these are the same tensors, not written to since."""
    return len(known) == len(now) and all(
        reference() is tensor and version == tensor._version
        for (reference, version), tensor in zip(known, now, strict=True)
    )
