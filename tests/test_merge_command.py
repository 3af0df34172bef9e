"""From a scan to the checkpoint it recommends: the same models, the layers of the scan, judged again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial

import clips
import numpy as np
import pytest
import torch
from nets import Vit, images
from safetensors.torch import load_file
from saved import CLASSES, KINDS
from saved import family as saved_family
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sharpscope as ss
import sharpscope.commands.report as report
from sharpscope import config
from sharpscope.config import FILE
from sharpscope.errors import MismatchError, ModelError, UsageError
from sharpscope.merging import merge_plan, read_weights, write_plan
from sharpscope.models import load, load_pair
from sharpscope.prediction import check_accuracy, predicted_accuracy, scanned_answers, wilson
from sharpscope.recipe import CONVENTION, Recipe
from sharpscope.recipe_file import read_recipe
from sharpscope.result import ScanResult
from sharpscope.search import RecipeSearch
from sharpscope.stragglers.recipes import recipe_key


def scanned(root, out, **settings):
    chosen = config.Settings(
        zero_shot=str(root / "base"),
        fine_tuned=str(root / "tuned"),
        id=str(root / "id"),
        ood={"sketch": str(root / "sketch")},
        measures=(),
        alphas=3,
        out=str(out),
        **settings,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda result, folder, audit: None)  # the page is tested where it is made
        report.measure(chosen, progress=False)
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two CLIPs, two sets of images, and a scan of them in ``scan``."""
    root = tmp_path_factory.mktemp("world")
    clips.save(root / "base", clips.network())
    clips.save(root / "tuned", clips.moved(clips.network(), by=0.2))
    clips.images(root / "id", each=12)
    clips.images(root / "sketch", ("blue", "red"), each=8, seed=1)
    scanned(root, root / "scan")
    return root


@pytest.fixture
def copy(world, tmp_path):
    """The same in a place of its own."""
    for name in ("base", "tuned", "id", "sketch"):
        shutil.copytree(world / name, tmp_path / name)
    return tmp_path, scanned(tmp_path, tmp_path / "scan")


@pytest.mark.parametrize("alpha", ["0.5", "recommended"])
def test_the_merge_is_written_loaded_and_judged_like_the_scan(run, world, tmp_path, alpha):
    code, out, err = run("merge", world / "scan", "--recipe", alpha, "--out", tmp_path / "m")
    assert (code, err) == (0, "")
    wanted = ss.open(world / "scan").recommend().alpha if alpha == "recommended" else 0.5
    ss.merge(world / "base", world / "tuned", wanted, tmp_path / "expected")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "m" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    lines = out.splitlines()
    assert lines[0].split() == ["layer", "alpha", "tensors", "bytes"]
    assert f"merged: {tmp_path / 'm'}" in lines
    correct = ss.open(world / "scan").correct[wanted, "id"]
    assert f"id: {100 * correct.mean():.1f} % of 36, predicted " in lines[-2]
    assert lines[-1].startswith("sketch: ")
    assert all(line.endswith(", 0 images judged otherwise than in the scan") for line in lines[-2:])
    assert set(read_recipe(tmp_path / "m").predicted) == {"id", "sketch"}


def test_a_recommendation_writes_what_the_command_writes(run, world, tmp_path):
    result = ss.open(world / "scan")
    out = result.recommend(keep_id=-0.5).merge(tmp_path / "m")
    assert run("merge", world / "scan", "--keep-id", -0.5, "--out", tmp_path / "cli")[0] == 0
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "cli" / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        result.recommend(keep_id=-0.5).merge(tmp_path / "m")


def test_a_dry_run_shows_the_alphas_and_writes_nothing(run, world, tmp_path):
    rules = f'alpha_convention = "{CONVENTION}"\nrules = [["visual.block.0[01]", 0.25], ["head", 1], ["*", 0.5]]'
    (tmp_path / "r.toml").write_text(rules)
    code, out, _ = run("merge", world / "scan", "--recipe", tmp_path / "r.toml", "--out", tmp_path / "m", "--dry-run")
    assert code == 0
    found = {line.split()[0]: line.split()[1] for line in out.splitlines()[1:-1]}
    assert found == {
        "visual.embed": "0.5",
        "visual.block.00": "0.25",
        "visual.block.01": "0.25",
        "visual.norm": "0.5",
        "visual.proj": "0.5",
        "text.embed": "1",
        "text.block.00": "1",
        "text.norm": "1",
        "text.proj": "1",
        "logit_scale": "0.5",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"r.toml"}


def test_a_recipe_from_a_file_is_not_predicted_but_judged(run, world, tmp_path):
    rules = f'alpha_convention = "{CONVENTION}"\nrules = [["visual.block.01", 0.0], ["*", 1.0]]'
    (tmp_path / "r.toml").write_text(rules)
    code, out, err = run("merge", world / "scan", "--recipe", tmp_path / "r.toml", "--out", tmp_path / "m")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].endswith("of 16, not predicted")
    found, start, end = (load_file(p / "model.safetensors") for p in (tmp_path / "m", world / "base", world / "tuned"))
    for name, tensor in found.items():
        assert torch.equal(tensor, (start if name.startswith("vision_model.encoder.layers.1.") else end)[name]), name


@pytest.mark.filterwarnings("default")
def test_accuracy_outside_of_what_was_predicted_is_warned_of(run, world, tmp_path):
    rules = f'alpha_convention = "{CONVENTION}"\nrules = [["*", 1.0]]\n[predicted]\nid = [0.0, 0.5]'
    (tmp_path / "r.toml").write_text(rules)
    code, _, err = run("merge", world / "scan", "--recipe", tmp_path / "r.toml", "--out", tmp_path / "m")
    assert code == 0
    assert err.startswith("warning: not as predicted: id: ")
    assert "predicted 0.0 to 0.5" in err


def test_a_file_that_foretells_of_other_images_is_not_held_to_those_of_the_scan(run, world, tmp_path):
    """A point off its interval: chance on so few images. What the scan itself saw is not left to chance."""
    seen = 100 * float(ss.open(world / "scan").correct[0.5, "id"].mean())
    away = (seen + 1, seen + 40) if seen < 50 else (seen - 40, seen - 1)
    rules = f'alpha_convention = "{CONVENTION}"\nrules = [["*", 0.5]]\n[predicted]\nid = {list(away)}'
    (tmp_path / "r.toml").write_text(rules)
    code, out, err = run("merge", world / "scan", "--recipe", tmp_path / "r.toml", "--out", tmp_path / "m")
    assert (code, err) == (0, "")
    assert "which is within chance if that was of other images" in out


def test_a_prediction_is_for_its_own_models_and_images(run, world, copy, tmp_path):
    """A recipe that was merged of other models, and other images in the place of the scan's."""
    run("merge", world / "scan", "--recipe", "0.5", "--out", tmp_path / "m")
    root, _ = copy
    clips.save(root / "tuned", clips.moved(clips.network(), by=-3.0, seed=8))
    code, out, err = run("merge", scanned(root, root / "other"), "--recipe", tmp_path / "m", "--out", root / "n")
    assert (code, err) == (0, "")
    own = predicted_accuracy(scanned_answers(ss.open(root / "other"), Recipe.uniform(0.5)))
    assert read_recipe(root / "n").predicted == {name: pytest.approx(found) for name, found in own.items()}
    code, out, err = run("merge", world / "scan", "--out", tmp_path / "k", "--id", world / "sketch")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].endswith("of 16, not predicted")


def test_a_scan_of_captions_is_judged_on_its_images(run, world, tmp_path):
    """Captions are of the images that sharpness was measured on; those of the evaluation have none."""
    shutil.copytree(world / "scan", tmp_path / "scan")
    file = tmp_path / "scan" / FILE
    known = file.read_text().replace('objective = "image"', 'objective = "contrastive"')
    file.write_text(known.replace("captions = false", "captions = true"))
    assert "captions = true" in file.read_text()
    code, out, err = run("merge", tmp_path / "scan", "--recipe", "0.5", "--out", tmp_path / "m")
    assert (code, err) == (0, "")
    assert "id: " in out


def test_a_home_directory_is_one_in_every_place(run, world, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    code, out, err = run("merge", world / "scan", "--recipe", "0.5", "--out", "~/m")
    assert (code, err) == (0, "")
    assert "id: " in out
    assert (tmp_path / "m" / "model.safetensors").exists()


def test_a_checkpoint_that_is_no_longer_what_was_scanned_is_refused(run, copy):
    root, folder = copy
    clips.save(root / "tuned", clips.moved(clips.network(), by=0.3))
    code, _, err = run("merge", folder, "--recipe", "0.5", "--out", root / "m")
    assert code == 3
    assert "tuned is not the fine-tuned model that was scanned: its hash is " in err
    assert not (root / "m").exists()


def test_a_checkpoint_that_was_moved_is_named_anew(run, copy):
    root, folder = copy
    (root / "base").rename(root / "elsewhere")
    code, _, err = run("merge", folder, "--recipe", "0.5", "--out", root / "m")
    assert code == 2
    assert "there is no model at" in err
    code, out, err = run("merge", folder, "--recipe", "0.5", "--out", root / "m", "--zero-shot", root / "elsewhere")
    assert code == 0, err
    assert "sketch: " in out


def test_data_that_are_gone_are_said_and_others_can_be_named(run, copy):
    root, folder = copy
    (root / "id").rename(root / "moved")
    code, out, _ = run("merge", folder, "--recipe", "0.5", "--out", root / "m")
    assert code == 0
    assert out.splitlines()[-1].startswith(f"not evaluated: {root / 'id'} is no longer there; name the data with --id")
    code, out, _ = run("merge", folder, "--recipe", "0.5", "--out", root / "m", "--overwrite", "--id", root / "moved")
    assert code == 0
    assert out.splitlines()[-1].startswith("id: ")


def test_two_checkpoints_can_be_merged_without_a_scan(run, world, tmp_path):
    ends = ("--zero-shot", world / "base", "--fine-tuned", world / "tuned")
    code, out, _ = run("merge", *ends, "--recipe", "0.5", "--out", tmp_path / "m")
    assert code == 0
    assert out.splitlines()[-1] == "not evaluated: no data; name them with --id DIR and --ood NAME=DIR"
    code, _, err = run("merge", *ends, "--out", tmp_path / "other")
    assert (code, "only a scan recommends" in err) == (2, True)
    code, _, err = run("merge", "--recipe", "0.5", "--out", tmp_path / "other")
    assert (code, "there is nothing to merge" in err) == (2, True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            'rules = [["visual.block.7", 0.0], ["*", 1.0]]',
            "'visual.block.7' matches no layer; the nearest is 'visual.bl",
        ),
        ('granularity = "part"\nrules = [["*.attn", 0.0], ["*", 1.0]]', "granularity 'part', the scan has 'block'"),
    ],
)
def test_a_recipe_of_other_layers_is_a_usage_error(run, world, tmp_path, text, said):
    (tmp_path / "r.toml").write_text(f'alpha_convention = "{CONVENTION}"\n{text}')
    code, _, err = run("merge", world / "scan", "--recipe", tmp_path / "r.toml", "--out", tmp_path / "m")
    assert code == 2
    assert said in err
    assert not (tmp_path / "m").exists()


def test_models_that_do_not_match_end_with_4(run, world, tmp_path):
    clips.save(tmp_path / "other", clips.network(blocks=3))
    ends = ("--zero-shot", world / "base", "--fine-tuned", tmp_path / "other")
    code, _, err = run("merge", *ends, "--recipe", "0.5", "--out", tmp_path / "m")
    assert code == 4
    assert "do not share an architecture" in err


def test_a_folder_without_a_scan_is_a_usage_error(run, tmp_path):
    assert run("merge", tmp_path, "--out", tmp_path / "m")[0] == 2


def test_parts_of_blocks_are_merged_as_they_were_scanned(run, world, tmp_path):
    folder = scanned(world, tmp_path / "scan", granularity="part")
    rules = f'alpha_convention = "{CONVENTION}"\ngranularity = "part"\nrules = [["*.01.mlp", 0.0], ["*", 1.0]]'
    (tmp_path / "r.toml").write_text(rules)
    assert run("merge", folder, "--recipe", tmp_path / "r.toml", "--out", tmp_path / "m")[0] == 0
    found, end = (load_file(p / "model.safetensors") for p in (tmp_path / "m", world / "tuned"))
    moved = {name for name, tensor in found.items() if not torch.equal(tensor, end[name])}
    assert moved == {f"vision_model.encoder.layers.1.mlp.fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}


# --- modules in memory


@pytest.fixture
def modules(tmp_path):
    """A scan of two modules, layers by a pattern, and their state dicts."""
    ends = []
    for name, seed in (("zs", 0), ("ft", 1)):
        torch.manual_seed(seed)
        ends.append(Vit().eval())
        torch.save(ends[-1].state_dict(), tmp_path / f"{name}.pt")
    x, y = images(16, dtype=torch.float32)
    data = DataLoader(TensorDataset(x, y), batch_size=8)
    patterns = {"mixers": r"\.qkv\."}
    return ss.scan(*ends, data, alphas=3, measures=(), patterns=patterns, progress=False), data, tmp_path


def test_modules_in_memory_are_merged_from_their_state_dicts_in_the_scans_layers(modules):
    result, data, root = modules
    from sharpscope.merging import scanned_plan

    recipe = Recipe((("mixers", 0.0), ("blocks.1", 0.5), ("*", 1.0)))
    plan = scanned_plan(result.meta, recipe, zero_shot=root / "zs.pt", fine_tuned=root / "ft.pt")
    write_plan(plan, root / "m.pt")
    found, start, end = (torch.load(root / f"{name}.pt", weights_only=True) for name in ("m", "zs", "ft"))
    for name, tensor in found.items():
        alpha = 0.0 if ".qkv." in name else 0.5 if name.startswith("blocks.1.") else 1.0
        torch.testing.assert_close(tensor, start[name] + alpha * (end[name] - start[name])), name
    advice = result.recommend()
    advice.merge(root / "advised.pt", zero_shot=root / "zs.pt", fine_tuned=root / "ft.pt")
    model = Vit().eval()
    model.load_state_dict(torch.load(root / "advised.pt", weights_only=True))
    with torch.no_grad():
        correct = torch.cat([model(x).argmax(1) == y for x, y in data]).numpy()
    assert np.array_equal(correct, result.correct[advice.alpha, "id"])


class Normed(nn.Sequential):
    """A network with running statistics, and a buffer that is in no state dict."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
        self[2].register_buffer("passing", torch.zeros(8), persistent=False)


@pytest.mark.filterwarnings("ignore:.*batch-norm statistics")
def test_running_statistics_are_merged_with_the_layer_that_a_pattern_put_them_into(tmp_path):
    torch.manual_seed(0)
    ends = Normed().eval(), Normed().eval()
    ends[1][2].running_mean.normal_()
    ends[1][2].running_var.uniform_(0.1, 3)
    for name, net in zip(("zs", "ft"), ends, strict=True):
        torch.save(net.state_dict(), tmp_path / f"{name}.pt")
    x, y = images(90, dtype=torch.float32)
    data = DataLoader(TensorDataset(x, y), batch_size=90)
    settings = {"alphas": 3, "measures": (), "patterns": {"early": r"^[12]\."}, "progress": False}
    result = ss.scan(*ends, data, recipes=RecipeSearch(12), **settings)
    plan_of = partial(merge_plan, read_weights(tmp_path / "zs.pt"), read_weights(tmp_path / "ft.pt"))
    tried = [Recipe(tuple(map(tuple, t["rules"]))) for t in result.meta["recipes"]["trials"] if t["rules"]]
    assert tried
    for number, recipe in enumerate(tried):
        write_plan(plan_of(recipe, scanned=result.meta["partition"]), tmp_path / f"{number}.pt")
        merged = Normed().eval()
        merged.load_state_dict(torch.load(tmp_path / f"{number}.pt", weights_only=True))
        with torch.no_grad():
            correct = (merged(x).argmax(1) == y).numpy()
        assert np.array_equal(correct, scanned_answers(result, recipe)["id"]), recipe
    ends[1][2].passing.fill_(1)
    again = ss.scan(*ends, data, **settings)
    assert again.meta["partition"] == result.meta["partition"]


def test_modules_in_memory_need_their_files_and_the_right_ones(modules):
    result, _, root = modules
    with pytest.raises(
        UsageError, match=r"where the weights of its zero-shot model \(Vit\) are\n  fix: --zero-shot FILE"
    ):
        result.recommend().merge(root / "m.pt")
    with pytest.raises(ModelError, match=r"zs.pt is not the fine-tuned model that was scanned"):
        result.recommend().merge(root / "m.pt", zero_shot=root / "zs.pt", fine_tuned=root / "zs.pt")


def test_a_checkpoint_that_lacks_a_scanned_tensor_is_refused(world):
    ends = read_weights(world / "base"), read_weights(world / "tuned")
    with pytest.raises(MismatchError, match=r"lacks 'extra.weight', which the scan had in layer 'extra'"):
        merge_plan(*ends, Recipe((("extra", 0.0), ("*", 0.5))), scanned={"extra": ["extra.weight"]})


@pytest.mark.filterwarnings("ignore:.*is no known part of a transformer block")
@pytest.mark.parametrize("family", ["DeiT", "Dinov2", "Beit", "Swin", "Segformer"])
def test_layers_of_a_scan_are_found_under_the_names_on_disk(family, tmp_path):
    saved = saved_family(tmp_path, family)
    ends, memory = read_weights(saved.zero_shot), load(saved.zero_shot)
    assert not set(ends.keys) >= set(memory.network.state_dict())  # else this tests nothing
    for granularity in ("tower", "block", "part"):
        layers = ss.layers(memory, granularity).layers
        first = next(iter(layers))
        settings = {"granularity": granularity, "scanned": layers}
        assert set(merge_plan(ends, ends, Recipe.uniform(0.5), **settings).alphas.values()) == {0.5}
        recipe = Recipe(((first, 0.0), ("*", 0.5)))
        if (family, granularity) == ("Segformer", "part"):  # no rules for it: modules that are renamed
            with pytest.raises(MismatchError, match=r"by the names on disk its layers are others\n.*one alpha for all"):
                merge_plan(ends, ends, recipe, **settings)
            continue
        plan = merge_plan(ends, ends, recipe, **settings)
        assert {line.layer: (line.alpha, line.tensors) for line in plan.lines() if line.layer != "integers"} == {
            layer: (0.5 if layer != first else 0.0, len(names)) for layer, names in layers.items()
        }


def test_a_recommendation_without_a_scan_says_so(world):
    advice = replace(ss.open(world / "scan").recommend(), scan=None)
    with pytest.raises(UsageError, match="not of a saved scan"):
        advice.merge("m")


@pytest.mark.parametrize("kind", ["transformers CLIP tower, bare", "transformers SigLIP tower, prefixed"])
def test_a_tower_is_merged_by_the_layers_of_the_scan_and_stays_a_tower(run, tmp_path, kind):
    saved = KINDS[kind](tmp_path)
    data = ss.Split([(torch.randn(6, 3, clips.SIDE, clips.SIDE), torch.arange(6) % 3)], "id", classes=CLASSES)
    ends = load_pair(saved.zero_shot, saved.fine_tuned)
    ss.scan(*ends, data, alphas=3, measures=[], progress=False).save(tmp_path / "scan")
    rules = f'alpha_convention = "{CONVENTION}"\nrules = [["visual.block.01", 0.0], ["*", 1.0]]'
    (tmp_path / "r.toml").write_text(rules)
    code, out, err = run("merge", tmp_path / "scan", "--recipe", tmp_path / "r.toml", "--out", tmp_path / "m")
    assert (code, err) == (0, "")
    assert "loaded again: " in out
    found, tuned = (load_file(f"{folder}/model.safetensors") for folder in (tmp_path / "m", saved.fine_tuned))
    whole = load_file(f"{saved.zero_shot}/model.safetensors")
    assert found.keys() == tuned.keys()
    for name, tensor in found.items():
        start = whole[f"vision_model.{name.removeprefix('vision_model.')}"]
        assert torch.equal(tensor, start if ".layers.1." in name else tuned[name]), name


# --- predictions


@pytest.fixture(scope="module")
def tried(world):
    """The folder of a scan of the same that tried recipes, and the first of these with an alpha per layer."""
    folder = scanned(world, world / "tried", recipes=True)
    trials = ss.open(folder).meta["recipes"]["trials"]
    return folder, next(trial for trial in trials if trial["rules"] and len({alpha for _, alpha in trial["rules"]}) > 1)


def test_a_recipe_per_layer_that_was_tried_is_predicted_and_comes_out_as_in_the_search(run, tried, tmp_path):
    folder, trial = tried
    rules = json.dumps([[pattern, float(alpha)] for pattern, alpha in trial["rules"]])
    (tmp_path / "r.toml").write_text(f'alpha_convention = "{CONVENTION}"\nrules = {rules}')
    code, out, err = run("merge", folder, "--recipe", tmp_path / "r.toml", "--out", tmp_path / "m")
    assert (code, err) == (0, "")
    assert [line.partition(":")[0] for line in out.splitlines()[-2:]] == ["id", "sketch"]
    assert all(line.endswith(", 0 images judged otherwise than in the scan") for line in out.splitlines()[-2:])


def test_a_recipe_per_layer_is_recommended_when_asked_for_and_better(run, tried, tmp_path):
    """Every image is planted to be judged right with the first recipe tried."""
    folder, trial = tried
    known = ss.open(folder)

    def planted(cell):
        right = np.ones_like(cell.arrays["correct"])
        return replace(cell, arrays={**cell.arrays, "correct": right})

    mine = {recipe_key(split, trial["key"]) for split in ("id", "sketch")}
    ScanResult([planted(c) if c.key in mine else c for c in known.cells], known.meta).save(tmp_path / "scan")
    expected = Recipe(tuple((pattern, float(alpha)) for pattern, alpha in trial["rules"]))
    for flags, recipe in (([], Recipe.uniform(known.recommend().alpha)), (["--per-layer"], expected)):
        code, out, _ = run("merge", tmp_path / "scan", *flags, "--out", tmp_path / "m", "--dry-run")
        assert code == 0
        found = {line.split()[0]: float(line.split()[1]) for line in out.splitlines()[1:-1]}
        visual = [layer for layer in found if layer.startswith("visual")]
        assert {layer: found[layer] for layer in visual} == pytest.approx(recipe.alphas(visual), abs=1e-5)


def test_a_scan_without_recipes_has_none_per_layer_to_recommend(run, world, tmp_path):
    code, _, err = run("merge", world / "scan", "--per-layer", "--out", tmp_path / "m")
    assert code == 2
    assert "no recipes were tried in this scan" in err


def test_the_prediction_is_the_wilson_interval_of_the_scanned_point(world):
    result = ss.open(world / "scan")
    k, n = int(result.correct[0.5, "id"].sum()), len(result.correct[0.5, "id"])
    z, p = 1.959963984540054, k / n
    centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    expected = [100 * (centre + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
    found = predicted_accuracy(scanned_answers(result, Recipe.uniform(0.5)))
    assert found["id"] == pytest.approx(expected)
    assert set(found) == {"id", "sketch"}
    assert scanned_answers(result, Recipe.uniform(0.3)) == {}
    assert scanned_answers(result, Recipe((("head", 0.0), ("*", 0.5)))) == {}


def test_a_model_that_judges_the_same_images_otherwise_is_seen_inside_the_interval():
    random = np.random.default_rng(0)
    before = random.random(1000) < 0.7
    after = before.copy()
    after[np.flatnonzero(before)[:15]] = False
    predicted = {"id": (60.0, 80.0)}
    assert check_accuracy("id", after, predicted).as_predicted is True
    found = check_accuracy("id", after, predicted, before, same=True)
    assert (found.as_predicted, found.otherwise) == (False, 15)
    assert check_accuracy("id", before, predicted, before, same=True).as_predicted is True
    assert check_accuracy("id", before, {}).as_predicted is None
    assert check_accuracy("id", before, {"id": (0.0, 60.0)}).as_predicted is False
    assert check_accuracy("id", before, {"id": (0.0, 67.0)}, same=True).as_predicted is False


@pytest.mark.parametrize("right", [0, 1, 45, 99, 100])
def test_an_interval_tells_the_proportion_it_is_of(right):
    correct = np.arange(100) < right
    assert wilson(predicted_accuracy({"id": correct})["id"]).value == pytest.approx(right / 100, abs=1e-8)
    assert wilson((0.0, 100.0)).value == 0.5


def warned(random, share, drop, foretold, judged, runs=1000):
    """Return how often a model is found to be off what other images of the same kind foretold."""
    found = []
    for _ in range(runs):
        predicted = predicted_accuracy({"id": random.random(foretold) < share})
        found.append(check_accuracy("id", random.random(judged) < share - drop, predicted).as_predicted is False)
    return np.mean(found)


@pytest.mark.parametrize(
    ("share", "foretold", "judged"), [(0.7, 360, 360), (0.95, 360, 360), (0.7, 2000, 100), (0.9, 100, 2000)]
)
def test_other_images_of_the_same_kind_are_warned_of_once_in_twenty(share, foretold, judged):
    """Judged as if the measurement had no error of its own, 360 images were warned of in 17 %."""
    assert 0.01 < warned(np.random.default_rng(3), share, 0.0, foretold, judged) < 0.07


def test_a_drop_of_ten_points_is_seen_on_other_images():
    random = np.random.default_rng(4)
    assert warned(random, 0.7, 0.1, 360, 360) > 0.75
    assert warned(random, 0.7, 0.1, 1000, 1000) > 0.97


def test_what_lies_outside_by_chance_says_so():
    correct = np.arange(360) < 216
    found = check_accuracy("id", correct, {"id": (60.1, 69.9)})
    assert found.as_predicted is True
    assert str(found).endswith("predicted 60.1 to 69.9, which is within chance if that was of other images")
    assert check_accuracy("id", correct, {"id": (60.1, 69.9)}, same=True).as_predicted is False


def test_a_scan_records_where_its_models_are(world):
    facts = ss.open(world / "scan").meta["models"]["zero_shot"]
    assert facts["path"] == str((world / "base").resolve())
