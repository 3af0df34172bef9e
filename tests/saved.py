"""Small random models saved by the libraries of transformers in their real formats, old and new; for matrix tests."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import clips
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CLASSES = ("red", "green", "blue car")


_LABELS = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
_PIXELS = {"image_size": clips.SIDE, "patch_size": 8}


@dataclass(frozen=True)
class Saved:
    """Two ends of a path on disk.

    ``logits`` is the zero-shot model's own forward in its library; ``reload`` loads a directory or file strictly in
    the library and returns the network, so that a merged checkpoint can be checked the same way.
    """

    zero_shot: str
    fine_tuned: str
    logits: Callable[[Tensor], Tensor]
    reload: Callable[[Path], Any]
    side: int = clips.SIDE
    own_head: bool = False


def moved(network: Any, seed: int = 1, by: float = 0.02) -> Any:
    """Move every weight of the network by noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += (
                by * (parameter.square().mean().sqrt() + 0.1) * torch.randn(parameter.shape, generator=generator)
            )
    return network


def pixels(side: int, n: int = 5) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(3))


def _quietly(network: Any, folder: Path) -> None:
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        network.save_pretrained(folder)


def rename(folder: Path, change: Callable[[str], str], extra: dict[str, Tensor] | None = None) -> None:
    """Give the tensors of a safetensors file other names, as another version of the library wrote them."""
    file = folder / "model.safetensors"
    weights = {change(name): tensor for name, tensor in load_file(file).items()} | (extra or {})
    save_file(weights, file, metadata={"format": "pt"})


def _strictly(kind: Any) -> Callable[[Path], Any]:
    def reload(folder: Path) -> Any:
        network, info = kind.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["mismatched_keys"]
        assert not {name for name in info["unexpected_keys"] if not name.endswith("position_ids")}
        return network.eval()

    return reload


def texts() -> dict[str, Tensor]:
    return dict(clips.tokenizer()([f"a photo of a {name}." for name in CLASSES], padding=True, return_tensors="pt"))


def clip(root: Path, *, old: bool = False) -> Saved:
    """CLIPModel; old: as transformers 4.30 wrote it, with the buffers of positions."""
    from transformers import CLIPModel

    for name, model in (("base", clips.network()), ("tuned", moved(clips.network()))):
        clips.save(root / name, model)
        if old:
            positions = {
                "text_model.embeddings.position_ids": torch.arange(40)[None],
                "vision_model.embeddings.position_ids": torch.arange(5)[None],
            }
            rename(root / name, lambda key: key, positions)

    def logits(images: Tensor) -> Tensor:
        return clips.network()(pixel_values=images, **texts()).logits_per_image

    return Saved(str(root / "base"), str(root / "tuned"), logits, _strictly(CLIPModel))


def siglip_network(seed: int = 0) -> Any:
    from transformers import SiglipConfig, SiglipModel

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    image = tower | {"image_size": clips.SIDE, "patch_size": 8}
    words = clips.tokenizer()
    text = tower | {"vocab_size": len(words), "max_position_embeddings": 40, "pad_token_id": words.pad_token_id}
    text |= {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "projection_size": 16}
    torch.manual_seed(seed)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=image)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-3.0)
    return model


def siglip(root: Path) -> Saved:
    """SiglipModel, whose text tower reads all its places, and whose logits have a bias."""
    from transformers import SiglipImageProcessorPil, SiglipModel

    for name, model in (("base", siglip_network()), ("tuned", moved(siglip_network()))):
        _quietly(model, root / name)
        SiglipImageProcessorPil(size={"height": clips.SIDE, "width": clips.SIDE}).save_pretrained(root / name)
        clips.tokenizer().save_pretrained(root / name)

    def logits(images: Tensor) -> Tensor:
        sentences = [f"a photo of a {name}." for name in CLASSES]
        ids = clips.tokenizer()(sentences, padding="max_length", max_length=40, return_tensors="pt")["input_ids"]
        return siglip_network()(pixel_values=images, input_ids=ids).logits_per_image

    return Saved(str(root / "base"), str(root / "tuned"), logits, _strictly(SiglipModel))


def bare_tower(root: Path, kind: str, *, old: bool = False) -> Saved:
    """A whole model, fine-tuned as an image tower alone; old: its names begin with ``vision_model.``."""
    import transformers

    whole = siglip(root / "whole") if kind.startswith("Siglip") else clip(root / "whole")
    tuned = moved(siglip_network() if kind.startswith("Siglip") else clips.network())
    tower = getattr(transformers, kind)(tuned.config.vision_config).eval()
    source = tuned.state_dict()
    tower.load_state_dict({name: source.get(name, source.get(f"vision_model.{name}")) for name in tower.state_dict()})
    _quietly(tower, root / "tuned")
    if kind.endswith("VisionModel"):
        prefix = "vision_model." if old else ""
        rename(root / "tuned", lambda name: prefix + name.removeprefix("vision_model."))
    return Saved(whole.zero_shot, str(root / "tuned"), whole.logits, _strictly(getattr(transformers, kind)))


def vit(root: Path, *, old: bool = False) -> Saved:
    """ViTForImageClassification; old: the names that transformers 4 gave its tensors."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    config = ViTConfig(**_TOWER, **_PIXELS, **_LABELS)

    def made() -> Any:
        torch.manual_seed(0)
        return moved(ViTForImageClassification(config).eval(), seed=5, by=2.0)

    for name, model in (("base", made()), ("tuned", moved(made()))):
        _quietly(model, root / name)
        sides = {"height": clips.SIDE, "width": clips.SIDE}
        ViTImageProcessorPil(size=sides).save_pretrained(root / name)
        if old:
            rename(root / name, _old_vit)
    return Saved(
        str(root / "base"),
        str(root / "tuned"),
        lambda images: made()(images).logits,
        _strictly(ViTForImageClassification),
        own_head=True,
    )


_OLD_VIT = (
    (r"^vit\.layers\.(\d+)\.", r"vit.encoder.layer.\1."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def _old_vit(name: str) -> str:
    for pattern, new in _OLD_VIT:
        name = re.sub(pattern, new, name)
    return name


def clip_classifier(root: Path) -> Saved:
    """CLIPForImageClassification, whose class names are numbers only."""
    from transformers import CLIPForImageClassification

    def made() -> Any:
        config = clips.network().config
        config.num_labels = len(CLASSES)
        torch.manual_seed(0)
        return moved(CLIPForImageClassification(config).eval(), seed=5, by=2.0)

    for name, model in (("base", made()), ("tuned", moved(made()))):
        clips.save(root / name, model, words=False)
    return Saved(
        str(root / "base"),
        str(root / "tuned"),
        lambda images: made()(images).logits,
        _strictly(CLIPForImageClassification),
        own_head=True,
    )


# Families that transformers 5 saves under other names than it computes with, as it does ViT.
FAMILIES: dict[str, dict[str, Any]] = {
    "DeiT": _TOWER | _PIXELS,
    "Dinov2": _TOWER | _PIXELS,
    "Beit": _TOWER | _PIXELS,
    "Swin": {
        **{"image_size": clips.SIDE, "patch_size": 2, "embed_dim": 8, "window_size": 2},
        **{"depths": [1, 1], "num_heads": [2, 2]},
    },
    "Segformer": {
        **{"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [8, 16], "num_attention_heads": [1, 2]},
        **{"sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2]},
    },
}


def family(root: Path, name: str) -> Saved:
    """An image classifier of one of these families."""
    import transformers

    kind = getattr(transformers, f"{name}ForImageClassification")
    config = getattr(transformers, f"{name}Config")(**FAMILIES[name], **_LABELS)

    def made() -> Any:
        torch.manual_seed(0)
        return moved(kind(config).eval(), seed=5, by=2.0)

    for end, model in (("base", made()), ("tuned", moved(made()))):
        _quietly(model, root / end)
    return Saved(
        str(root / "base"), str(root / "tuned"), lambda images: made()(images).logits, _strictly(kind), own_head=True
    )


# Name -> function of a folder; tests of merging and others can go through the same models.
KINDS: dict[str, Callable[[Path], Saved]] = {
    "transformers CLIP": clip,
    "transformers CLIP, old files": lambda root: clip(root, old=True),
    "transformers SigLIP": siglip,
    "transformers CLIP tower, bare": lambda root: bare_tower(root, "CLIPVisionModel"),
    "transformers CLIP tower, prefixed": lambda root: bare_tower(root, "CLIPVisionModel", old=True),
    "transformers CLIP tower, projected": lambda root: bare_tower(root, "CLIPVisionModelWithProjection"),
    "transformers SigLIP tower, bare": lambda root: bare_tower(root, "SiglipVisionModel"),
    "transformers SigLIP tower, prefixed": lambda root: bare_tower(root, "SiglipVisionModel", old=True),
    "transformers ViT": vit,
    "transformers ViT, old files": lambda root: vit(root, old=True),
    "transformers CLIP classifier": clip_classifier,
    "transformers DeiT": lambda root: family(root, "DeiT"),
}
