"""Zero-shot heads are those of open_clip and of WiSE-FT; a head that a checkpoint brings along is the one used."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from PIL import Image
from saved import CLASSES, moved, pixels
from saved_libraries import CONFIGS, made, open_clip_saved, settings_size

from sharpscope.errors import DataError, MismatchError, ModelError, UsageError
from sharpscope.models import load, load_pair, pair

open_clip = pytest.importorskip("open_clip")
TEMPLATES = ("a photo of a {}.", "the {} in a drawing", "{}")


@pytest.fixture(scope="module")
def named():
    """A configuration under a name, with open_clip's own vocabulary; gone again afterwards."""
    config = copy.deepcopy(CONFIGS["ViT"])
    config["text_cfg"] |= {"vocab_size": 49408, "context_length": 77}
    open_clip.factory._MODEL_CONFIGS["ViT-tiny-test"] = config
    yield "ViT-tiny-test"
    del open_clip.factory._MODEL_CONFIGS["ViT-tiny-test"]


@pytest.fixture(scope="module")
def checkpoint(named, tmp_path_factory):
    """A file as open_clip's training loop writes it."""
    torch.manual_seed(0)
    network = moved(open_clip.create_model(named).eval(), by=1.0)
    file = tmp_path_factory.mktemp("runs") / "epoch_1.pt"
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"epoch": 1, "name": "run", "state_dict": state, "optimizer": {"state": {}}}, file)
    return network, file


def test_the_zero_shot_head_is_the_one_that_open_clip_builds(named, checkpoint):
    network, file = checkpoint
    model = load(f"oc:{named}/{file}", templates=TEMPLATES)
    tokenizer = open_clip.get_tokenizer(named)
    expected = open_clip.build_zero_shot_classifier(network, tokenizer, CLASSES, TEMPLATES).T
    found = model.classifier(CLASSES).head.weight.detach()
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["CustomTextCLIP", "timm trunk", "SigLIP", "ResNet"])
def test_so_are_those_of_other_kinds(kind, tmp_path):
    saved = open_clip_saved(tmp_path, kind)
    model = load(saved.zero_shot, templates=TEMPLATES)
    expected = open_clip.build_zero_shot_classifier(made(kind), model.tokenizer, CLASSES, TEMPLATES).T
    torch.testing.assert_close(model.classifier(CLASSES).head.weight.detach(), expected, rtol=0, atol=1e-6)


def wise_ft_head(network, tokenizer, classes, templates):
    """The head of arXiv 2109.01903 written by hand: the scale lies in its rows."""
    rows = []
    for name in classes:
        features = network.encode_text(tokenizer([template.format(name) for template in templates]))
        features = features / features.norm(dim=-1, keepdim=True)
        mean = features.mean(dim=0)
        rows.append(mean / mean.norm())
    return torch.stack(rows) * network.logit_scale.exp()


@torch.no_grad()
def wise_ft_file(file, network, tokenizer, *, bias=0.0, seed=None):
    """A state dict with the keys of the authors' ImageClassifier; its text tower is deleted, as they do."""
    weight = wise_ft_head(network, tokenizer, CLASSES, TEMPLATES)
    if seed is not None:
        weight = weight + torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    state = {f"image_encoder.model.{n}": t for n, t in network.state_dict().items() if not n.startswith("transformer.")}
    head = {"classification_head.weight": weight, "classification_head.bias": torch.full((len(CLASSES),), bias)}
    torch.save(state | head, file)
    return weight


def test_the_head_of_a_wise_ft_file_is_read_and_its_scale_is_kept_apart(named, checkpoint, tmp_path):
    network, file = checkpoint
    tokenizer = open_clip.get_tokenizer(named)
    with torch.no_grad():
        tuned = moved(copy.deepcopy(network), seed=8)
        weight = wise_ft_file(tmp_path / "ft.pt", tuned, tokenizer, bias=0.5, seed=4)
        features = torch.nn.functional.normalize(tuned.encode_image(pixels(16)), dim=-1)
        expected = features @ weight.T + 0.5
    start, end, notes = pair(*load_pair(f"oc:{named}/{file}", str(tmp_path / "ft.pt"), templates=TEMPLATES), CLASSES)
    torch.testing.assert_close(end(pixels(16)).detach(), expected, rtol=0, atol=1e-5)
    scale = network.logit_scale.exp()
    torch.testing.assert_close(end.head.weight, weight / scale, rtol=0, atol=1e-6)
    assert "logit_scale" not in dict(end.named_parameters())
    assert torch.equal(start.logit_scale, network.logit_scale)
    assert torch.equal(start.head.bias, torch.zeros(len(CLASSES)))  # the other end gets one, too
    assert any("the rest is that of" in note for note in notes)


def test_an_untrained_wise_ft_head_is_the_zero_shot_head(named, checkpoint, tmp_path):
    network, file = checkpoint
    wise_ft_file(tmp_path / "zs.pt", network, open_clip.get_tokenizer(named))
    start, end, _ = pair(*load_pair(f"oc:{named}/{file}", tmp_path / "zs.pt", templates=TEMPLATES), CLASSES)
    torch.testing.assert_close(end.head.weight, start.head.weight, rtol=0, atol=1e-6)
    assert end.head.bias is None  # one of zeros is none


def test_a_clip_inside_of_a_training_module_and_an_average_beside_it_are_pointed_to(named, checkpoint, tmp_path):
    weights = checkpoint[0].state_dict()
    torch.save({"state_dict": weights, "state_dict_ema": weights}, tmp_path / "ema.pt")
    (note,) = load(f"oc:{named}/{tmp_path / 'ema.pt'}").notes
    assert "holds weights of the same network under state_dict_ema, too" in note
    inside = {f"model.{name}": tensor for name, tensor in weights.items()} | {"loss.scale": torch.ones(3)}
    torch.save(inside, tmp_path / "last.ckpt")
    with pytest.raises(ModelError, match=r"last.ckpt holds the weights under 'model\.', and besides loss.scale"):
        load(f"oc:{named}/{tmp_path / 'last.ckpt'}")


def test_a_wise_ft_file_is_a_model_under_its_configurations_name(named, checkpoint, tmp_path):
    weight = wise_ft_file(tmp_path / "ft.pt", checkpoint[0], open_clip.get_tokenizer(named))
    head = load(f"oc:{named}/{tmp_path / 'ft.pt'}").classifier(CLASSES).head
    torch.testing.assert_close(head.weight, weight / checkpoint[0].logit_scale.exp(), rtol=0, atol=1e-6)


def test_a_stored_head_beside_a_siglip_leaves_out_the_bias_of_its_logits(tmp_path):
    saved = open_clip_saved(tmp_path, "SigLIP")
    state = {f"image_encoder.model.{n}": t for n, t in made("SigLIP").visual.state_dict(prefix="visual.").items()}
    torch.save(state | {"classification_head.weight": torch.randn(3, 96)}, tmp_path / "ft.pt")
    start, end, _ = pair(*load_pair(saved.zero_shot, tmp_path / "ft.pt"), CLASSES)
    assert dict(start.named_buffers()).keys() == dict(end.named_buffers()).keys()
    alone = load(saved.zero_shot).classifier(CLASSES)
    torch.testing.assert_close(start(pixels(160)).softmax(1), alone(pixels(160)).softmax(1))


def test_a_stored_head_of_other_classes_is_refused(named, checkpoint, tmp_path):
    wise_ft_file(tmp_path / "ft.pt", checkpoint[0], open_clip.get_tokenizer(named))
    with pytest.raises(DataError, match="has 3 classes, the data 2"):
        load(f"oc:{named}/{tmp_path / 'ft.pt'}").classifier(CLASSES[:2])


def test_a_text_too_long_is_refused_where_open_clip_would_cut_it(named, checkpoint):
    model = load(f"oc:{named}/{checkpoint[1]}")
    with pytest.raises(UsageError, match=r"has 85 tokens, the text tower reads 77"):
        model.classifier(["red " * 78])
    model.classifier(["red " * 70])


def test_so_it_is_where_the_tokenizer_is_one_of_transformers(tmp_path):
    model = load(open_clip_saved(tmp_path, "ViT").zero_shot, templates=["{}"])
    with pytest.raises(UsageError, match=r"has 41 tokens, the text tower reads 40"):
        model.classifier(["a" * 39])
    model.classifier(["a" * 38])


def test_the_preprocessing_is_that_of_the_configuration(tmp_path):
    saved = open_clip_saved(tmp_path, "ViT")
    from open_clip import transform

    network = made("ViT")
    image = Image.linear_gradient("L").resize((50, 31))
    expected = transform.image_transform_v2(transform.PreprocessCfg(**network.visual.preprocess_cfg), is_train=False)
    found = load(saved.zero_shot).preprocess(image)
    assert found.shape == (3, settings_size("ViT"), settings_size("ViT"))  # squashed, not cropped
    assert torch.equal(found, expected(image))


def test_a_directory_for_two_libraries_is_read_by_transformers_unless_asked(tmp_path):
    """LAION's repositories hold both configurations and both files."""
    import clips

    saved = open_clip_saved(tmp_path, "ViT")
    assert load(saved.zero_shot).library.name == "open_clip"
    clips.save(tmp_path / "base", clips.network())
    assert load(saved.zero_shot).library.name == "transformers"
    found = load(f"oc:{saved.zero_shot}")
    assert found.library.name == "open_clip"
    assert torch.equal(found.network.visual.proj, made("ViT").visual.proj)


# --- what does not belong together, or cannot be read


def test_gelu_and_quick_gelu_are_told_apart(tmp_path):
    first = open_clip_saved(tmp_path / "a", "ViT")
    second = tmp_path / "a" / "tuned" / "open_clip_config.json"
    stored = json.loads(second.read_text())
    stored["model_cfg"]["quick_gelu"] = False
    second.write_text(json.dumps(stored))
    with pytest.raises(MismatchError, match=r"activation of the image tower is 'quick_gelu' in .* but 'gelu' in"):
        pair(load(first.zero_shot), load(first.fine_tuned), CLASSES)


def test_another_mean_is_named(tmp_path):
    saved = open_clip_saved(tmp_path, "ViT")
    file = tmp_path / "tuned" / "open_clip_config.json"
    stored = json.loads(file.read_text())
    stored["preprocess_cfg"]["mean"] = [0.4, 0.5, 0.5]
    file.write_text(json.dumps(stored))
    with pytest.raises(MismatchError, match=r"image_mean is \[0.5, 0.5, 0.5\] in .* but \[0.4, 0.5, 0.5\] in"):
        pair(load(saved.zero_shot), load(saved.fine_tuned), CLASSES)


def test_resized_position_embeddings_are_no_path(named, checkpoint, tmp_path):
    network, file = checkpoint
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state["visual.positional_embedding"] = torch.zeros(10, 128)
    torch.save(state, tmp_path / "large.pt")
    with pytest.raises(MismatchError, match=r"'visual.positional_embedding' is \(10, 128\), .* resized position"):
        load(tmp_path / "large.pt", like=load(f"oc:{named}/{file}"))


def test_an_unknown_configuration_names_the_nearest():
    with pytest.raises(UsageError, match=r"no configuration 'ViT-B-23'\n  fix: one of ViT-B-"):
        load("oc:ViT-B-23/openai")


def test_an_unknown_tag_names_the_known_ones():
    with pytest.raises(UsageError, match=r"'laion' is neither a file here nor a tag of ViT-B-32\n  fix: one of openai"):
        load("oc:ViT-B-32/laion")


def test_a_missing_file_is_not_taken_for_a_tag():
    with pytest.raises(UsageError, match=r"there is no file 'runs/ft.pt'"):
        load("oc:ViT-B-32/runs/ft.pt")


def test_a_tag_brings_its_activation(named, checkpoint, monkeypatch):
    """``oc:ViT-B-32/openai`` names the configuration without QuickGELU; the weights were trained with it."""
    seen = {}

    def downloaded(config, cache_dir=None, **_):
        seen["config"] = config
        return str(checkpoint[1])

    plain = copy.deepcopy(open_clip.get_model_config(named)) | {"quick_gelu": False}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, named, plain)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, named, {"tag": {"url": "", "quick_gelu": True}})
    monkeypatch.setattr(open_clip.factory, "download_pretrained", downloaded)
    model = load(f"oc:{named}/tag")
    assert seen["config"]["quick_gelu"]
    assert model.library.architecture()["activation of the image tower"] == "quick_gelu"
    expected = open_clip.create_model(named, force_quick_gelu=True)
    expected.load_state_dict(checkpoint[0].state_dict())
    with torch.no_grad():
        assert torch.equal(model.network.encode_image(pixels(16)), expected.eval().encode_image(pixels(16)))


def test_a_tag_that_cannot_be_fetched_ends_in_a_sentence(named, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, named, {"tag": {"url": ""}})
    monkeypatch.setattr(open_clip.factory, "download_pretrained", refuse)
    with pytest.raises(ModelError, match=r"open_clip cannot make .*/tag: .*no route to host"):
        load(f"oc:{named}/tag")
