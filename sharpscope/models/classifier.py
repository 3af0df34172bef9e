"""The image tower of a CLIP with a zero-shot head on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from sharpscope.errors import DataError, UsageError

_TEXTS = 256  # encoded at once


class ImageClassifier(nn.Module):
    """Logits ``exp(logit_scale) * cos(image, class)`` of a CLIP's image tower.

    Parameters carry the names they have in the CLIP (``vision_model.*``, ``visual_projection.weight``), and
    ``head.weight`` of shape (classes, width). The text tower is no part of it. ``logit_scale`` is a buffer in the
    units of the CLIP's own, not a parameter: a scale that moved along the path would multiply every curvature by
    its square.

    Parameters
    ----------
    network
        The ``CLIPModel``; its image tower is shared, not copied.
    head
        Unit vectors, one per class.
    logit_scale
        Scalar.
    """

    logit_scale: Tensor

    def __init__(self, network: Any, head: Tensor, logit_scale: Tensor) -> None:
        super().__init__()
        self.vision_model = network.vision_model
        self.visual_projection = network.visual_projection
        self.head = nn.Linear(head.shape[1], head.shape[0], bias=False, device="meta")
        self.head.weight = nn.Parameter(head)
        self.register_buffer("logit_scale", logit_scale.detach().clone())
        self._side = int(network.config.vision_config.image_size)
        self.eval()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits (n, classes) of images (n, 3, side, side)."""
        if pixel_values.shape[1:] != (3, self._side, self._side):
            raise DataError(
                f"the images are {tuple(pixel_values.shape[1:])}, the model takes (3, {self._side}, {self._side})",
                "sharpscope.folder(path, model) applies the model's own preprocessing",
            )
        features = self.visual_projection(self.vision_model(pixel_values).pooler_output)
        logits: Tensor = self.head(normalize(features, dim=-1))
        return self.logit_scale.exp() * logits


def token_ids(tokenizer: Any, texts: Sequence[str], longest: int) -> dict[str, Tensor]:
    """Return padded token ids and their mask.

    Raises
    ------
    UsageError
        If a text is longer than the text tower reads, or holds characters outside the vocabulary: CLIP's unknown
        token is its end token, at which the tower stops reading.
    """
    found = tokenizer(list(texts), padding=True, return_tensors="pt")
    ids, mask = found["input_ids"], found["attention_mask"]
    for text, row, used in zip(texts, ids, mask.sum(dim=1).tolist(), strict=True):
        if used > longest:
            raise UsageError(f"{text!r} has {used} tokens, the text tower reads {longest}", "shorten it")
        if tokenizer.unk_token_id in row[1 : used - 1].tolist():
            raise UsageError(
                f"{text!r} holds characters that the model's tokenizer does not know",
                "other class names or templates; check upper case, accents and punctuation",
            )
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def zero_shot_head(network: Any, tokenizer: Any, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return one unit vector per class, (classes, width).

    Per class every template is encoded and normalised; their mean is normalised again (WiSE-FT, arXiv 2109.01903).
    """
    texts = [template.replace("{}", name) for name in classes for template in templates]
    longest = network.config.text_config.max_position_embeddings
    parts = []
    for start in range(0, len(texts), _TEXTS):
        inputs = token_ids(tokenizer, texts[start : start + _TEXTS], longest)
        found = network.get_text_features(**inputs)
        features = getattr(found, "pooler_output", found)  # an object since transformers 5, a tensor before
        parts.append(normalize(features, dim=-1))
    by_class: Tensor = torch.cat(parts).reshape(len(classes), len(templates), -1)
    return normalize(by_class.mean(dim=1), dim=-1)
