"""Every tensor in exactly one layer, named alike across libraries."""

import clips
import pytest
import torch
from nets import made

import sharpscope
from sharpscope.errors import UsageError
from sharpscope.partition import GRANULARITIES, partition

TRANSFORMERS = [
    "logit_scale",
    "text_model.embeddings.token_embedding.weight",
    *(f"text_model.encoder.layers.{i}.{n}" for i in range(2) for n in ("self_attn.q_proj.weight", "mlp.fc1.bias")),
    "text_model.final_layer_norm.weight",
    "vision_model.embeddings.class_embedding",
    "vision_model.pre_layrnorm.bias",
    *(f"vision_model.encoder.layers.{i}.{n}" for i in (0, 10, 9) for n in ("layer_norm1.bias", "mlp.fc2.weight")),
    "vision_model.post_layernorm.weight",
    "visual_projection.weight",
    "text_projection.weight",
]
OPEN_CLIP = [
    "positional_embedding",
    "text_projection",
    "logit_scale",
    "visual.class_embedding",
    "visual.proj",
    "visual.conv1.weight",
    "visual.ln_pre.weight",
    *(f"visual.transformer.resblocks.{i}.{n}" for i in (0, 10, 9) for n in ("ln_1.weight", "attn.in_proj_weight")),
    "visual.ln_post.weight",
    *(f"transformer.resblocks.{i}.mlp.c_fc.weight" for i in range(2)),
    "token_embedding.weight",
    "ln_final.weight",
]
IDS = [
    "visual.embed", "visual.block.00", "visual.block.09", "visual.block.10", "visual.norm", "visual.proj",
    "text.embed", "text.block.00", "text.block.01", "text.norm", "text.proj", "logit_scale",
]  # fmt: skip


@pytest.mark.parametrize("names", [TRANSFORMERS, OPEN_CLIP])
def test_both_libraries_have_the_same_ids_in_depth_order(names):
    assert list(partition(names).layers) == IDS


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("names", [TRANSFORMERS, OPEN_CLIP, ["a.0.weight", "a.1.weight", "b.weight", "scale"]])
def test_every_tensor_lies_in_exactly_one_layer(names, granularity):
    assert sorted(partition(names, granularity=granularity, containers=["a"]).names) == sorted(names)


def test_parts_split_a_block_into_attention_mlp_and_norms():
    found = partition(TRANSFORMERS, granularity="part").layers
    assert {"text.block.00.attn", "text.block.00.mlp", "visual.block.00.ln", "visual.block.09.mlp"} <= found.keys()


def test_an_unknown_part_joins_its_block_with_a_warning():
    with pytest.warns(UserWarning, match="no known part"):
        found = partition([*TRANSFORMERS, "vision_model.encoder.layers.0.gate"], granularity="part")
    assert found.layers["visual.block.00"] == ("vision_model.encoder.layers.0.gate",)


def test_a_plain_module_falls_into_children_and_members_of_lists():
    assert list(sharpscope.layers(made("vit")).layers) == ["patch", "blocks.0", "blocks.1", "norm", "head"]
    assert list(sharpscope.layers(made("mlp")).layers) == ["1", "3", "4"]


def test_patterns_come_first_and_one_that_matches_nothing_is_refused():
    found = partition(TRANSFORMERS, patterns={"early": r"vision_model\.(embeddings|encoder\.layers\.0\.)"})
    assert len(found.layers["early"]) == 3
    with pytest.raises(UsageError, match="'nowhere' of layer 'x' matches no tensor"):
        partition(TRANSFORMERS, patterns={"x": "nowhere"})


OLD_VIT = [
    "vit.embeddings.cls_token",
    "vit.embeddings.patch_embeddings.projection.weight",
    *(f"vit.encoder.layer.{i}.attention.{n}.weight" for i in (0, 11) for n in ("attention.query", "output.dense")),
    *(f"vit.encoder.layer.{i}.{n}.weight" for i in (0, 11) for n in ("intermediate.dense", "layernorm_before")),
    "vit.layernorm.weight",
    "classifier.weight",
]
BARE = [name.removeprefix("vision_model.") for name in TRANSFORMERS if name.startswith("vision_model.")]
BARE_TEXT = [name.removeprefix("text_model.") for name in TRANSFORMERS if name.startswith("text_model.")]
SIGLIP_HEAD = [f"vision_model.{n}" for n in ("encoder.layers.0.mlp.fc1.bias", "head.probe", "head.mlp.fc1.bias")]


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (OLD_VIT, ["visual.embed", "visual.block.00", "visual.block.11", "visual.norm", "head"]),
        (BARE, ["visual.embed", "visual.block.00", "visual.block.09", "visual.block.10", "visual.norm"]),
        (BARE_TEXT, ["text.embed", "text.block.00", "text.block.01", "text.norm"]),
        ([*BARE_TEXT, "head.weight"], ["text.embed", "text.block.00", "text.block.01", "text.norm", "text.proj"]),
        (SIGLIP_HEAD, ["visual.block.00", "visual.pool"]),
        (["conv1.weight", "layer1.0.bn1.bias", "fc.bias"], ["visual.embed", "visual.block.00", "head"]),
    ],
)
def test_other_namings_of_towers_have_canonical_ids(names, ids):
    assert [*partition(names).layers] == ids


def test_blocks_of_stages_are_numbered_through():
    stages = [f"layer{stage}.{block}.conv1.weight" for stage in (1, 2) for block in (1, 0)]
    found = partition(["conv1.weight", *stages]).layers
    assert found["visual.block.01"] == ("layer1.1.conv1.weight",)
    assert found["visual.block.02"] == ("layer2.0.conv1.weight",)


def test_what_is_known_of_no_network_is_other_not_dropped():
    assert partition([*TRANSFORMERS, "adapter.weight"]).layers["other"] == ("adapter.weight",)


class Wrapper(torch.nn.Module):
    """As WiSE-FT's ImageClassifier, and as people put a head on a backbone."""

    def __init__(self, path, network, head=None):
        super().__init__()
        for name in reversed(path[1:]):
            holder = torch.nn.Module()
            holder.add_module(name, network)
            network = holder
        self.add_module(path[0], network)
        if head:
            self.add_module(head, torch.nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("path", "head"),
    [
        (("image_encoder", "model"), "classification_head"),
        (("module",), None),
        (("module", "backbone"), "fc"),
        (("clip",), "classifier"),
    ],
)
def test_a_known_network_inside_a_module_with_a_head_has_its_usual_layers(path, head):
    inside = clips.network()
    expected = sharpscope.layers(inside).layers
    found = sharpscope.layers(Wrapper(path, inside, head)).layers
    assert {"visual.block.01", "text.block.00"} <= set(expected)
    assert set(found) == set(expected) | ({"head"} if head else set())
    prefix = ".".join(path) + "."
    assert all(found[layer] == tuple(prefix + name for name in names) for layer, names in expected.items())


def test_two_networks_side_by_side_are_no_wrapper():
    both = torch.nn.ModuleDict({"one": clips.network(), "two": clips.network()})
    assert not any(layer.startswith("visual") for layer in sharpscope.layers(both).layers)
