"""Reading what transformers saved, and saying in a sentence why it cannot be read. No code from a checkpoint runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sharpscope.errors import ModelError
from sharpscope.models.installed import first_line, imported
from sharpscope.models.tensors import read_tensors
from sharpscope.models.transfer import check_finite_weights, lacking, other_shape
from sharpscope.models.weight_files import UNREADABLE, is_pickled_code

__all__ = ["is_pickled_code", "read_config", "read_image_processor", "read_model", "read_tokenizer", "transformers"]

_PATIENCE = 5.0  # seconds that the hub is waited for
SHARED_FILES = "model.save_pretrained(DIR) and processor.save_pretrained(DIR) write everything that is needed"


def transformers() -> ModuleType:
    """Return the library; ``UsageError`` if it is not installed or cannot import its CLIP."""
    return imported("transformers", "CLIPModel")


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back progress bars and notices of transformers: what matters in them is raised here as an error."""
    logging = transformers().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@cache
def _hub_is_reachable() -> bool:
    """Return whether the hub answers at all: one attempt, where the libraries would repeat theirs for half a minute."""
    import huggingface_hub

    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url("gpt2", "config.json"), timeout=_PATIENCE)
    except (huggingface_hub.errors.HfHubHTTPError, ValueError):
        return True  # it answered, whatever it said
    except Exception:
        return False
    return True


def _offline(where: str) -> bool:
    """Return whether only files on this disk can be read."""
    return Path(where).is_dir() or not _hub_is_reachable()


def read_config(where: str) -> dict[str, Any]:
    """Return the configuration as stored.

    Raises
    ------
    ModelError
        If there is none, or it is unreadable.
    """
    with quiet():
        try:
            found: dict[str, Any] = transformers().CLIPConfig.get_config_dict(where, local_files_only=_offline(where))[
                0
            ]
        except UNREADABLE as error:
            raise _unreachable(where, error) from error
    if not found:
        below = sorted(file.parent for file in Path(where).glob("*/config.json"))  # runs of a Trainer
        raise ModelError(
            f"{where} has no config.json" + (f", {len(below)} directories in it have" if below else ""),
            f"one of them: {below[-1]}" if below else SHARED_FILES,
        )
    return found


def _unreachable(where: str, error: BaseException) -> ModelError:
    if Path(where).is_dir():
        return ModelError(f"{where} cannot be read: {first_line(error)}", SHARED_FILES)
    return ModelError(
        f"{where!r} is no directory here and could not be fetched from the Hugging Face hub: {first_line(error)}",
        "check the spelling and the network, or download the model and pass its directory",
    )


def read_model(where: str, kind: str) -> Any:
    """Return a model of transformers in float32 and evaluation mode.

    Parameters
    ----------
    where
        Directory or hub id.
    kind
        Class of transformers, e.g. ``"CLIPModel"``.

    Raises
    ------
    ModelError
        If files are missing, damaged, pickled code, or do not hold every weight.
    """
    if Path(where).is_dir():
        stored = read_tensors(Path(where))  # a missing shard, adapters and code are named there
        _check_whole_numbers(where, {name: stored.dtype(name) for name in stored})
    with quiet():
        try:
            model, info = getattr(transformers(), kind).from_pretrained(
                where, output_loading_info=True, local_files_only=_offline(where), trust_remote_code=False
            )
        except UNREADABLE as error:
            raise _unreachable(where, error) from error
    _check_complete(where, info, type(model).__name__)
    model = model.float().eval()
    check_finite_weights(model, where)
    return model


def own_tensors(network: nn.Module, tensors: Mapping[str, Tensor], where: object) -> Mapping[str, Tensor]:
    """Return the tensors of a file under the names that a network of transformers has for them in memory.

    Version 5 saves other names than it computes with (``vit.encoder.layer.0`` for ``vit.layers.0``); the library itself
    renames. Any other network, or names that are the network's own, are left as they are.

    Raises
    ------
    ModelError
        If the library misses a weight or finds one too many.
    MismatchError
        If a shape is another one.
    """
    if "transformers" not in sys.modules or not lacking(network, tensors):
        return tensors
    if not isinstance(network, transformers().PreTrainedModel):
        return tensors
    kind, config = type(network), deepcopy(network.config)
    config.dtype = torch.float32  # else that of the checkpoint which the network came from
    stored = dict(tensors)
    _check_whole_numbers(where, {name: tensor.dtype for name, tensor in stored.items()})
    options = {"state_dict": stored, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with quiet():
        try:
            found, info = kind.from_pretrained(None, config=config, **options)
        except UNREADABLE as error:
            problem = f"{where} cannot be put into a {kind.__name__}: {first_line(error)}"
            raise ModelError(problem, SHARED_FILES) from error
    if mismatched := sorted(info["mismatched_keys"]):
        name, shape, own = mismatched[0]
        raise other_shape(name, shape, own, where)
    _check_complete(where, info, kind.__name__)
    named: Mapping[str, Tensor] = found.state_dict()
    return named


def _check_whole_numbers(where: object, dtypes: Mapping[str, torch.dtype]) -> None:
    """Raise if a weight has one byte: transformers casts it without its scale, to other weights."""
    for name, dtype in dtypes.items():
        if dtype.itemsize == 1 and dtype != torch.bool:
            raise ModelError(
                f"{where}: {name!r} is {dtype}, not a floating-point number of 16 bits or more",
                "save the model before it is quantised",
            )


def _check_complete(where: object, info: dict[str, Any], kind: str) -> None:
    """Raise if a weight was made up: transformers fills what it does not find with random numbers."""
    # A set of names in transformers 5, a list before; a mismatch is a tuple that starts with the name.
    absent = sorted(info["missing_keys"]) + sorted(str(item) for item in info["mismatched_keys"])
    if absent:
        raise ModelError(
            f"{where} lacks {len(absent)} weights of a {kind} ({absent[0]}, ...)",
            "save the whole model, both towers: model.save_pretrained(DIR)",
        )
    besides = [name for name in sorted(info["unexpected_keys"]) if not name.endswith("position_ids")]
    if besides:
        raise ModelError(
            f"{where} holds {len(besides)} weights that a {kind} does not have ({besides[0]}, ...)",
            "merge adapters and remove wrappers before saving: model.save_pretrained(DIR)",
        )


def read_tokenizer(where: str) -> Any:
    """Return the tokenizer; ``ModelError`` if its files are missing or damaged."""
    with quiet():
        try:
            found = transformers().AutoTokenizer.from_pretrained(
                where, trust_remote_code=False, local_files_only=_offline(where)
            )
        except UNREADABLE as error:
            raise ModelError(f"the tokenizer of {where} cannot be read: {first_line(error)}", SHARED_FILES) from error
    # Without any file transformers 5 returns a tokenizer that knows its special tokens only.
    if len(found.get_vocab()) <= len(found.all_special_tokens):
        raise ModelError(f"{where} has no tokenizer (tokenizer.json, or vocab.json and merges.txt)", SHARED_FILES)
    return found


def read_image_processor(where: str) -> Any:
    """Return the image preprocessing that works on PIL images and numpy, not on torchvision.

    Raises
    ------
    ModelError
        If ``preprocessor_config.json`` is missing or damaged.
    """
    library = transformers()
    with quiet():
        try:
            stored = library.ImageProcessingMixin.get_image_processor_dict(where, local_files_only=_offline(where))[0]
            kind = str(
                stored.get("image_processor_type") or stored.get("feature_extractor_type") or "CLIPImageProcessor"
            )
            kind = kind.removesuffix("Pil").removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
            # transformers 5 gave the name of the PIL processor to one that needs torchvision.
            made = getattr(library, f"{kind}Pil", None) or getattr(library, kind)
            return made.from_dict(stored)
        except (*UNREADABLE, AttributeError) as error:
            raise ModelError(
                f"the preprocessing of {where} cannot be read (preprocessor_config.json)", SHARED_FILES
            ) from error
