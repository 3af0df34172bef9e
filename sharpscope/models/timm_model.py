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

_HEADS = ("head.fc.weight", "head.weight", "fc.weight", "classifier.weight", "head.l.weight")


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
    classes = next((len(tensors[head]) for head in _HEADS if head in tensors), 0)
    network = _made(name, pretrained=False, num_classes=classes)
    load_into(network, tensors.fitting(lacking(network, ())), tensors.where)
    return network


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


def data_config(network: nn.Module) -> dict[str, Any]:
    """Return size, mean, standard deviation, interpolation and crop that the model was made for."""
    found = imported("timm").data.resolve_model_data_config(network)
    return {name: plain(value) for name, value in found.items()}


def transform(network: nn.Module) -> Any:
    """Return the function from a PIL image to the model's input."""
    timm = imported("timm")
    return timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)
