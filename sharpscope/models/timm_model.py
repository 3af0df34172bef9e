"""Image classifiers of timm, with the preprocessing that timm keeps for each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sharpscope.errors import ModelError, UsageError
from sharpscope.models.installed import first_line, imported
from sharpscope.models.library import plain
from sharpscope.models.tensors import Tensors
from sharpscope.models.transfer import lacking, load_into

_HEADS = ("head.fc", "head", "fc", "classifier", "head.l")  # of architectures that timm has no word of


def is_timm(config: Mapping[str, Any]) -> bool:
    """Return whether a ``config.json`` is one that timm wrote."""
    return "architecture" in config and "model_type" not in config


def _made(name: str, **options: Any) -> nn.Module:
    timm = imported("timm")
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0][:12]}*")[:3]
        raise UsageError(f"timm has no model {name!r}", f"one of {', '.join(near)}" if near else "timm.list_models()")
    random = torch.get_rng_state()
    try:
        network: nn.Module = timm.create_model(name, **options)
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"timm cannot make {name}: {first_line(error)}", "check the network, or give a file: timm:NAME/FILE"
        ) from error
    finally:
        torch.set_rng_state(random)
    return network.float().eval()


def read_pretrained(name: str) -> nn.Module:
    """Return a pretrained model of timm, downloaded if need be."""
    return _made(name, pretrained=True)


def read_file(name: str, tensors: Tensors) -> nn.Module:
    """Return a model of a named architecture with these weights; the head tells the number of classes."""
    weights = (f"{head}.weight" for head in (*_heads(name), *_HEADS))
    classes = next((len(tensors[weight]) for weight in weights if weight in tensors), 0)
    network = _made(name, pretrained=False, num_classes=classes)
    load_into(network, tensors.fitting(lacking(network, ())), tensors.where)
    return network


def _heads(name: str) -> tuple[str, ...]:
    """Return what timm calls the last layer of an architecture, or the layers of one with several heads."""
    found = getattr(imported("timm").get_pretrained_cfg(name), "classifier", None) or ()
    return (found,) if isinstance(found, str) else tuple(found)


def read_directory(where: Path, tensors: Tensors) -> tuple[nn.Module, list[str] | None]:
    """Return the model of a directory as timm saves it for the hub, and its class names if it has them."""
    config = json.loads((where / "config.json").read_text(encoding="utf-8"))
    options = dict(config.get("model_args") or {})
    if "num_classes" in config:
        options.setdefault("num_classes", config["num_classes"])
    if config.get("global_pool"):
        options.setdefault("global_pool", config["global_pool"])
    network = _made(
        config["architecture"], pretrained=False, pretrained_cfg_overlay=config.get("pretrained_cfg"), **options
    )
    load_into(network, tensors, where)
    names = config.get("label_names")
    return network, [str(name) for name in names] if names else None


def is_wrapped(network: nn.Module) -> bool:
    """Return whether this is a model of timm inside transformers' ``TimmWrapperForImageClassification``."""
    return hasattr(network, "timm_model")


def _settings(network: nn.Module) -> dict[str, Any]:
    # The wrapper has no preprocessor_config.json: what timm would keep on the network lies in its config.json.
    stored = getattr(network.config, "pretrained_cfg", None) if is_wrapped(network) else None
    inner = network.timm_model if is_wrapped(network) else network
    found: dict[str, Any] = imported("timm").data.resolve_model_data_config(inner, pretrained_cfg=stored)
    return found


def data_config(network: nn.Module) -> dict[str, Any]:
    """Return size, mean, standard deviation, interpolation and crop that the model was made for."""
    return {name: plain(value) for name, value in _settings(network).items()}


def transform(network: nn.Module) -> Any:
    """Return the function from a PIL image to the model's input."""
    return imported("timm").data.create_transform(**_settings(network), is_training=False)
