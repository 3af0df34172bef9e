"""Odd ways in that a stranger tries: a clear success or a clear sentence."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import clips
import numpy as np
import pytest
import saved
import torch
from saved import moved
from torch.utils.data import DataLoader

import sharpscope as ss
from sharpscope.data import Split
from sharpscope.errors import DataError, ModelError, UsageError
from sharpscope.models import load

CLASSES = ("red", "green", "blue")
X = torch.randn(6, 3, clips.SIDE, clips.SIDE, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return clips.save(tmp_path_factory.mktemp("models") / "base", clips.network())


@pytest.fixture(scope="module")
def model(base):
    return load(base)


def scanned(a, b, data):
    return ss.scan(a, b, data, alphas=[0], measures=[], progress=False)


# --- weights


def before(*prefixes):
    return lambda weights: {"".join(prefixes) + name: tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        before("module.model."),
        before("model.module."),
        before("clip."),
        before("module.", "clip_model."),
        before("backbone."),
        lambda w: {"state_dict": w, "best_acc": np.float64(0.7), "top": np.float32(0.5), "epoch": 3},
        lambda w: {"model": w, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}},
        lambda w: {name: torch.nn.Parameter(tensor) for name, tensor in w.items()},
    ],
    ids=["module.model", "model.module", "clip", "module.clip_model", "backbone", "numpy", "optimizer", "parameters"],
)
def test_what_training_loops_leave_around_weights_is_seen_through(model, tmp_path, wrap):
    tuned = moved(clips.network()).state_dict()
    torch.save(wrap(tuned), tmp_path / "ft.pt")
    found = load(tmp_path / "ft.pt", like=model).network.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in tuned.items())


def test_numpys_numbers_are_passed_over_not_made(tmp_path, model, monkeypatch):
    """Files of numpy 1 name another module; neither is called."""
    torch.save({"state_dict": clips.network().state_dict(), "best": np.float64(1.0)}, tmp_path / "ft.pt")
    monkeypatch.setattr("numpy._core.multiarray.scalar", lambda *_: 1 / 0)
    assert load(tmp_path / "ft.pt", like=model)


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        (None, "a NoneType is no reference to a model"),
        (
            clips.network,
            "a function is no reference to a model\n  fix: .*; a module whose forward gives",
        ),
        ("ViT-B/32", "'ViT-B/32' is OpenAI's name of a CLIP\n  fix: oc:ViT-B-32/openai"),
        ("RN50x4", "is OpenAI's name of a CLIP\n  fix: oc:RN50x4/openai"),
        ("ViT-L/14@336px", "fix: oc:ViT-L-14-336/openai"),
        ("https://huggingface.co/openai/clip-vit-base-patch32/tree/main", "fix: hf:openai/clip-vit-base-patch32"),
    ],
)
def test_what_is_no_reference_names_the_one_that_is(ref, message):
    with pytest.raises(UsageError, match=message):
        load(ref)


def test_a_file_that_holds_no_weights_is_not_called_a_pickle(base, tmp_path):
    with pytest.raises(ModelError, match=r"config.json is no file of weights, it begins with b'\{"):
        load(base / "config.json")
    (tmp_path / "model.onnx").write_bytes(b"abc")
    with pytest.raises(ModelError, match="onnx cannot be read"):
        load(tmp_path / "model.onnx")


def test_a_file_named_as_the_other_format_is_told_its_own(base, tmp_path):
    shutil.copy(base / "model.safetensors", tmp_path / "ft.pt")
    with pytest.raises(ModelError, match=r"ft.pt is a safetensors file, .*\n  fix: name it ft.safetensors"):
        load(tmp_path / "ft.pt")
    torch.save(clips.network().state_dict(), tmp_path / "zs.safetensors")
    with pytest.raises(
        ModelError, match=r"zs.safetensors is no safetensors file, .* torch.save .*\n  fix: name it zs.pt"
    ):
        load(tmp_path / "zs.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:99])
    with pytest.raises(ModelError, match=r"torn.safetensors cannot be read"):
        load(tmp_path / "torn.safetensors")


def test_the_help_of_layers_names_no_weights_alone_which_it_refuses(run):
    assert "weights file" in run("report", "--help")[1]
    assert "weights file" not in run("layers", "--help")[1]


def test_a_folder_of_checkpoints_names_the_last(base, tmp_path):
    for step in (100, 200):
        shutil.copytree(base, tmp_path / f"checkpoint-{step}")
    with pytest.raises(ModelError, match=r"has no config.json, 2 directories in it have\n  fix: .*checkpoint-200"):
        load(tmp_path)


def test_weights_of_one_byte_are_not_cast_without_their_scale(base, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(base, tmp_path / "copy")
    for dtype in (torch.int8, torch.float8_e4m3fn):
        found = load_file(base / "model.safetensors")
        found["visual_projection.weight"] = found["visual_projection.weight"].to(dtype)
        save_file(found, copy / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(
            ModelError, match=rf"'visual_projection.weight' is {dtype}, not a floating-point number of 16"
        ):
            load(copy)


# --- modules


def test_a_clip_as_a_module_has_no_logits(model):
    with pytest.raises(ModelError, match=r"is a CLIPModel of transformers: of images alone it gives features"):
        scanned(clips.network(), clips.network(), [(X, Y)])


def test_a_loaded_model_beside_a_module_is_said(model):
    with pytest.raises(ModelError, match=r"zero-shot model was loaded, the fine-tuned model is a Linear\n  fix: "):
        scanned(model, torch.nn.Linear(2, 2), [(X, Y)])
    with pytest.raises(ModelError, match="the fine-tuned model was loaded, the zero-shot model is a str"):
        scanned("base", model, [(X, Y)])


# --- batches


@pytest.mark.parametrize(
    "item",
    [
        {"pixel_values": X, "labels": Y},
        {"pixel_values": list(X), "labels": Y.tolist()},
        ({"pixel_values": X}, Y),
        [X.double(), Y.int()],
        (X.numpy(), Y.numpy()),
    ],
    ids=["mapping", "lists", "processor's mapping and labels", "float64", "numpy"],
)
def test_batches_of_the_usual_forms_mean_the_same(item, model):
    expected = scanned(model, model, Split([(X, Y)], "id", classes=CLASSES)).evals["value"].to_numpy()
    found = scanned(model, model, Split([item], "id", classes=CLASSES)).evals["value"].to_numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_data_loader_of_mappings_is_read(model):
    rows = [{"pixel_values": x, "labels": int(y), "path": "?"} for x, y in zip(X, Y, strict=True)]
    split = Split(DataLoader(rows, batch_size=4), "id", classes=CLASSES)
    assert torch.equal(torch.cat([batch.inputs for batch in split]), X)
    assert torch.equal(split.targets, Y)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ((X * 50).byte(), r"the images are torch.uint8, not scaled and normalised .*\n  fix: .*model.preprocess"),
        (X.permute(0, 2, 3, 1), r"the images are \(16, 16, 3\), the model takes \(3, 16, 16\)"),
        (X[:, :1], r"the images are \(1, 16, 16\), the model takes \(3, 16, 16\)"),
    ],
)
def test_pixels_that_are_not_as_the_model_takes_them_are_refused(images, message, model):
    with pytest.raises(DataError, match=message):
        scanned(model, model, Split([(images, Y)], "id", classes=CLASSES))


def test_lists_of_images_of_several_sizes_make_no_batch():
    with pytest.raises(DataError, match="has images of type Tensor, which make no tensor"):
        Split([{"pixel_values": [X[0], X[0, :, :8]], "labels": [0, 1]}], "id")


def test_a_configuration_beside_no_weights_is_not_guessed_from(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(clips.network().config.to_dict()))
    with pytest.raises(ModelError, match="holds no weights"):
        load(tmp_path)


def test_an_object_that_only_looks_like_a_model_is_named():
    with pytest.raises(ModelError, match="the zero-shot model is a SimpleNamespace"):
        scanned(SimpleNamespace(), SimpleNamespace(), [(X, Y)])


# --- classifiers at a shell


@pytest.fixture
def headed(tmp_path):
    """Two classifiers of red, green and blue car, and as many folders of images."""
    both = saved.vit(tmp_path)
    clips.images(tmp_path / "id", (*CLASSES[:2], "blue_car"))
    return [*("--zero-shot", both.zero_shot, "--fine-tuned", both.fine_tuned), "--id", tmp_path / "id", "--dry-run"]


def nameless(folder, outputs=3):
    """Take the class names out of a classifier's configuration."""
    file = folder / "config.json"
    stored = json.loads(file.read_text())
    stored["id2label"] = {number: f"LABEL_{number}" for number in range(outputs)}
    stored["label2id"] = {f"LABEL_{number}": number for number in range(outputs)}
    file.write_text(json.dumps(stored))


@pytest.mark.filterwarnings("always")
def test_folders_of_the_id_data_that_no_output_means_are_left_out_as_the_refusal_says(run, headed, tmp_path):
    clips.images(tmp_path / "id", ["plum"])
    code, _, err = run("report", *headed)
    assert code == 3
    assert "'id': folder 'plum' is none of the 3 classes" in err
    assert "--subset" in err
    code, out, err = run("report", *headed, "--subset")
    assert code == 0, err
    assert "warning: id: 1 of 4 folders are none of the 3 classes and left out ('plum')" in err
    assert "12 images" in out


def test_class_names_that_the_fine_tuned_end_alone_has_number_the_folders(run, headed, tmp_path):
    nameless(tmp_path / "base")
    code, _, err = run("report", *headed)  # sorted, the folders are blue_car, green, red
    assert code == 0, err


@pytest.mark.filterwarnings("always")
def test_templates_beside_classifiers_are_said_to_change_nothing(run, headed, tmp_path):
    (tmp_path / "templates.txt").write_text("a {}\n")
    code, _, err = run("report", *headed, "--templates", tmp_path / "templates.txt")
    assert code == 0, err
    assert f"warning: --templates changes nothing: {tmp_path / 'base'} is a classifier with its own head" in err
