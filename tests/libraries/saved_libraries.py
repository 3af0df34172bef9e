"""Small random models saved by open_clip and timm in their real formats; see tests/saved.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import clips
import torch
from saved import CLASSES, Saved, moved
from torch import Tensor

TEXT = {"context_length": 40, "width": 16, "heads": 2, "layers": 2, "vocab_size": len(clips.tokenizer())}
VIT = {"image_size": clips.SIDE, "patch_size": 8, "width": 128, "layers": 2, "head_width": 64}
TRUNK = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}
SIGLIP_TRUNK = {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none", "image_size": 160}
SIGLIP_TEXT = {
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
    "act_kwargs": {"approximate": "tanh"},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "ViT": {"embed_dim": 8, "vision_cfg": VIT, "text_cfg": TEXT, "quick_gelu": True},
    "CustomTextCLIP": {"embed_dim": 8, "vision_cfg": VIT, "text_cfg": TEXT, "custom_text": True},
    "timm trunk": {"embed_dim": 8, "vision_cfg": TRUNK, "text_cfg": TEXT, "custom_text": True},
    "ConvNeXt trunk": {
        "embed_dim": 8,
        "vision_cfg": TRUNK | {"timm_model_name": "test_convnext", "timm_pool": ""},
        "text_cfg": TEXT,
    },
    "SigLIP": {
        "embed_dim": 96,
        "vision_cfg": SIGLIP_TRUNK,
        "text_cfg": TEXT | SIGLIP_TEXT,
        "custom_text": True,
        "init_logit_scale": 2.0,
        "init_logit_bias": -3.0,
    },
    "ResNet": {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
        "text_cfg": TEXT,
    },
}


def config(kind: str) -> dict[str, Any]:
    """A configuration as open_clip keeps it; its tokenizer lies in the model's directory."""
    found = copy.deepcopy(CONFIGS[kind])
    found["text_cfg"]["hf_tokenizer_name"] = "here"
    return found


def made(kind: str, seed: int = 0) -> Any:
    """The network by open_clip's own classes; its weights are large enough to tell images apart."""
    import open_clip

    settings = copy.deepcopy(CONFIGS[kind])
    custom = settings.pop("custom_text", False)
    torch.manual_seed(seed)
    network = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**settings).eval()
    preprocess = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "interpolation": "bicubic"}
    open_clip.set_model_preprocess_cfg(network, preprocess | {"resize_mode": "squash", "size": settings_size(kind)})
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return network


def settings_size(kind: str) -> int:
    return int(CONFIGS[kind]["vision_cfg"]["image_size"])


def tokenizer(root: Path) -> Any:
    """The tests' small tokenizer as open_clip wraps one of transformers."""
    from open_clip.tokenizer import HFTokenizer

    clips.tokenizer().save_pretrained(root / "words")
    return HFTokenizer(str(root / "words"), context_length=40)


def open_clip_saved(root: Path, kind: str) -> Saved:
    """Both ends as open_clip's save_for_hf writes them."""
    from open_clip.push_to_hf_hub import save_for_hf

    words = tokenizer(root)
    for name, network in (("base", made(kind)), ("tuned", moved(made(kind)))):
        save_for_hf(network, words, config(kind), str(root / name), safe_serialization=True)

    def logits(images: Tensor) -> Tensor:
        return made(kind).get_logits(images, words([f"a photo of a {name}." for name in CLASSES]))[0]

    def reload(folder: Path) -> Any:
        import open_clip

        return open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)  # strict

    return Saved(str(root / "base"), str(root / "tuned"), logits, reload, settings_size(kind))


def timm_saved(root: Path, name: str) -> Saved:
    """Both ends as timm's save_for_hf writes them."""
    import timm
    from timm.models import save_for_hf

    def network() -> Any:
        torch.manual_seed(0)
        return moved(timm.create_model(name, num_classes=len(CLASSES)), seed=5, by=0.5).eval()

    for end, model in (("base", network()), ("tuned", moved(network()))):
        save_for_hf(model, str(root / end), model_config={"label_names": list(CLASSES)}, safe_serialization=True)

    def reload(folder: Path) -> Any:
        return timm.create_model(f"local-dir:{folder}", pretrained=True)  # strict

    return Saved(str(root / "base"), str(root / "tuned"), lambda images: network()(images), reload, 160, own_head=True)


KINDS: dict[str, Callable[[Path], Saved]] = {
    **{f"open_clip {kind}": partial(open_clip_saved, kind=kind) for kind in CONFIGS},
    **{f"timm {name}": partial(timm_saved, name=name) for name in ("test_vit", "test_resnet", "test_convnext")},
}
