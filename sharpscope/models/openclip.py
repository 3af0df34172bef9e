"""CLIPs of open_clip: native, with a text tower of their own kind, with a timm trunk, ResNets, SigLIP style, CoCa."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sharpscope.errors import ModelError, UsageError
from sharpscope.models.installed import first_line, imported
from sharpscope.models.library import module_facts, plain
from sharpscope.models.tags import activation_of, preprocessing_of
from sharpscope.models.tensors import Renamed, Tensors, without_head
from sharpscope.models.transfer import (
    check_finite_weights,
    lacking,
    library_of,
    load_into,
    lone_tower,
    may_be_absent,
    of_tower,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from sharpscope.models.classifier import ImageFeatures, TextFeatures

CONFIG = "open_clip_config.json"
_TEXT = ("text_projection", "positional_embedding", "token_embedding", "transformer.", "ln_final.")


def _visual(towers: Any, images: Tensor) -> Tensor:
    found = towers.visual(images)
    features: Tensor = found[0] if isinstance(found, tuple) else found  # CoCa returns its tokens, too
    return features


def _texts(clip: Any, tokens: Mapping[str, Tensor]) -> Tensor:
    features: Tensor = clip.encode_text(tokens["text"])
    return features


class OpenClip:
    """A model of open_clip; see :class:`sharpscope.models.library.ClipLibrary`.

    Attributes
    ----------
    assumed
        Of a file, which says neither preprocessing nor activation: what a result must say of those it is read with.
        None if they are known.
    """

    name = "open_clip"
    towers: tuple[str, ...] = ("visual",)
    assumed: tuple[str, ...] | None = None

    def __init__(self, network: Any, config: str) -> None:
        self.network = network
        self._config = config  # name of a configuration, or local-dir:DIR

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of open_clip; ``ModelError`` if its vocabulary cannot be had."""
        try:
            return imported("open_clip").get_tokenizer(self._config)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise ModelError(
                f"the tokenizer of {self._config} cannot be read: {first_line(error)}",
                "put its files into the directory, or pass the directory of the model with its tokenizer",
            ) from error

    @cached_property
    def image_processor(self) -> Any:
        """The preprocessing of open_clip for evaluation."""
        made = imported("open_clip").transform
        return made.image_transform_v2(made.PreprocessCfg(**self.network.visual.preprocess_cfg), is_train=False)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        found = self.network.visual.image_size
        return (found, found) if isinstance(found, int) else (int(found[0]), int(found[1]))

    @property
    def image_features(self) -> ImageFeatures:
        """See :class:`sharpscope.models.library.ClipLibrary`."""
        return _visual

    def tokens(self, texts: Sequence[str], *, cut: bool = False) -> Mapping[str, Tensor]:
        """Return padded token ids; open_clip itself cuts a text that is too long."""
        try:
            ids: Tensor = self.tokenizer(list(texts))
        except AttributeError as error:  # open_clip before 3.3 beside transformers 5, which dropped what it calls
            raise ModelError(
                f"the tokenizer of {self._config} cannot be run: {first_line(error)}",
                "pip install --upgrade open_clip_torch, to one that goes with the installed transformers",
            ) from error
        longest = ids.shape[1]
        for text, row in () if cut else zip(texts, ids, strict=True):
            if row[-1] != 0 and (used := self._length(text)) > longest:  # 0 pads where nothing was cut
                raise UsageError(f"{text!r} has {used} tokens, the text tower reads {longest}", "shorten it")
        return {"text": ids}

    def _length(self, text: str) -> int:
        """Return how many tokens a text has, start and end included."""
        if hasattr(self.tokenizer, "encode"):
            return len(self.tokenizer.encode(text)) + 2
        inner = getattr(self.tokenizer, "tokenizer", None)  # one of transformers inside
        return 0 if inner is None else len(inner(text)["input_ids"])

    @property
    def text_features(self) -> TextFeatures:
        """See :class:`sharpscope.models.library.ClipLibrary`."""
        return _texts

    def preprocess(self, image: Image) -> Tensor:
        """Return the image as the model takes it, (3, height, width) float32."""
        found: Tensor = self.image_processor(image)
        return found

    def architecture(self) -> Mapping[str, Any]:
        """Return the settings that decide what the weights mean."""
        return {**module_facts(self.network), "image size": list(self.size)}

    def preprocessing(self) -> Mapping[str, Any] | None:
        """Return the settings of the preprocessing."""
        return {f"image_{name}": plain(value) for name, value in self.network.visual.preprocess_cfg.items()}

    def preprocess_as(self, other: OpenClip) -> None:
        """Take the other's preprocessing but for the size of the images, which is the network's own."""
        visual = self.network.visual
        visual.preprocess_cfg = {**other.network.visual.preprocess_cfg, "size": visual.preprocess_cfg["size"]}
        self.__dict__.pop("image_processor", None)

    def vocabulary(self) -> Mapping[str, int] | None:
        """Return the tokens with their numbers, None if the tokenizer shows none."""
        try:
            found: Mapping[str, int] | None = getattr(self.tokenizer, "encoder", None)
        except ModelError:
            return None
        return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back notices: open_clip logs that the weights, which are put in afterwards, are random."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _created(config: str, where: object, **options: Any) -> Any:
    random = torch.get_rng_state()
    try:
        with _quiet():
            return imported("open_clip").create_model(config, **options)
    except (RuntimeError, OSError, ValueError, KeyError, TypeError, AssertionError, AttributeError) as error:
        raise ModelError(
            f"open_clip cannot make {where}: {first_line(error)}",
            "check the name (open_clip.list_models(), open_clip.list_pretrained()) and the network",
        ) from error
    finally:
        torch.set_rng_state(random)


def _untrained(config: str, where: object, **options: Any) -> Any:
    return _created(config, where, load_weights=False, pretrained_image=False, pretrained_text=False, **options)


def check_name(name: str) -> None:
    """Raise ``UsageError`` if open_clip has no configuration of that name; the nearest ones are named."""
    from difflib import get_close_matches

    known = imported("open_clip").list_models()
    if name not in known:
        near = get_close_matches(name, known, n=3)
        raise UsageError(
            f"open_clip has no configuration {name!r}",
            f"one of {', '.join(near)}" if near else "open_clip.list_models()",
        )


def read_tag(name: str, tag: str) -> OpenClip:
    """Return a pretrained model of open_clip, e.g. ``ViT-B-32``, ``laion2b_s34b_b79k``; downloaded if need be.

    Raises
    ------
    UsageError
        If there is no such name or tag.
    ModelError
        If it cannot be downloaded.
    """
    check_name(name)
    found = imported("open_clip")
    tags = found.list_pretrained_tags_by_model(name)
    if tag not in tags:
        raise UsageError(
            f"{tag!r} is neither a file here nor a tag of {name}",
            f"one of {', '.join(tags)}" if tags else "give a file",
        )
    # A tag that was trained with QuickGELU loads silently into a configuration without it (open_clip issue 771).
    quick = bool((found.get_pretrained_cfg(name, tag) or {}).get("quick_gelu"))
    network = _created(name, f"{name}/{tag}", pretrained=tag, force_quick_gelu=quick)
    check_finite_weights(network, f"{name}/{tag}")
    return OpenClip(network.float().eval(), name)


def read_file(name: str, tensors: Tensors, where: Path) -> tuple[OpenClip, bool]:
    """Return a model of a named configuration with these weights, and whether they held one of its towers only."""
    check_name(name)
    settings, said = preprocessing_of(name)
    library, lone = _filled(_untrained(name, name, force_preprocess_cfg=settings), tensors, name, where)
    library.assumed = (*said, *activation_of(name))
    return library, lone


def read_directory(where: Path, tensors: Tensors) -> OpenClip:
    """Return the model of a directory with ``open_clip_config.json``; ``ModelError`` if it is damaged."""
    try:
        stored = json.loads((where / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{where / CONFIG} is no JSON: {first_line(error)}", "copy or save the model anew") from error
    if "model_cfg" not in stored:
        raise ModelError(f"{where / CONFIG} has no 'model_cfg'", "the file that open_clip's save_for_hf writes")
    config = f"local-dir:{where}"
    return _filled(_untrained(config, where), tensors, config, where)[0]


def _filled(network: Any, tensors: Tensors, config: str, where: Path) -> tuple[OpenClip, bool]:
    weights = as_own(without_head(tensors.fitting(lacking(network, ()))), network)
    tower = lone_tower(weights)
    if tower == "visual":  # what else is there is left over from a text tower
        weights = Renamed(weights, {name: name for name in of_tower(weights, tower)})
    load_into(network, weights, where, optional=may_be_absent(network.state_dict(), tower))
    return OpenClip(network.float().eval(), config), tower is not None


def as_own(tensors: Mapping[str, Tensor], network: Any) -> Mapping[str, Tensor]:
    """Return open_clip weights under the names of the network: the text tower at the root, or under ``text.``."""
    if library_of(tensors)[0] != "open_clip":
        return tensors
    if hasattr(network, "token_embedding"):
        return Renamed(tensors, {name.removeprefix("text."): name for name in tensors})
    return Renamed(tensors, {f"text.{name}" if name.startswith(_TEXT) else name: name for name in tensors})
