"""One ViT CLIP under the names of open_clip and of transformers is the same function, layer by layer."""

from __future__ import annotations

import clips
import pytest
import torch
from saved import CLASSES, moved, pixels
from saved_libraries import CONFIGS, made, open_clip_saved

import sharpscope as ss
from sharpscope.data import Split
from sharpscope.errors import MismatchError
from sharpscope.models import load, load_pair, pair
from sharpscope.models.conversion import to_open_clip, to_transformers
from sharpscope.partition import partition

open_clip = pytest.importorskip("open_clip")


def transformers_clip(activation="quick_gelu"):
    """transformers' CLIPModel of the same shapes as the tests' open_clip ViT."""
    from transformers import CLIPConfig, CLIPModel

    words = clips.tokenizer()
    tokens = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": 1}
    text = {"hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    text |= {"vocab_size": len(words), "max_position_embeddings": 40, "hidden_act": activation}
    image = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2, "num_hidden_layers": 2}
    image |= {"image_size": clips.SIDE, "patch_size": 8, "hidden_act": activation}
    text, image = text | tokens | {"projection_dim": 8}, image | {"projection_dim": 8}
    config = CLIPConfig(text_config=text, vision_config=image, projection_dim=8)
    return CLIPModel(config).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return open_clip_saved(tmp_path_factory.mktemp("open_clip"), "ViT")


def same_clip_in_transformers(folder, network, activation="quick_gelu"):
    """The open_clip network under transformers' names, saved by transformers."""
    theirs = transformers_clip(activation)
    theirs.load_state_dict(to_transformers(network.state_dict()))
    return str(clips.save(folder, theirs))


@pytest.mark.parametrize("kind", ["ViT", "CustomTextCLIP"])
@torch.no_grad()
def test_features_agree_to_3e_6(kind):
    network = made(kind)
    theirs = transformers_clip("quick_gelu" if "quick_gelu" in CONFIGS[kind] else "gelu")
    theirs.load_state_dict(to_transformers(network.state_dict()))  # strict: no name is missing or left over
    ids = clips.tokenizer()(["a photo of a red."], padding="max_length", max_length=40, return_tensors="pt")[
        "input_ids"
    ]
    for expected, found in (
        (network.encode_image(pixels(clips.SIDE)), theirs.get_image_features(pixels(clips.SIDE)).pooler_output),
        (network.encode_text(ids), theirs.get_text_features(ids).pooler_output),
    ):
        assert expected.std() > 0.1
        unit = (torch.nn.functional.normalize(features, dim=-1) for features in (expected, found))
        torch.testing.assert_close(*unit, rtol=0, atol=3e-6)


def test_there_and_back_is_bit_exact():
    weights = {name: tensor for name, tensor in made("ViT").state_dict().items() if "attn_mask" not in name}
    back = to_open_clip(to_transformers(weights))
    assert back.keys() == weights.keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in weights.items())


def test_layers_keep_their_ids_and_sizes():
    weights = made("ViT").state_dict()
    for granularity in ("tower", "block", "part"):
        sizes = []
        for names in (weights, to_transformers(weights)):
            layers = partition([*names], granularity=granularity).layers
            sizes.append({layer: sum(names[name].numel() for name in mine) for layer, mine in layers.items()})
        assert sizes[0] == sizes[1]


def test_two_libraries_are_refused_with_both_namings_and_the_way_out(saved, tmp_path):
    there = same_clip_in_transformers(tmp_path / "hf", moved(made("ViT"), seed=7))
    with pytest.raises(MismatchError) as caught:
        pair(*load_pair(saved.zero_shot, there), CLASSES)
    lines = str(caught.value).splitlines()
    assert lines[0] == "models do not share an architecture: 62 vs 78 tensors"
    assert lines[1] == "  zero-shot  open_clip (visual.transformer.resblocks.*, fused in_proj_weight)"
    assert lines[2] == "  fine-tuned transformers (vision_model.encoder.layers.*, q_proj/k_proj/v_proj)"
    assert lines[3].startswith("  fix: --convert auto")


@pytest.mark.parametrize("direction", ["open_clip first", "transformers first"])
def test_converted_ends_are_scanned_and_give_what_each_library_gives(saved, tmp_path, direction):
    tuned = moved(made("ViT"), seed=7)
    there = same_clip_in_transformers(tmp_path / "hf", tuned)
    refs = (saved.zero_shot, there) if direction == "open_clip first" else (there, saved.zero_shot)
    alone = [load(ref).classifier(CLASSES) for ref in refs]
    start, end, _ = pair(*load_pair(*refs, convert=True), CLASSES)
    assert {n for n, _ in start.named_parameters()} == {n for n, _ in end.named_parameters()}
    scale = (start.logit_scale - alone[1].logit_scale).exp()  # of the zero-shot model along the whole path
    with torch.no_grad():
        torch.testing.assert_close(end(pixels(16)), alone[1](pixels(16)) * scale, rtol=0, atol=3e-5)
    data = Split([(pixels(16, 6), torch.arange(6) % 3)], "id", classes=CLASSES)
    result = ss.scan(*load_pair(*refs, convert=True), data, alphas=[0, 1], measures=[], progress=False)
    assert len(result.evals)


def test_a_file_of_the_other_library_is_converted_into_a_model(saved, tmp_path):
    there = same_clip_in_transformers(tmp_path / "hf", made("ViT"))
    model = load(saved.zero_shot)
    with pytest.raises(MismatchError, match="--convert auto"):
        load(f"{there}/model.safetensors", like=model)
    found = load(f"{there}/model.safetensors", like=model, convert=True).network.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.network.state_dict().items())


def test_activations_that_differ_are_not_converted_away(saved, tmp_path):
    there = same_clip_in_transformers(tmp_path / "hf", made("ViT"), activation="gelu")
    with pytest.raises(MismatchError, match=r"activation of the image tower is 'quick_gelu' in .* but 'gelu' in"):
        load_pair(saved.zero_shot, there, convert=True)


def test_only_plain_vits_have_a_counterpart():
    with pytest.raises(MismatchError, match=r"'visual\..*' has no counterpart in transformers' CLIPModel"):
        to_transformers(made("ResNet").state_dict())


@pytest.mark.parametrize("projected", [True, False])
def test_one_tower_of_transformers_fits_an_open_clip_model(saved, tmp_path, projected):
    from transformers import CLIPVisionModel, CLIPVisionModelWithProjection

    there = same_clip_in_transformers(tmp_path / "hf", moved(made("ViT"), seed=7))
    kind = CLIPVisionModelWithProjection if projected else CLIPVisionModel
    kind.from_pretrained(there).save_pretrained(tmp_path / "tower")
    whole = load_pair(saved.zero_shot, there, convert=True)[1].network.state_dict()
    found = load_pair(saved.zero_shot, tmp_path / "tower", convert=True)[1].network.state_dict()
    zero_shot = load(saved.zero_shot).network.state_dict()
    for name, tensor in found.items():
        tuned = name.startswith("visual.") and (projected or name != "visual.proj")
        assert torch.equal(tensor, (whole if tuned else zero_shot)[name]), name
