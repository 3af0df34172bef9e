"""CLIP and SigLIP of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sharpscope.errors import ModelError, UsageError
from sharpscope.models import checkpoint
from sharpscope.models.library import plain

if TYPE_CHECKING:
    from PIL.Image import Image

    from sharpscope.models.classifier import ImageFeatures, TextFeatures

# What changes the function without changing a shape comes first; two of these load silently into each other.
_TOWER = (
    "hidden_act",
    "num_attention_heads",
    "layer_norm_eps",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
)
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_VISION = ("image_size", "patch_size")
_IMAGES = (
    "image_mean",
    "image_std",
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "do_convert_rgb",
)


def _projected(towers: Any, images: Tensor) -> Tensor:
    features: Tensor = towers.visual_projection(towers.vision_model(images).pooler_output)
    return features


def _pooled(towers: Any, images: Tensor) -> Tensor:
    features: Tensor = towers.vision_model(images).pooler_output
    return features


def _texts(clip: Any, tokens: Mapping[str, Tensor]) -> Tensor:
    found = clip.get_text_features(**tokens)
    features: Tensor = getattr(found, "pooler_output", found)  # an object since transformers 5, a tensor before
    return features


class TransformersClip:
    """A ``CLIPModel`` or ``SiglipModel``; see :class:`sharpscope.models.library.ClipLibrary`."""

    name = "transformers"

    def __init__(self, network: Any, where: str) -> None:
        self.network = network
        self.where = where
        self._siglip = network.config.model_type == "siglip"
        self.towers: tuple[str, ...] = ("vision_model",) if self._siglip else ("vision_model", "visual_projection")

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers; ``ModelError`` if the checkpoint has none."""
        return checkpoint.read_tokenizer(self.where)

    @cached_property
    def image_processor(self) -> Any:
        """The image processor of transformers, the one without torchvision; ``ModelError`` if there is none."""
        return checkpoint.read_image_processor(self.where)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        side = int(self.network.config.vision_config.image_size)
        return side, side

    @property
    def image_features(self) -> ImageFeatures:
        """See :class:`sharpscope.models.library.ClipLibrary`."""
        return _pooled if self._siglip else _projected

    def tokens(self, texts: Sequence[str], *, cut: bool = False) -> Mapping[str, Tensor]:
        """Return padded token ids and their mask; SigLIP reads all its places and has no mask."""
        longest = self.network.config.text_config.max_position_embeddings
        if self._siglip:
            found = _token_ids(self.tokenizer, texts, longest, padding="max_length", cut=cut)
            return {"input_ids": found["input_ids"]}
        return _token_ids(self.tokenizer, texts, longest, padding="longest", cut=cut)

    @property
    def text_features(self) -> TextFeatures:
        """See :class:`sharpscope.models.library.ClipLibrary`."""
        return _texts

    def preprocess(self, image: Image) -> Tensor:
        """Return the image as the model takes it, (3, height, width) float32."""
        found = self.image_processor(images=image, return_tensors="pt")["pixel_values"]
        return torch.as_tensor(found)[0]

    def architecture(self) -> Mapping[str, Any]:
        """Return the settings that decide what the weights mean."""
        config = self.network.config
        found = {"projection_dim": getattr(config, "projection_dim", None)}
        for tower in ("vision_config", "text_config"):
            part = getattr(config, tower)
            names = _TOWER + (_VISION if tower == "vision_config" else ())
            found |= {f"{tower}.{name}": getattr(part, name) for name in names}
        return found

    def preprocessing(self) -> Mapping[str, Any] | None:
        """Return the settings of the preprocessing, None if the checkpoint has none."""
        try:
            stored = self.image_processor.to_dict()
        except ModelError:
            return None
        return {name: plain(stored.get(name)) for name in _IMAGES}

    def vocabulary(self) -> Mapping[str, int] | None:
        """Return the tokens with their numbers, None if the checkpoint has no tokenizer."""
        try:
            found: dict[str, int] = self.tokenizer.get_vocab()
        except ModelError:
            return None
        return found


def _token_ids(tokenizer: Any, texts: Sequence[str], longest: int, *, padding: str, cut: bool) -> dict[str, Tensor]:
    """Return padded token ids and their mask.

    Raises
    ------
    UsageError
        If a text is longer than the text tower reads and not to be cut, or holds characters outside the vocabulary:
        CLIP's unknown token is its end token, at which the tower stops reading.
    """
    length = longest if padding == "max_length" or cut else None
    form = {"return_attention_mask": True, "return_tensors": "pt"}
    found = tokenizer(list(texts), padding=padding, truncation=cut, max_length=length, **form)
    ids, mask = found["input_ids"], found["attention_mask"]
    for text, row, read in zip(texts, ids, mask, strict=True):
        used = row[read.bool()]
        if len(used) > longest:
            raise UsageError(f"{text!r} has {len(used)} tokens, the text tower reads {longest}", "shorten it")
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in used[1:-1].tolist():
            raise UsageError(
                f"{text!r} holds characters that the model's tokenizer does not know",
                "other class names or templates; check upper case, accents and punctuation",
            )
    return {"input_ids": ids, "attention_mask": mask}


def is_bare_tower(config: Mapping[str, Any]) -> bool:
    """Return whether a configuration is that of one tower: weights that need a whole model to be put into."""
    kinds = ("clip_vision_model", "clip_text_model", "siglip_vision_model", "siglip_text_model")
    return config.get("model_type") in kinds


def tower_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the configuration of one tower says about its function, as ``module_facts`` says it of a network."""
    kind, made = str(config["model_type"]), checkpoint.transformers()
    library = "Siglip" if kind.startswith("siglip") else "CLIP"
    stored = getattr(made, f"{library}{'Vision' if 'vision' in kind else 'Text'}Config")(**config)
    tower = f"{'image' if 'vision' in kind else 'text'} tower"
    activation = str(stored.hidden_act)
    return {
        f"activation of the {tower}": _ACTIVATIONS.get(activation, activation),
        f"attention heads of the {tower}": stored.num_attention_heads,
        f"layer norm epsilon of the {tower}": stored.layer_norm_eps,
    }


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Return whether a configuration is that of a model with its own head."""
    return any(str(name).endswith("ForImageClassification") for name in config.get("architectures") or ())


def read_clip(where: str, config: Mapping[str, Any]) -> TransformersClip:
    """Return the CLIP of a directory or hub id; ``ModelError`` if it is damaged, incomplete or pickled code."""
    kind = "SiglipModel" if config.get("model_type") == "siglip" else "CLIPModel"
    return TransformersClip(checkpoint.read_model(where, kind), where)


def read_classifier(where: str) -> tuple[nn.Module, list[str] | None]:
    """Return a model for image classification and its class names, None if it has numbers only."""
    network = checkpoint.read_model(where, "AutoModelForImageClassification")
    names = [str(network.config.id2label[number]) for number in sorted(network.config.id2label)]
    given = any(name != f"LABEL_{number}" for number, name in enumerate(names))
    return network, names if given else None
