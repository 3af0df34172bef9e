"""A file of open_clip says neither preprocessing nor activation: what tags of its name tell, and what is said of it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from PIL import Image
from saved import CLASSES, moved
from saved_libraries import CONFIGS, settings_size

from sharpscope.errors import MismatchError
from sharpscope.models import load, load_pair, pair

open_clip = pytest.importorskip("open_clip")
NAME = "ViT-tiny-test"
SQUASHED = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bilinear", "resize_mode": "squash"}
OPENAI = {
    "mean": open_clip.OPENAI_DATASET_MEAN,
    "std": open_clip.OPENAI_DATASET_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
IMAGE = Image.linear_gradient("L").convert("RGB").resize((61, 40))


@pytest.fixture
def tags(monkeypatch):
    """A configuration of open_clip's under a name; what is put in here are its tags."""
    config = copy.deepcopy(CONFIGS["ViT"]) | {"quick_gelu": False}
    config["text_cfg"] |= {"vocab_size": 49408, "context_length": 77}
    found = {}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, NAME, config)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, NAME, found)
    return found


@pytest.fixture
def files(tags, tmp_path):
    """References to both ends as files, and their networks."""
    torch.manual_seed(0)
    networks = open_clip.create_model(NAME).eval(), moved(open_clip.create_model(NAME).eval())
    for name, network in zip(("zs", "ft"), networks, strict=True):
        torch.save(network.state_dict(), tmp_path / f"{name}.pt")
    return [f"oc:{NAME}/{tmp_path}/{name}.pt" for name in ("zs", "ft")], networks


def prepared(settings):
    """The image as open_clip preprocesses it with these settings."""
    made = open_clip.transform
    return made.image_transform_v2(made.PreprocessCfg(size=settings_size("ViT"), **settings), is_train=False)(IMAGE)


def notes(start, end):
    """What is said of assumptions."""
    return [note for note in pair(start, end, CLASSES)[2] if "does not say" in note]


def directory(folder, network, settings):
    """The network as open_clip's training saves it with its settings."""
    folder.mkdir()
    stored = {"model_cfg": open_clip.get_model_config(NAME), "preprocess_cfg": settings}
    (folder / "open_clip_config.json").write_text(json.dumps(stored))
    torch.save(network.state_dict(), folder / "open_clip_pytorch_model.bin")
    return str(folder)


@pytest.mark.parametrize("settings", [SQUASHED, OPENAI])
def test_a_file_is_preprocessed_as_all_tags_of_its_configuration(tags, files, settings):
    tags.update({"a": {"url": "", **settings}, "b": {"url": "", **settings}})
    start, end = load_pair(*files[0])
    assert torch.equal(start.preprocess(IMAGE), prepared(settings))
    assert notes(start, end) == []


def test_the_preprocessing_of_most_tags_is_assumed_where_they_differ_and_that_is_said_once(tags, files):
    tags.update({"a": {"url": "", **OPENAI}, "b": {"url": "", **SQUASHED}, "c": {"url": "", **SQUASHED}})
    start, end = load_pair(*files[0])
    assert torch.equal(start.preprocess(IMAGE), prepared(SQUASHED))
    (note,) = notes(start, end)
    assert note.startswith(
        f"a file of {NAME} does not say its preprocessing: mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5)"
    )
    assert "resize_mode squash is assumed, as of b, c, but open_clip also has a with mean (0.48145466" in note


def test_an_end_that_knows_its_preprocessing_gives_it_to_the_one_that_does_not(files, tmp_path):
    known = directory(tmp_path / "known", files[1][1], SQUASHED)
    start, end = load_pair(files[0][0], known)
    assert torch.equal(start.preprocess(IMAGE), prepared(SQUASHED))
    assert notes(start, end) == []
    way_out = r"image_mean is .* in .*\n  fix: sharpscope.models.load_pair"
    with pytest.raises(MismatchError, match=way_out):  # images may have been read with either
        pair(load(files[0][0]), load(known), CLASSES)


def test_two_directories_that_differ_are_refused_as_before(files, tmp_path):
    ends = [directory(tmp_path / name, files[1][0], kind) for name, kind in (("a", OPENAI), ("b", SQUASHED))]
    with pytest.raises(MismatchError, match=r"image_mean is .*\n  fix: a checkpoint and its fine-tuned self"):
        pair(*load_pair(*ends), CLASSES)


def test_gelu_is_said_to_be_assumed_where_a_tag_was_trained_with_quickgelu(tags, files):
    tags.update({"a": {"url": "", "quick_gelu": True}, "b": {"url": ""}})
    start, end = load_pair(*files[0])
    assert start.library.architecture()["activation of the image tower"] == "gelu"  # as open_clip reads it
    (note,) = notes(start, end)
    assert note.startswith(f"a file of {NAME} does not say its activation: GELU is assumed, as open_clip does; ")
    assert note.endswith("if it was made from a, which were trained with QuickGELU")


def test_a_quickgelu_configuration_is_named_where_there_is_one():
    from sharpscope.models.tags import activation_of

    assert "; oc:ViT-B-32-quickgelu/FILE if it was made from openai, " in activation_of("ViT-B-32")[0]
    assert activation_of("ViT-B-32-quickgelu") == activation_of("ViT-B-16-SigLIP") == ()
