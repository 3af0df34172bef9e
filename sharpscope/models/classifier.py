"""The image tower of a CLIP with a head of one row per class on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from sharpscope.errors import DataError

ImageFeatures = Callable[[nn.Module, Tensor], Tensor]
TextFeatures = Callable[[Any, Mapping[str, Tensor]], Tensor]
TEXTS = 256  # encoded at once


@dataclass(frozen=True)
class Head:
    """Rows (classes, width) that features are multiplied with, in units of the logit scale, and an additive bias.

    The rows of a zero-shot head have length 1; those of a fine-tuned head need not.
    """

    rows: Tensor
    bias: Tensor | None = None

    def with_bias(self) -> Head:
        """Return the same head with a bias, zero if it had none."""
        return self if self.bias is not None else Head(self.rows, self.rows.new_zeros(len(self.rows)))


class ImageClassifier(nn.Module):
    """Logits ``exp(logit_scale) * cos(image, class)`` of a CLIP's image tower.

    Parameters carry the names they have in the CLIP (``vision_model.*``, ``visual_projection.weight``; ``visual.*``),
    and ``head.weight`` of shape (classes, width). The text tower is no part of it. ``logit_scale`` is a buffer in the
    units of the CLIP's own, not a parameter: a scale that moved along the path would multiply every curvature by
    its square.

    Parameters
    ----------
    towers
        The modules of the image side by their names in the CLIP; shared, not copied.
    features
        Function of this module and images (n, 3, height, width) that returns image features (n, width).
    head
        One row per class.
    logit_scale
        Scalar.
    size
        Height and width of the images.
    logit_bias
        Scalar added to every logit (SigLIP).
    """

    logit_scale: Tensor
    logit_bias: Tensor | None

    def __init__(
        self,
        towers: Mapping[str, nn.Module],
        features: ImageFeatures,
        head: Head,
        logit_scale: Tensor,
        size: tuple[int, int],
        *,
        logit_bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        for name, tower in towers.items():
            self.add_module(name, tower)
        classes, width = head.rows.shape
        self.head = nn.Linear(width, classes, bias=head.bias is not None, device="meta")
        self.head.weight = nn.Parameter(head.rows)
        if head.bias is not None:
            self.head.bias = nn.Parameter(head.bias)
        self.register_buffer("logit_scale", logit_scale.detach().clone())
        self.register_buffer("logit_bias", None if logit_bias is None else logit_bias.detach().clone())
        self._features = features
        self._size = size
        self.eval()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits (n, classes) of images (n, 3, height, width)."""
        check_pixels(pixel_values, self._size)
        logits: Tensor = self.logit_scale.exp() * self.head(normalize(self._features(self, pixel_values), dim=-1))
        return logits if self.logit_bias is None else logits + self.logit_bias


def check_pixels(pixel_values: Tensor, size: tuple[int, int]) -> None:
    """Raise ``DataError`` unless these are preprocessed images (n, 3, height, width) of the model's size."""
    if not pixel_values.is_floating_point():
        raise DataError(
            f"the images are {pixel_values.dtype}, not scaled and normalised as the model takes them",
            "sharpscope.folder(path, model), sharpscope.images(dataset, model), or model.preprocess on each picture",
        )
    if pixel_values.shape[1:] != (3, *size):
        raise DataError(
            f"the images are {tuple(pixel_values.shape[1:])}, the model takes {(3, *size)}",
            "sharpscope.folder(path, model) applies the model's own preprocessing",
        )


def mean_direction(features: Tensor, classes: int) -> Tensor:
    """Return one unit vector per class, (classes, width), of text features (classes * templates, width).

    Every feature is normalised; their mean over templates is normalised again (WiSE-FT, arXiv 2109.01903).
    """
    by_class = normalize(features, dim=-1).reshape(classes, -1, features.shape[-1])
    found: Tensor = normalize(by_class.mean(dim=1), dim=-1)
    return found


def fixed_head(weight: Tensor, bias: Tensor | None, logit_scale: Tensor) -> Head:
    """Return a head stored with its scale in it, as WiSE-FT does, in units of the scale.

    ``normalize(x) @ weight.T + bias == exp(scale) * (normalize(x) @ rows.T + bias / exp(scale))``.
    """
    scale = logit_scale.detach().exp()
    kept = None if bias is None or not bool(torch.any(bias)) else bias.float() / scale
    return Head(weight.float() / scale, kept)
