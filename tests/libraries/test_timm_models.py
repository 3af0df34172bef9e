"""Classifiers of timm: from a name and a file, with timm's own preprocessing."""

from __future__ import annotations

import argparse
import contextlib
import copy
import io

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from saved import moved, pixels
from saved_libraries import KINDS

import sharpscope
from sharpscope.data import Split
from sharpscope.errors import DataError, MismatchError, ModelError, UsageError
from sharpscope.models import load, load_pair, pair, timm_model

timm = pytest.importorskip("timm")


@pytest.fixture
def tuned(tmp_path):
    """A network with 7 classes and its file."""
    torch.manual_seed(0)
    network = moved(timm.create_model("test_vit", num_classes=7), by=0.5).eval()
    save_file(network.state_dict(), tmp_path / "ft.safetensors")
    return network, tmp_path / "ft.safetensors"


@torch.no_grad()
def test_a_name_and_a_file_make_the_network_with_its_classes(tuned):
    network, file = tuned
    model = load(f"timm:test_vit/{file}")
    assert model.network.num_classes == 7
    assert model.where == file
    assert torch.equal(model.network(pixels(160)), network(pixels(160)))


@pytest.mark.parametrize(
    "name",
    ["efficientvit_m0", "efficientvit_b0", "legacy_seresnet18", "inception_next_atto", "repvit_m0_9", "levit_128s"],
)
def test_the_head_is_found_by_the_name_that_timm_has_for_it(name, tmp_path):
    network = timm.create_model(name, num_classes=7).eval()
    save_file(network.state_dict(), tmp_path / "ft.safetensors")
    found = load(f"timm:{name}/{tmp_path / 'ft.safetensors'}").network
    assert found.num_classes == 7
    assert all(torch.equal(tensor, found.state_dict()[key]) for key, tensor in network.state_dict().items())


@pytest.mark.slow
def test_every_family_of_timm_names_a_weight_with_a_row_per_class():
    from timm.models._registry import _model_to_module

    families = {(_model_to_module[name], str(timm_model._heads(name))): name for name in timm.list_models()}
    assert len(families) > 90
    for name in families.values():
        with torch.device("meta"):
            weights = timm.create_model(name, num_classes=7919).state_dict()  # a prime that is no width
        rows = {key for key, tensor in weights.items() if tensor.shape[:1] == (7919,) and key.endswith("weight")}
        assert {f"{head}.weight" for head in timm_model._heads(name) if rows} == rows, name


def test_the_preprocessing_is_that_of_timms_data_configuration(tuned):
    image = Image.linear_gradient("L").convert("RGB").resize((211, 180))
    own = timm.data.create_transform(**timm.data.resolve_model_data_config(tuned[0]), is_training=False)
    assert torch.equal(load(f"timm:test_vit/{tuned[1]}").preprocess(image), own(image))


def test_a_file_alone_takes_the_network_of_the_other_end(tuned, tmp_path):
    network, file = tuned
    torch.save({"state_dict": {f"module.{n}": t for n, t in network.state_dict().items()}}, tmp_path / "again.pt")
    start, end, _ = pair(*load_pair(f"timm:test_vit/{file}", tmp_path / "again.pt"), None)
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), end.parameters(), strict=True))


def test_what_timms_saver_writes_is_read_and_its_average_is_pointed_to(tuned, tmp_path, monkeypatch):
    network, args = copy.deepcopy(tuned[0]), argparse.Namespace(model="test_vit")
    average = timm.utils.ModelEmaV3(moved(copy.deepcopy(network)))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    saver = timm.utils.CheckpointSaver(
        network, optimizer, args, average, checkpoint_dir=tmp_path, recovery_dir=tmp_path
    )
    saver.save_checkpoint(0, metric=0.5)
    found = load(f"timm:test_vit/{tmp_path}/model_best.pth.tar")
    with torch.no_grad():
        assert torch.equal(found.network(pixels(160)), network(pixels(160)))
    monkeypatch.chdir(tmp_path)
    exec(found.notes[0].split("To use the others: ")[1], {"torch": torch})
    other = load(f"timm:test_vit/{tmp_path}/NEW.pt")
    assert other.notes == ()
    with torch.no_grad():
        assert torch.equal(other.network(pixels(160)), average.module(pixels(160)))


def test_a_network_inside_of_a_training_module_is_pointed_to(tuned, tmp_path):
    inside = {f"model.{name}": tensor for name, tensor in tuned[0].state_dict().items()}
    torch.save({"state_dict": inside | {"criterion.weight": torch.ones(3)}}, tmp_path / "last.ckpt")
    with pytest.raises(ModelError, match=r"last.ckpt holds the weights under 'model\.', and besides criterion.weight"):
        load(f"timm:test_vit/{tmp_path}/last.ckpt")


def test_another_architecture_is_refused(tuned):
    with pytest.raises(ModelError, match=r"ft.safetensors lacks \d+ weights of a ResNet \(conv1"):
        load(f"timm:test_resnet/{tuned[1]}")


def test_another_number_of_classes_is_refused(tuned, tmp_path):
    torch.save(timm.create_model("test_vit", num_classes=5).state_dict(), tmp_path / "five.pt")
    with pytest.raises(MismatchError, match=r"'head.weight' is \(5, 64\), the architecture has \(7, 64\)"):
        load_pair(f"timm:test_vit/{tuned[1]}", tmp_path / "five.pt")


def wrapped(folder, stored=None):
    """A model of timm that transformers saved around its own way of loading; return what transformers reads it with."""
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperImageProcessor

    names = {"id2label": dict(enumerate(("red", "green"))), "label2id": {"red": 0, "green": 1}}
    options = {} if stored is None else {"pretrained_cfg": stored}
    config = TimmWrapperConfig(architecture="test_vit", num_labels=2, **names, **options)
    network = TimmWrapperForImageClassification(config).eval()
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        network.save_pretrained(folder)
    return network, None if stored is None else TimmWrapperImageProcessor.from_pretrained(folder)


def test_a_model_of_timm_in_transformers_has_the_preprocessing_of_its_configuration(tmp_path):
    image = Image.linear_gradient("L").convert("RGB").resize((211, 180))
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    stored = {"input_size": [3, 160, 160], "mean": mean, "std": std, "interpolation": "nearest", "crop_pct": 0.9}
    _, processor = wrapped(tmp_path / "own", stored)
    model = load(tmp_path / "own")
    assert torch.equal(model.preprocess(image), processor(image)["pixel_values"][0])
    assert (model.classes, model.preprocessing()["mean"]) == (("red", "green"), mean)
    network, _ = wrapped(tmp_path / "bare")  # as one made of its architecture's name alone: that of the architecture
    usual = timm.data.create_transform(**timm.data.resolve_model_data_config(network.timm_model), is_training=False)
    assert torch.equal(load(tmp_path / "bare").preprocess(image), usual(image))


def test_class_names_come_from_the_directory_and_are_compared_with_the_data(tmp_path):
    model = load(KINDS["timm test_vit"](tmp_path).zero_shot)
    assert model.classes == ("red", "green", "blue car")
    with pytest.raises(DataError, match=r"output 1 of .* is 'green', class 1 of the data 'blue car'"):
        model.classifier(["red", "blue car", "green"])


def test_a_levit_that_was_called_before_is_refused_until_its_biases_are_forgotten():
    torch.manual_seed(0)
    settings = {"img_size": 32, "embed_dim": (16, 16, 16), "key_dim": 8, "num_heads": (2, 2, 2), "depth": (1, 1, 1)}
    first = timm.models.Levit(**settings, num_classes=3).eval()
    models = first, moved(copy.deepcopy(first))
    data = Split([(pixels(32, 6), torch.arange(6) % 3)], "id")
    with torch.no_grad():
        first(pixels(32))
    with pytest.raises(ModelError, match=r"attention_bias_cache holds what an earlier call"):
        sharpscope.scan(*models, data, alphas=[1], measures=[], progress=False)
    first.train().eval()
    found = sharpscope.scan(*models, data, alphas=[1], measures=[], progress=False).evals
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(models[1](pixels(32, 6)), torch.arange(6) % 3).item()
    assert found.query("measure == 'loss'")["value"].item() == pytest.approx(expected, rel=1e-5)


def test_an_unknown_name_names_others():
    with pytest.raises(UsageError, match=r"timm has no model 'resnet1888'"):
        load("timm:resnet1888")


def test_pretrained_weights_that_cannot_be_fetched_end_in_a_sentence(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(ModelError, match=r"timm cannot make resnet18: no route to host\n  fix: .*timm:NAME/FILE"):
        load("timm:resnet18")
