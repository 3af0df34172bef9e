"""Claims about reading CLIPs: the classifier is the CLIP's own arithmetic, and what cannot be read is said."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import clips
import pytest
import saved
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sharpscope as ss
from sharpscope.errors import DataError, MismatchError, ModelError, UsageError
from sharpscope.models import check_compatible, load, pair, read_templates

CLASSES = ("red", "green", "blue car")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return clips.save(tmp_path_factory.mktemp("models") / "base", clips.network())


@pytest.fixture(scope="module")
def model(base):
    return load(base)


@pytest.fixture
def copy(base, tmp_path):
    """A copy of the checkpoint to damage."""
    import shutil

    return Path(shutil.copytree(base, tmp_path / "copy"))


@pytest.fixture
def offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def pixels(n=5, seed=3):
    return torch.randn(n, 3, clips.SIDE, clips.SIDE, generator=torch.Generator().manual_seed(seed))


def test_with_one_template_the_logits_are_those_of_transformers(model):
    texts = [f"a photo of a {name}." for name in CLASSES]
    inputs = clips.tokenizer()(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model.network(pixel_values=pixels(), **inputs).logits_per_image
        found = model.classifier(CLASSES)(pixels())
    assert expected.std() > 0.1  # they tell images and classes apart
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_several_templates_are_normalised_averaged_and_normalised_again(base):
    templates = ("a {}.", "the {} thing", "{}")
    head = load(base, templates=templates).classifier(CLASSES).head.weight
    network, tokenizer = clips.network(), clips.tokenizer()
    for row, name in zip(head, CLASSES, strict=True):
        vectors = []
        for template in templates:
            ids = tokenizer(template.format(name), return_tensors="pt")
            with torch.no_grad():
                hidden = network.text_model(**ids).last_hidden_state[0, -1]  # the end token
                vectors.append(torch.nn.functional.normalize(network.text_projection(hidden), dim=0))
        expected = torch.nn.functional.normalize(torch.stack(vectors).mean(0), dim=0)
        torch.testing.assert_close(row.detach(), expected, rtol=0, atol=1e-6)


def test_parameters_keep_the_names_of_the_clip_and_the_scale_is_none(model):
    classifier = model.classifier(CLASSES)
    own = {n for n, _ in model.network.named_parameters() if n.startswith(("vision_model.", "visual_projection."))}
    assert {n for n, _ in classifier.named_parameters()} == own | {"head.weight"}
    assert "logit_scale" in dict(classifier.named_buffers())
    assert not any(module.training for module in classifier.modules())


def test_preprocessing_is_resize_crop_scale_normalise(model):
    shades = Image.new("RGB", (2 * clips.SIDE, clips.SIDE), (255, 0, 51))
    found = model.preprocess(shades)
    assert found.shape == (3, clips.SIDE, clips.SIDE)
    assert found.dtype == torch.float32
    expected = torch.tensor([(1 - 0.5) / 0.25, (0 - 0.5) / 0.25, (0.2 - 0.5) / 0.25])
    torch.testing.assert_close(found, expected[:, None, None].expand_as(found))


def test_grey_and_transparent_images_are_taken_too(model):
    for mode in ("L", "RGBA", "P"):
        assert model.preprocess(Image.new(mode, (30, 40))).shape == (3, clips.SIDE, clips.SIDE)


def test_preprocessing_needs_no_torchvision(base):
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "import sharpscope as ss; from PIL import Image\n"
        f"print(ss.load({str(base)!r}).preprocess(Image.new('RGB', (9, 9))).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"torch.Size([3, {clips.SIDE}, {clips.SIDE}])" in done.stdout, done.stderr
    assert "torchvision" not in done.stderr


def test_half_precision_checkpoints_are_measured_in_float32(copy):
    clips.save(copy, clips.network().half())
    network = load(copy).network
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    expected = clips.network().half().float().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())


def test_the_hf_prefix_and_bin_files_mean_the_same_model(model, copy):
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(weights, copy / "pytorch_model.bin")
    again = load(f"hf:{copy}")
    torch.testing.assert_close(again.classifier(CLASSES)(pixels()), model.classifier(CLASSES)(pixels()))


def test_layers_of_a_clip_show_both_towers_without_data(model):
    names = list(ss.layers(model).layers)
    assert names[0] == "visual.embed"
    assert {"visual.block.01", "visual.proj", "text.block.00", "logit_scale"} <= set(names)


# --- what cannot be read


def test_a_truncated_safetensors_is_named(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"model.safetensors cannot be read: .*deserializ"):
        load(copy)


def test_missing_weights_are_refused_not_made_up(copy):
    weights = load_file(copy / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("text_model")}
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 20 weights of a CLIPModel \(text_model"):
        load(copy)


def test_additional_weights_are_refused_not_dropped(copy):
    weights = load_file(copy / "model.safetensors")
    weights["classification_head.weight"] = torch.zeros(3, 8)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights that a CLIPModel does not have \(classification_head.weight"):
        load(copy)


class Tripwire:
    """An object whose unpickling leaves a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("place", ["pytorch_model.bin", "model.pt"])
def test_a_pickled_module_is_refused_and_not_run(copy, tmp_path, place):
    (copy / "model.safetensors").unlink()
    torch.save(Tripwire(tmp_path / "trace"), copy / place)
    with pytest.raises(ModelError, match=f"{place} is a pickled module, not tensors"):
        load(copy if place == "pytorch_model.bin" else copy / place)
    assert not (tmp_path / "trace").exists()


def test_weights_alone_are_no_model_but_one_beside_a_model(base, model, tmp_path):
    alone = load(base / "model.safetensors")
    for use in (lambda: alone.network, lambda: alone.preprocess(None)):
        with pytest.raises(ModelError, match=r"holds weights only.*\n  fix: give the architecture: .*like=MODEL"):
            use()
    start, end, notes = pair(model, alone, CLASSES)
    assert notes == []
    assert torch.equal(start(pixels()), end(pixels()))


def test_a_folder_without_configuration_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"has no config.json\n  fix: model.save_pretrained"):
        load(tmp_path)


def test_a_folder_with_a_damaged_configuration_is_named(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"cannot be read: .*config"):
        load(copy)


def test_another_architecture_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    with pytest.raises(ModelError, match=r"is a 'bert' model \(BertModel\)"):
        load(tmp_path)


def test_a_missing_tokenizer_is_said_when_it_is_needed(tmp_path):
    bare = load(clips.save(tmp_path, clips.network(), words=False))
    with pytest.raises(ModelError, match=r"has no tokenizer \(tokenizer.json"):
        bare.classifier(CLASSES)


def test_code_that_comes_with_a_tokenizer_is_not_run(copy, tmp_path):
    (copy / "mine.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\nclass Mine: pass\n")
    stored = json.loads((copy / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    (copy / "tokenizer_config.json").write_text(json.dumps(stored | own))
    with contextlib.suppress(ModelError):  # whether it is read without the code is up to transformers
        load(copy).tokenizer  # noqa: B018
    assert not (tmp_path / "trace").exists()


def test_weights_of_another_shape_are_refused(copy):
    weights = load_file(copy / "model.safetensors")
    weights["visual_projection.weight"] = torch.zeros(9, 16)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"copy (cannot be read|lacks 1 weights)"):
        load(copy)


def test_a_missing_preprocessor_is_said_when_it_is_needed(copy):
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"preprocessing of .* cannot be read \(preprocessor_config.json\)"):
        load(copy).preprocess(Image.new("RGB", (9, 9)))


def test_a_hub_id_without_network_ends_in_a_sentence(offline):
    with pytest.raises(ModelError, match=r"'nobody/nothing' is no directory here and could not be fetched.*\n  fix"):
        load("nobody/nothing")


@pytest.mark.parametrize("ref", ["./runs/ft", "runs/ft", "/nowhere/ft", "a/b/c", "ft", "a.pt", "s3://a/b"])
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(ref, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"there is no model at .*\n  fix: a directory, a hub id"):
        load(ref)


def test_without_transformers_the_way_out_is_said(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r'pip install "sharpscope\[clip\]"'):
        load(base)


# --- texts and images that cannot be meant


def test_unknown_characters_are_refused_as_the_tower_would_stop_reading_there(model):
    with pytest.raises(UsageError, match=r"'a photo of a café\.' holds characters"):
        model.classifier(["red", "café"])


def test_a_text_longer_than_the_tower_reads_is_refused(model):
    with pytest.raises(UsageError, match=r"has \d+ tokens, the text tower reads 40"):
        model.classifier(["red " * 20])


@pytest.mark.parametrize("templates", [["a photo"], ["{} and {}"], []])
def test_a_template_without_exactly_one_place_is_refused(base, templates):
    with pytest.raises(UsageError, match=r"places for the class name|there is no template"):
        load(base, templates=templates)


def test_templates_are_read_from_lines_and_from_json(tmp_path):
    (tmp_path / "t.txt").write_text("a {}.\n\nthe {}\n")
    (tmp_path / "t.json").write_text('["a {}.", "the {}"]')
    assert read_templates(tmp_path / "t.txt") == read_templates(tmp_path / "t.json") == ("a {}.", "the {}")
    with pytest.raises(UsageError, match="no file of templates at"):
        read_templates(tmp_path / "none.txt")


def test_templates_of_another_encoding_are_refused_and_an_editors_mark_is_no_part_of_them(tmp_path):
    file = tmp_path / "t.txt"
    file.write_bytes("a {}.\nthe {}\n".encode("utf-8-sig"))
    assert read_templates(file) == ("a {}.", "the {}")
    file.write_bytes("das schöne {}\n".encode("latin-1"))
    with pytest.raises(UsageError, match=r"t.txt is no text in UTF-8: .*\n  fix: iconv"):
        read_templates(file)


def test_images_of_another_size_are_refused(model):
    with pytest.raises(DataError, match=r"the images are \(3, 8, 8\), the model takes \(3, 16, 16\)"):
        model.classifier(CLASSES)(torch.zeros(1, 3, 8, 8))


# --- two models


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "gelu"}, "vision_config.hidden_act is 'quick_gelu' in .* but 'gelu' in"),
        ({"num_attention_heads": 4}, "vision_config.num_attention_heads is 2 in .* but 4 in"),
        ({"image_size": 32}, "vision_config.image_size is 16 in .* but 32 in"),
    ],
)
def test_settings_that_change_no_shape_but_the_function_are_compared(model, tmp_path, change, named):
    other = load(clips.save(tmp_path, clips.network(**change)))
    with pytest.raises(MismatchError, match=named):
        check_compatible(model, other)


def test_heads_of_an_image_classifier_are_compared(tmp_path):
    """Its attention says num_attention_heads, CLIP's num_heads."""
    both = saved.vit(tmp_path)
    config = Path(both.fine_tuned) / "config.json"
    config.write_text(config.read_text().replace('"num_attention_heads": 2', '"num_attention_heads": 4'))
    with pytest.raises(MismatchError, match=r"attention heads of the image tower is 2 in .* but 4 in"):
        check_compatible(load(both.zero_shot), load(both.fine_tuned))


def test_preprocessing_is_compared(model, tmp_path):
    other = load(clips.save(tmp_path, clips.network(), mean=(0.4, 0.5, 0.5)))
    with pytest.raises(MismatchError, match=r"image_mean is \[0.5, 0.5, 0.5\] in .* but \[0.4, 0.5, 0.5\] in"):
        check_compatible(model, other)


def test_templates_are_compared(model, base):
    with pytest.raises(MismatchError, match="templates is"):
        check_compatible(model, load(base, templates=["the {}"]))


def test_equal_models_are_compatible_and_share_the_scale(model, base):
    start, end, notes = pair(model, load(base), CLASSES)
    assert notes == []
    assert torch.equal(start.logit_scale, end.logit_scale)


def test_a_learned_logit_scale_is_replaced_by_the_zero_shot_one_and_said(model, tmp_path):
    tuned = clips.network()
    with torch.no_grad():
        tuned.logit_scale += 1
    start, end, notes = pair(model, load(clips.save(tmp_path, tuned)), CLASSES)
    assert torch.equal(start.logit_scale, end.logit_scale)
    assert torch.equal(start.logit_scale, model.network.logit_scale)
    assert len(notes) == 1
    # e^2.6592, and that times e
    assert "the logit scale is 14.28 in the zero-shot and 38.83 in the fine-tuned model" in notes[0]


def test_a_fine_tuned_model_without_tokenizer_takes_that_of_the_zero_shot_model(model, tmp_path):
    tuned = load(clips.save(tmp_path, clips.network(), words=False))
    start, end, _ = pair(model, tuned, CLASSES)
    assert torch.equal(start.head.weight, end.head.weight)
