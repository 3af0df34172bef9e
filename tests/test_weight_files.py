"""Weights as libraries and training loops write them: each finds its place, or the way there is said."""

from __future__ import annotations

import argparse
import sys
import warnings

import clips
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from saved import family, moved, pixels, vit
from torch.optim.swa_utils import AveragedModel
from typer.testing import CliRunner

import sharpscope as ss
from sharpscope.cli import app
from sharpscope.errors import MismatchError, ModelError
from sharpscope.merging import merge, scanned_plan, write_plan
from sharpscope.models import load, load_pair, weight_files
from sharpscope.models.weight_files import SafetensorsFile
from sharpscope.recipe import Recipe

# --- names on disk, and those in memory


def stored(folder):
    return load_file(f"{folder}/model.safetensors")


KINDS = ("bool", "uint8", "int64", "float16", "bfloat16", "float64", "complex64", "float8_e4m3fn")


def test_every_tensor_of_safetensors_is_read_as_the_library_reads_it(tmp_path, monkeypatch):
    shapes = {"matrix": (2, 3), "number": (), "nothing": (0, 2)}
    state = {f"{k}.{n}": torch.randint(0, 2, s).to(getattr(torch, k)) for k in KINDS for n, s in shapes.items()}
    save_file(state, tmp_path / "m.safetensors", metadata={"format": "pt"})
    opened = []
    monkeypatch.setattr(weight_files, "safe_open", lambda *place: opened.append(place) or safetensors.safe_open(*place))
    found = SafetensorsFile(tmp_path / "m.safetensors")
    for name, tensor in load_file(tmp_path / "m.safetensors").items():
        assert (found.tensor(name).dtype, found.tensor(name).shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found.tensor(name).reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    assert len(opened) == 1  # the library reads the whole header each time


def test_a_file_that_is_cut_off_after_it_was_opened_is_said_to_be_damaged(tmp_path):
    save_file({"a": torch.ones(9)}, tmp_path / "m.safetensors")
    found = SafetensorsFile(tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors").write_bytes((tmp_path / "m.safetensors").read_bytes()[:-4])
    with pytest.raises(ModelError, match=r"m\.safetensors cannot be read: it ends within 'a'"):
        found.tensor("a")


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


# --- wrappers


class Own(torch.nn.Module):
    """A module of one's own whose weights all have a name that wrappers give, too."""

    def __init__(self, inside):
        super().__init__()
        torch.manual_seed(0)
        body = torch.nn.Sequential(
            *(torch.nn.Conv2d(3, 4, 4, 4), torch.nn.BatchNorm2d(4), torch.nn.GELU()),
            *(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3)),
        )
        for name in reversed(inside.split(".")[1:]):
            body = torch.nn.ModuleDict({name: body})
        self.inside = inside
        self.add_module(inside.split(".")[0], body)

    def forward(self, x):
        return self.get_submodule(self.inside)(x)


INSIDES = ("backbone", "model", "clip", "module", "model.backbone")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of functions that make such networks."""
    makers = "".join(f"def {name.replace('.', '_')}(): return Own({name!r}).eval()\n" for name in INSIDES)
    (tmp_path / "own_insides.py").write_text(f"from test_weight_files import Own\n{makers}")
    monkeypatch.chdir(tmp_path)
    yield lambda inside: f"py:own_insides:{inside.replace('.', '_')}"
    sys.modules.pop("own_insides", None)


@pytest.mark.parametrize("around", ["", "module.", "module._orig_mod."])
@pytest.mark.parametrize("inside", INSIDES)
def test_a_prefix_that_is_the_networks_own_is_left_on_the_names(own, tmp_path, inside, around):
    end = moved(Own(inside))
    torch.save({f"{around}{key}": tensor for key, tensor in end.state_dict().items()}, tmp_path / "ft.pt")
    found = load(tmp_path / "ft.pt", like=load(own(inside)))
    assert all(torch.equal(tensor, end.state_dict()[key]) for key, tensor in found.network.state_dict().items())


def test_of_such_a_network_a_scan_is_merged_in_its_layers(own, tmp_path):
    for name, network in (("zs", Own("backbone").eval()), ("ft", moved(Own("backbone")).eval())):
        torch.save(network.state_dict(), tmp_path / f"{name}.pt")
    like = load(own("backbone"))
    ends = [load(tmp_path / f"{name}.pt", like=like) for name in ("zs", "ft")]
    data = ss.Split([(pixels(16, 6), torch.arange(6) % 3)], "id")
    result = ss.scan(*ends, data, alphas=[0.5], measures=[], progress=False)
    plan = scanned_plan(result.meta, Recipe((("backbone.5", 0.0), ("*", 1.0))))
    write_plan(plan, tmp_path / "m.pt")
    found, start, end = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("m", "zs", "ft"))
    assert all(torch.equal(found[key], (start if ".5." in key else end)[key]) for key in end)


@pytest.mark.parametrize("inside", ["backbone", "plain"])
def test_an_averaged_model_of_torch_is_the_model_that_it_averages(own, tmp_path, inside):
    """Loaded, and merged with plain weights and with others that were averaged more often."""
    if inside == "plain":
        like, networks = load(clips.save(tmp_path / "base", clips.network())), [clips.network(), moved(clips.network())]
    else:
        like, networks = load(own(inside)), [Own(inside), moved(Own(inside))]
    start, end = (AveragedModel(network) for network in networks)
    end.n_averaged += 7
    torch.save(networks[0].state_dict(), tmp_path / "zs.pt")
    torch.save(start.state_dict(), tmp_path / "zs_swa.pt")
    torch.save(end.state_dict(), tmp_path / "ft.pt")
    found = load(tmp_path / "ft.pt", like=like).network.state_dict()
    assert all(torch.equal(tensor, networks[1].state_dict()[key]) for key, tensor in found.items())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* are batch-norm statistics")
        for first in ("zs", "zs_swa"):
            merge(tmp_path / f"{first}.pt", tmp_path / "ft.pt", 0.5, tmp_path / f"{first}_m.pt")
    merged = [torch.load(tmp_path / f"{first}_m.pt", weights_only=True) for first in ("zs", "zs_swa")]
    for key, tensor in networks[0].state_dict().items():
        expected = torch.lerp(tensor, found[key], 0.5) if tensor.is_floating_point() else found[key]
        assert all(torch.equal(middle[f"module.{key}"], expected) for middle in merged), key
    assert all(middle["n_averaged"] == 7 for middle in merged)


# --- beside other things


def lightning(weights):
    """As Lightning saves a training module that holds the network and a loss with weights."""
    return {f"model.{key}": tensor for key, tensor in weights.items()} | {"criterion.weight": torch.ones(3)}


def put(file, weights):
    if file.suffix == ".safetensors":
        save_file(weights, file)
    else:
        torch.save({"state_dict": weights, "epoch": 3}, file)


def done(line, folder, monkeypatch):
    """Do what the way out says; the new file."""
    monkeypatch.chdir(folder)
    exec(line, {"torch": torch, "safetensors": safetensors})
    return next(folder.glob("NEW.*"))


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
@pytest.mark.parametrize("named", ["state_dict", "model._orig_mod"])
def test_a_network_inside_of_a_training_module_is_found_and_the_line_that_takes_it_out_is_given(
    tmp_path, monkeypatch, ending, named
):
    base, end = clips.save(tmp_path / "base", clips.network()), moved(clips.network()).state_dict()
    inside = {f"_orig_mod.{key}": tensor for key, tensor in end.items()} if "_orig" in named else end
    put(tmp_path / f"ft.{ending}", lightning(inside))
    said = rf"ft.{ending} holds the weights under 'model\.', and besides criterion\.weight\n  fix: "
    with pytest.raises(ModelError, match=said) as caught:
        load_pair(base, tmp_path / f"ft.{ending}")
    with pytest.raises(MismatchError, match=said) as other:
        merge(base, tmp_path / f"ft.{ending}", 0.5, tmp_path / f"m.{ending}")
    assert other.value.fix == caught.value.fix
    new = done(caught.value.fix, tmp_path, monkeypatch)
    found = load_pair(base, new)[1].network.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in end.items())
    merge(base, new, 0.5, tmp_path / f"m{new.suffix}")


def test_of_two_networks_in_one_file_both_are_named(tmp_path):
    like, end = load(clips.save(tmp_path / "base", clips.network())), clips.network().state_dict()
    torch.save({f"{who}.{key}": t for who in ("student", "teacher") for key, t in end.items()}, tmp_path / "ft.pt")
    with pytest.raises(
        ModelError, match=r"ft.pt holds the weights under 'student\.' and under 'teacher\.'\n.*'student"
    ):
        load(tmp_path / "ft.pt", like=like)


@pytest.mark.parametrize("key", ["model_ema", "model_state"])
def test_state_dicts_under_other_keys_are_named_with_the_line_that_takes_one_out(tmp_path, monkeypatch, key):
    base, end = clips.save(tmp_path / "base", clips.network()), moved(clips.network()).state_dict()
    torch.save({key: end, "epoch": 3, "optimizer": {"state": {0: torch.ones(2)}}}, tmp_path / "ft.pt")
    with pytest.raises(
        ModelError, match=rf"ft.pt holds state dicts under '{key}', and none under state_dict, "
    ) as caught:
        load(tmp_path / "ft.pt")
    found = load_pair(base, done(caught.value.fix, tmp_path, monkeypatch))[1].network.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in end.items())


@pytest.mark.parametrize("besides", [{}, {"args": argparse.Namespace(lr=0.1)}], ids=["plain", "namespace"])
@pytest.mark.parametrize(("key", "average"), [("state_dict", "state_dict_ema"), ("model", "model_ema")])
def test_a_moving_average_that_is_left_aside_is_said_by_load_scan_and_merge(
    tmp_path, monkeypatch, key, average, besides
):
    """As timm's CheckpointSaver and DeiT write it; the line that is given takes the average out."""
    base, end = clips.save(tmp_path / "base", clips.network()), moved(clips.network()).state_dict()
    ema = {f"module.{name}": tensor / 2 for name, tensor in end.items()}
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}
    torch.save({key: end, average: ema, "optimizer": optimizer, "epoch": 3, **besides}, tmp_path / "ft.pt")
    start, model = load_pair(base, tmp_path / "ft.pt")
    assert all(torch.equal(model.network.state_dict()[name], tensor) for name, tensor in end.items())
    said = (
        f"ft.pt holds weights of the same network under {average}, too; those under {key} are used. To use the others: "
    )
    (note,) = model.notes
    assert said in note
    data = ss.Split([(pixels(16, 6), torch.arange(6) % 3)], "id", classes=["a", "b", "c"])
    result = ss.scan(start, model, data, alphas=[0.5], measures=[], progress=False)
    assert note in result.meta["warnings"]
    with warnings.catch_warnings(record=True, action="always") as warned:
        merge(base, tmp_path / "ft.pt", 0.5, tmp_path / "m.pt")
    assert note in [str(warning.message) for warning in warned]
    line = note.split("the others: ")[1]
    assert ("if you trust its source" in line) == bool(besides)
    found = load_pair(base, done(line, tmp_path, monkeypatch))[1].network.state_dict()
    assert all(torch.equal(found[name], tensor / 2) for name, tensor in end.items())


def test_what_else_training_loops_put_beside_weights_is_no_average(tmp_path):
    like, end = load(clips.save(tmp_path / "base", clips.network())), clips.network().state_dict()
    head = {"head": {"weight": torch.ones(2)}, "queue": {"vectors": torch.ones(2, 3)}, "empty": {}, "seed": {"n": 1}}
    torch.save({"state_dict": end, **head}, tmp_path / "ft.pt")
    assert load(tmp_path / "ft.pt", like=like).notes == ()
