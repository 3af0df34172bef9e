"""Models that cannot be read or do not belong together: each ends in its own sentence, and writes nothing."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import clips
import pytest
import torch
from safetensors.torch import load_file, save_file
from saved import CLASSES, bare_tower, clip_classifier, moved, siglip_network, vit

import sharpscope as ss
from sharpscope.data import Split
from sharpscope.errors import DataError, MismatchError, ModelError, UsageError
from sharpscope.models import checkpoint, installed, load, load_pair, pair


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return clips.save(tmp_path_factory.mktemp("models") / "base", clips.network())


@pytest.fixture(scope="module")
def model(base):
    return load(base)


@pytest.fixture
def copy(base, tmp_path):
    return Path(shutil.copytree(base, tmp_path / "copy"))


def changed(folder, change):
    """Rewrite the weights of a directory; the changed file."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return file


def sharded(folder, shards=2):
    """Split the weights of a directory as save_pretrained does above its shard size; the shards' names."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    places = {name: names[i % shards] for i, name in enumerate(weights)}
    for file in names:
        part = {name: weights[name] for name, place in places.items() if place == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return names


# --- damaged files


def test_shards_are_read_as_one(copy, model):
    sharded(copy)
    for found in (load(copy), load(copy, like=model)):
        start, end, _ = pair(model, found, CLASSES)
        assert all(torch.equal(a, b) for a, b in zip(start.parameters(), end.parameters(), strict=True))


def test_a_missing_shard_is_named_with_what_it_held(copy):
    names = sharded(copy)
    held = len(load_file(copy / names[1]))
    (copy / names[1]).unlink()
    with pytest.raises(ModelError, match=rf"copy lacks the shard model-00002-of-00002.safetensors with {held} tensors"):
        load(copy)


def test_a_shard_without_its_tensors_is_named(copy):
    names = sharded(copy)
    held = len(load_file(copy / names[1]))
    shutil.copy(copy / names[0], copy / names[1])
    with pytest.raises(ModelError, match=r"is in model-00001-of-00002.safetensors and in model-00002"):
        load(copy)
    save_file({}, copy / names[1])
    with pytest.raises(ModelError, match=rf"the shards of .*index.json lack '.*' \({held} tensors\)"):
        load(copy)


def test_an_index_that_is_no_index_is_named(copy):
    sharded(copy)
    (copy / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match=r"model.safetensors.index.json is no index of shards"):
        load(copy)


@pytest.mark.parametrize("keep", [0, 100, 3000])
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_a_truncated_file_of_weights_is_named(base, model, tmp_path, keep, ending):
    file = tmp_path / f"ft.{ending}"
    if ending == "pt":
        torch.save(load_file(base / "model.safetensors"), file)
    else:
        shutil.copy(base / "model.safetensors", file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=rf"ft.{ending} cannot be read: .*\n  fix: copy or save the checkpoint anew"):
        load(file, like=model)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([torch.zeros(2)], "a list"),
        ({}, "it is empty"),
        ({"lr": 0.1}, "'lr' is a float"),
        (torch.ones(2), "Tensor"),
    ],
)
def test_a_file_that_is_no_state_dict_says_what_it_is(tmp_path, model, content, found):
    torch.save(content, tmp_path / "ft.pt")
    with pytest.raises(ModelError, match=f"ft.pt holds .*{found}"):
        load(tmp_path / "ft.pt", like=model)


def test_a_torchscript_archive_is_a_program(tmp_path, model):
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.script(torch.nn.Linear(2, 3)).save(tmp_path / "ft.pt")
    with pytest.raises(ModelError, match=r"ft.pt is a TorchScript archive, a program.*\n  fix: oc:NAME/openai"):
        load(tmp_path / "ft.pt", like=model)


def test_a_directory_without_weights_is_named(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"copy holds no weights \(model.safetensors, "):
        load(copy)


# --- weights that are not what they should be


def test_lora_adapters_must_be_merged_first(copy, model):
    adapters = {"base_model.model.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 16)}
    torch.save(adapters, copy / "ft.pt")
    (copy / "adapter_config.json").write_text("{}")
    for ref in (copy / "ft.pt", copy):
        with pytest.raises(ModelError, match=r"LoRA adapters that are not merged.*\n  fix: .*merge_and_unload"):
            load(ref, like=model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("alone", [False, True])
def test_a_weight_that_is_not_finite_is_named(copy, model, value, alone):
    def spoil(weights):
        weights["vision_model.post_layernorm.weight"][3] = value

    file = changed(copy, spoil)
    with pytest.raises(ModelError, match=r"'vision_model.post_layernorm.weight' has 1 of 16 values that are not fin"):
        load(file if alone else copy, like=model)


def test_quantised_weights_are_refused(copy, model):
    def quantise(weights):
        name = "vision_model.encoder.layers.0.mlp.fc1.weight"
        weights[name] = weights[name].to(torch.int8)

    with pytest.raises(ModelError, match=r"fc1.weight' is torch.int8, not a floating-point number"):
        load(changed(copy, quantise), like=model)


def test_resized_position_embeddings_are_no_path(copy, model):
    def resize(weights):
        weights["vision_model.embeddings.position_embedding.weight"] = torch.zeros(17, 16)

    file = changed(copy, resize)
    with pytest.raises(MismatchError, match=r"position_embedding.weight' is \(17, 16\), .*\(5, 16\): .* image or text"):
        load(file, like=model)


def test_a_tensor_of_another_shape_is_named(copy, model):
    def widen(weights):
        weights["visual_projection.weight"] = torch.zeros(9, 16)

    with pytest.raises(MismatchError, match=r"'visual_projection.weight' is \(9, 16\), the architecture has \(8, 16\)"):
        load(changed(copy, widen), like=model)


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [("vision_model.encoder.layers.1.mlp", "lacks 4 weights of a CLIPModel"), ("text_model.final", "lacks 2 weights")],
)
def test_missing_tensors_are_counted(copy, model, pattern, problem):
    def drop(weights):
        for name in [name for name in weights if name.startswith(pattern)]:
            del weights[name]

    with pytest.raises(ModelError, match=rf"{problem}.*\({pattern}"):
        load(changed(copy, drop), like=model)


def test_tensors_left_over_are_counted(copy, model):
    def add(weights):
        weights["adapter.weight"] = torch.zeros(2)

    with pytest.raises(ModelError, match=r"holds 1 weights that a CLIPModel does not have \(adapter.weight, "):
        load(changed(copy, add), like=model)


# --- what wrappers leave in files is seen through


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: {"state_dict": w, "epoch": 3, "args": argparse.Namespace(lr=1e-5)},
        lambda w: {"model": {f"module.{name}": tensor for name, tensor in w.items()}},
        lambda w: {f"_orig_mod.{name}": tensor for name, tensor in w.items()},
        lambda w: {f"module._orig_mod.{name}": tensor for name, tensor in w.items()},
        lambda w: {name.replace("layers.", "layers._fsdp_wrapped_module."): tensor for name, tensor in w.items()},
        lambda w: {f"base_model.model.{name}": tensor for name, tensor in w.items()},
        lambda w: {f"model.{name}": tensor.half() for name, tensor in w.items()},
    ],
    ids=["plain", "state_dict", "model, DDP", "compiled", "DDP, compiled", "FSDP", "PEFT, merged", "Lightning, half"],
)
def test_wrapped_weights_are_those_inside(model, tmp_path, wrap):
    tuned = moved(clips.network())
    torch.save(wrap(tuned.state_dict()), tmp_path / "ft.pt")
    found = load(tmp_path / "ft.pt", like=model)
    for name, tensor in found.network.state_dict().items():
        torch.testing.assert_close(tensor, tuned.state_dict()[name], rtol=1e-3, atol=1e-4)
    assert found.where == (tmp_path / "ft.pt").resolve()


# --- two models that do not belong together


def test_networks_of_different_depth_are_refused(model, tmp_path):
    other = clips.save(tmp_path, clips.network(blocks=3))
    with pytest.raises(MismatchError, match=r"vision_config.num_hidden_layers is 2 in .*base but 3 in"):
        pair(model, load(other), CLASSES)


def test_a_clip_and_a_siglip_are_refused(model, tmp_path):
    clips.save(tmp_path, siglip_network())
    with pytest.raises(MismatchError, match=r" is .* in .*base but .* in "):
        pair(model, load(tmp_path), CLASSES)


def test_a_clip_and_a_classifier_are_refused(model, tmp_path):
    with pytest.raises(MismatchError, match=r"base is a CLIP, .*tuned is a classifier with its own head"):
        pair(model, load(clip_classifier(tmp_path).fine_tuned), CLASSES)


def test_two_files_of_weights_have_no_architecture(base):
    with pytest.raises(UsageError, match=r"both hold weights only\n  fix: give the architecture"):
        load_pair(base / "model.safetensors", base / "model.safetensors")


def test_a_classifier_and_data_with_other_classes_are_refused(tmp_path):
    model = load(vit(tmp_path).zero_shot)
    assert model.classes == CLASSES
    with pytest.raises(DataError, match=r"output 0 of .*base is 'red', class 0 of the data 'green'\n  fix: .*classes"):
        model.classifier(["green", "red", "blue car"])
    with pytest.raises(DataError, match=r"has 3 outputs, the data 2 classes"):
        model.classifier(["red", "green"])


def test_images_are_matched_to_a_classifiers_outputs_by_name(tmp_path):
    model = load(vit(tmp_path / "models").zero_shot)
    folder = clips.images(tmp_path / "images", ["green", "red"])
    split = ss.folder(folder, model, classes=model.classes)
    assert split.classes == CLASSES
    assert split.columns == (0, 1)
    assert set(split.targets.tolist()) == {0, 1}


def test_a_naflex_siglip_is_named(copy):
    config = json.loads((copy / "config.json").read_text()) | {
        "model_type": "siglip2",
        "architectures": ["Siglip2Model"],
    }
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"copy is a 'siglip2' model \(Siglip2Model\)\n  fix: .*py:PACKAGE"):
        load(copy)


def test_a_text_tower_that_the_loss_does_not_touch_is_unused_not_flat():
    network = clips.network()

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vision_model, self.text_model = network.vision_model, network.text_model
            self.classifier = torch.nn.Linear(16, 3)

        def forward(self, images):
            return self.classifier(self.vision_model(images).pooler_output)

    data = Split([(torch.randn(6, 3, 16, 16), torch.arange(6) % 3)], "id")
    start = Both().eval()
    result = ss.scan(start, start, data, alphas=[0.0], measures=["m_sharpness"], progress=False)
    assert result.meta["unused"] == ["text.embed", "text.block.00", "text.norm"]
    assert not any(layer.startswith("text") for layer in result.layers["layer"])


@pytest.mark.parametrize(("setting", "value"), [("hidden_act", "gelu"), ("num_attention_heads", 4)])
def test_a_tower_alone_is_compared_with_the_model_that_it_is_put_into(tmp_path, setting, value):
    saved = bare_tower(tmp_path, "CLIPVisionModel")
    file = Path(saved.fine_tuned) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {setting: value}))
    with pytest.raises(MismatchError, match=rf"of the image tower is .* in .*base but {value!r} in .*tuned"):
        load_pair(saved.zero_shot, saved.fine_tuned)


def test_what_belongs_to_no_tower_is_left_over_not_dropped(tmp_path):
    saved = bare_tower(tmp_path, "CLIPVisionModelWithProjection")
    file = changed(Path(saved.fine_tuned), lambda weights: weights.update({"adapter.weight": torch.zeros(2)}))
    with pytest.raises(ModelError, match=r"holds 1 weights that a CLIPModel does not have \(adapter.weight, "):
        load_pair(saved.zero_shot, file)


# --- factories


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_models.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Sequential):\n    pass\n"
        "def net():\n    return Net(torch.nn.Flatten(), torch.nn.Linear(12, 3))\n"
        "def both():\n    return net(), lambda image: torch.full((3, 2, 2), image.size[0] / 1)\n"
        "def nothing():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("own_models", None)


def test_a_factory_makes_a_model_in_evaluation_mode(own):
    from PIL import Image

    model = load("py:own_models:both")
    assert type(model.network).__name__ == "Net"
    assert not model.network.training
    assert torch.equal(model.preprocess(Image.new("RGB", (7, 5))), torch.full((3, 2, 2), 7.0))
    start, end, _ = pair(model, load("py:own_models:net"), CLASSES)
    assert start is not end
    with pytest.raises(UsageError, match=r"preprocessing of py:own_models:net is not known\n  fix: folder\(path, FUN"):
        load("py:own_models:net").preprocess(Image.new("RGB", (7, 5)))


@pytest.mark.parametrize(
    ("ref", "problem"),
    [
        ("py:own_models", "names no function"),
        ("py:own_models:missing", "cannot be imported: module 'own_models' has no attribute 'missing'"),
        ("py:no_such_package.mod:net", "cannot be imported: No module named 'no_such_package'"),
        ("py:own_models:nothing", "returned a int"),
    ],
)
def test_a_factory_that_makes_no_module_is_named(own, ref, problem):
    with pytest.raises(UsageError, match=rf"{problem}.*\n  fix: py:PACKAGE.MODULE:FUNCTION"):
        load(ref)


# --- what is around the models


def test_the_hub_is_tried_once(monkeypatch):
    import huggingface_hub

    tried = []

    def refuse(*_, **settings):
        tried.append(settings["timeout"])
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    checkpoint._hub_is_reachable.cache_clear()
    with pytest.raises(ModelError, match=r"'nobody/nothing' is no directory here and could not be fetched"):
        load("nobody/nothing")
    assert tried == [checkpoint._PATIENCE]
    checkpoint._hub_is_reachable.cache_clear()


def say_version(folder, name, version):
    """Put there what pip leaves beside a package."""
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def wrong_torchvision(tmp_path, monkeypatch):
    """A torchvision as pip installs it, whose import fails as one for another torch does."""
    (tmp_path / "torchvision").mkdir()
    failure = "raise RuntimeError('operator torchvision::nms does not exist')\n"
    (tmp_path / "torchvision" / "__init__.py").write_text(failure)
    (tmp_path / "open_clip.py").write_text("import torchvision\n")
    say_version(tmp_path, "torchvision", "0.99")
    say_version(tmp_path, "open_clip_torch", "3.99")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("torchvision", "open_clip"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_torchvision_for_another_torch_has_its_own_message(wrong_torchvision):
    with pytest.raises(UsageError) as caught:
        load("oc:ViT-B-32/openai")
    said = str(caught.value)
    assert said.startswith("open_clip cannot be imported: torchvision 0.99 was built for another torch than ")
    assert "(operator torchvision::nms does not exist)\n  fix: pip uninstall torchvision" in said


def test_doctor_finds_it(wrong_torchvision):
    from sharpscope.doctor import examine

    found = {check.name: check for check in examine()}
    assert found["torchvision"].passed is False
    assert "torchvision 0.99 was built for another torch than" in found["torchvision"].found
    assert "pip uninstall torchvision" in found["torchvision"].found
    assert found["open_clip"].passed is False


@pytest.mark.parametrize(
    ("version", "taken"), [("2.32.0", False), ("3.10.2", True), ("3.4.0.dev0", True), ("dev", True)]
)
def test_a_library_that_is_too_old_is_said(tmp_path, monkeypatch, version, taken):
    (tmp_path / "open_clip.py").write_text("")
    say_version(tmp_path, "open_clip_torch", version)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    if taken:
        assert installed.imported("open_clip").__file__ == str(tmp_path / "open_clip.py")
        return
    with pytest.raises(UsageError) as caught:
        load("oc:ViT-B-32/openai")
    said = "open_clip_torch 2.32.0 is too old, >=3.0 is needed"
    assert str(caught.value) == f'{said}\n  fix: pip install --upgrade "open_clip_torch>=3.0"'


def test_a_tokenizer_that_does_not_go_with_transformers_is_said():
    from sharpscope.models.openclip import OpenClip

    class Old:
        def __call__(self, texts):
            return self.batch_encode_plus(texts)

    model = OpenClip(torch.nn.Identity(), "ViT-X")
    model.tokenizer = Old()
    with pytest.raises(ModelError, match=r"tokenizer of ViT-X cannot be run: .*batch_encode_plus'?\n  fix: pip"):
        model.tokens(["a"])


def test_a_library_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match=r'needs the package timm, which is not installed\n  fix: pip install "sharps'):
        load("timm:resnet18")


def test_nothing_is_missing_from_a_sound_installation():
    assert installed.torchvision_mismatch() is None
