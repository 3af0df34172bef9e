"""Weights as libraries and training loops write them: each finds its place, or the way there is said."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from saved import family, pixels, vit
from typer.testing import CliRunner

import sharpscope as ss
from sharpscope.cli import app
from sharpscope.errors import MismatchError, ModelError
from sharpscope.merging import merge
from sharpscope.models import load, load_pair

# --- names on disk, and those in memory


def stored(folder):
    return load_file(f"{folder}/model.safetensors")


@pytest.mark.parametrize("name", ["ViT", "Dinov2", "Beit", "Swin", "Segformer"])
@pytest.mark.parametrize("way", ["file", "converted", "module.", "half", "memory"])
def test_weights_under_the_names_that_transformers_saves_are_those_of_the_folder(tmp_path, name, way):
    both = vit(tmp_path) if name == "ViT" else family(tmp_path, name)
    end = load(both.fine_tuned)
    expected, file = end.network.state_dict(), tmp_path / "ft.pt"
    assert not stored(both.fine_tuned).keys() >= expected.keys()  # else this tests nothing
    if way == "file":
        file = f"{both.fine_tuned}/model.safetensors"
    elif way == "converted":
        file = tmp_path / "x.safetensors"
        assert CliRunner().invoke(app, ["convert", both.fine_tuned, "--out", str(file)]).exit_code == 0
    elif way == "module.":
        torch.save({f"module.{key}": tensor for key, tensor in stored(both.fine_tuned).items()}, file)
    elif way == "half":
        halves = {k: t.half() if t.is_floating_point() else t for k, t in stored(both.fine_tuned).items()}
        torch.save(halves, file)
        expected = {k: t.half().float() if t.is_floating_point() else t for k, t in expected.items()}
    else:
        torch.save(expected, file)
    found = load_pair(both.zero_shot, file)[1]
    assert not found.network.training
    for key, tensor in found.network.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
        assert tensor.dtype == expected[key].dtype
    with torch.no_grad():
        assert torch.equal(
            load(file, like=end).network(pixels(both.side)).logits, found.network(pixels(both.side)).logits
        )


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        (lambda w: {k: t for k, t in w.items() if "query" not in k}, ModelError, "lacks 4 weights of a ViTFor.*q_proj"),
        (lambda w: w | {"extra": torch.ones(2)}, ModelError, r"holds 1 weights that a ViTFor.* does not have \(extra"),
        (lambda w: {k: torch.cat([t, t]) for k, t in w.items()}, MismatchError, r"is \(\d+.*, the architecture has"),
        (lambda w: {k: t * torch.nan for k, t in w.items()}, ModelError, "values that are not finite"),
        (lambda w: {k: t.to(torch.int8) for k, t in w.items()}, ModelError, "torch.int8, not a floating-point number"),
    ],
    ids=["lacking", "besides", "shape", "nan", "quantised"],
)
def test_renamed_weights_are_refused_as_others_are(tmp_path, change, error, problem):
    both = vit(tmp_path)
    torch.save(change(stored(both.fine_tuned)), tmp_path / "ft.pt")
    with pytest.raises(error, match=problem):
        load_pair(both.zero_shot, tmp_path / "ft.pt")


def test_a_merge_of_names_on_disk_with_names_in_memory_says_what_makes_them_alike(tmp_path):
    both = vit(tmp_path)
    end = load(both.fine_tuned)
    torch.save(end.network.state_dict(), tmp_path / "ft.pt")
    with pytest.raises(
        MismatchError, match=r"tensors of the same shapes, by other names(.|\n)*save_pretrained\(NEW_DI"
    ):
        merge(both.zero_shot, tmp_path / "ft.pt", 0.5, tmp_path / "m.pt")
    ss.load(tmp_path / "ft.pt", like=ss.load(both.zero_shot)).network.save_pretrained(tmp_path / "new")  # what it said
    merge(both.zero_shot, tmp_path / "new", 0.5, tmp_path / "m")
    merge(both.zero_shot, both.fine_tuned, 0.5, tmp_path / "expected")
    found, expected = stored(tmp_path / "m"), stored(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
