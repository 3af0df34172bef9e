"""Every configuration of open_clip that can be built without a download falls into known layers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import sharpscope as ss
from sharpscope.partition import partition

open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")

# Their text towers are made from a configuration on the hub.
NEED_THE_HUB = {
    "coca_roberta-ViT-B-32",
    "mt5-base-ViT-B-32",
    "mt5-xl-ViT-H-14",
    "nllb-clip-base",
    "nllb-clip-base-siglip",
    "nllb-clip-large",
    "nllb-clip-large-siglip",
    "roberta-ViT-B-32",
    "xlm-roberta-base-ViT-B-32",
    "xlm-roberta-large-ViT-H-14",
}
# Configurations with tensors in no known layer, by name.
UNCLASSIFIED: set[str] = set()


def on_meta(name):
    """A model of open_clip without memory, made by its own classes as its create_model would."""
    from open_clip.coca_model import CoCa

    config = copy.deepcopy(open_clip.get_model_config(name))
    custom = config.pop("custom_text", False)
    kind = CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(**config)


@pytest.mark.slow
def test_every_configuration_that_builds_offline_is_fully_classified():
    names = sorted(set(open_clip.list_models()) - NEED_THE_HUB)
    assert len(names) == 134
    unclassified = set()
    for name in names:
        tensors = [tensor for tensor, _ in on_meta(name).named_parameters()]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a part that is not known
            found = partition(tensors, granularity="part")
        assert sorted(found.names) == sorted(tensors)
        if "other" in found.layers:
            unclassified.add(name)
    assert unclassified == UNCLASSIFIED


def sizes(network):
    shapes = {name: tensor.numel() for name, tensor in network.named_parameters()}
    found = {granularity: ss.layers(network, granularity).layers for granularity in ("tower", "block", "part")}
    return {
        granularity: {layer: sum(shapes[name] for name in names) for layer, names in layers.items()}
        for granularity, layers in found.items()
    }


def test_vit_b_32_has_the_same_layers_and_sizes_in_both_libraries():
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        theirs = CLIPModel(CLIPConfig())  # its defaults are those of ViT-B/32
    ours = sizes(on_meta("ViT-B-32"))
    assert len(ours["block"]) == 31
    assert ours == sizes(theirs)


def test_siglip_has_the_same_layers_and_sizes_in_both_libraries():
    from transformers import SiglipConfig, SiglipModel

    with torch.device("meta"):
        theirs = SiglipModel(SiglipConfig(text_config={"vocab_size": 32000}, vision_config={"image_size": 224}))
    assert sizes(on_meta("ViT-B-16-SigLIP")) == sizes(theirs)


def test_a_timm_vit_has_the_layers_and_sizes_of_transformers():
    from transformers import ViTConfig, ViTForImageClassification

    with torch.device("meta"):
        theirs = ViTForImageClassification(ViTConfig(num_labels=1000))
        ours = timm.create_model("vit_base_patch16_224")
    assert sizes(ours) == sizes(theirs)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("resnet18", 8), ("convnext_atto", 12), ("swin_tiny_patch4_window7_224", 12), ("deit3_small_patch16_224", 12)],
)
def test_stages_of_timm_networks_are_one_run_of_blocks(name, blocks):
    with torch.device("meta"):
        network = timm.create_model(name)
    found = [*ss.layers(network).layers]
    assert [layer for layer in found if "block" in layer] == [f"visual.block.{i:02d}" for i in range(blocks)]
    assert found[0] == "visual.embed"
    assert found[-1] == "head"
    assert "other" not in found


def test_towers_from_the_hub_are_classified_by_their_names():
    names = [
        "visual.transformer.resblocks.0.ln_1.weight",
        "text.transformer.embeddings.word_embeddings.weight",
        "text.transformer.encoder.layer.3.attention.self.query.weight",
        "text.proj.0.weight",
        "logit_scale",
    ]
    assert [*partition(names).layers] == ["visual.block.00", "text.embed", "text.block.03", "text.proj", "logit_scale"]
