"""A command that refuses leaves every file as it was: what is there is untouched, and nothing new lies about.

Which sentence is said, is tested beside what says it; here, that it is one, for each way in.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import archives
import clips
import pytest
import torch
from planted import planted
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sharpscope.cli import app
from sharpscope.merging import merge

CLASSES = ("blue", "green", "red")
REPORT = ("report", "--zero-shot", "base", "--fine-tuned", "tuned", "--id", "id", "--ood", "ood=ood")
MERGE = ("merge", "--zero-shot", "base", "--fine-tuned", "tuned", "--recipe", "0.5", "--out", "out")
CHECK = ("check", "scan", "--rules", "rules.toml", "--json", "docs/j.json", "--junit", "docs/j.xml", "--md", "m.md")
RULE = '[[tool.sharpscope.check.rules]]\nid = "a"\nmeasure = "{}"\nsplit = "scans"\nmin = 10\n'


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Everything that the commands take, all of it good."""
    root = tmp_path_factory.mktemp("good")
    clips.pair(root)
    clips.images(root / "id", each=2)
    clips.images(root / "ood", each=2)
    archives.webdataset(root / "wds", {"test/0": [0, 1, 2], "test/1": [2, 1]}, CLASSES)
    planted().save(root / "scan")
    merge(root / "base", root / "tuned", 0.5, root / "merge")
    (root / "rules.toml").write_text(RULE.format("accuracy"))
    return root


@pytest.fixture
def world(good, tmp_path, monkeypatch):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(change, folder="tuned"):
    def broken(root):
        found = load_file(root / folder / "model.safetensors")
        found = change(found) or found
        save_file(found, root / folder / "model.safetensors", metadata={"format": "pt"})

    return broken


def setting(name, value, tower="vision_config"):
    def broken(root):
        file = root / "tuned" / "config.json"
        stored = json.loads(file.read_text())
        stored[tower][name] = value
        file.write_text(json.dumps(stored))

    return broken


def content(place, written):
    def broken(root):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_bytes(written)

    return broken


def gone(place):
    def broken(root):
        shutil.rmtree(root / place) if (root / place).is_dir() else (root / place).unlink()

    return broken


class Code:
    def __reduce__(self):
        return (Path("trace").touch, ())


def pickled(root):
    torch.save(Code(), root / "ft.pt")


def lora(root):
    torch.save({"base_model.model.vision_model.lora_A.weight": torch.zeros(2)}, root / "ft.pt")


def shard(root):
    found = load_file(root / "tuned/model.safetensors")
    (root / "tuned/model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file({n: t for n, t in found.items() if n.startswith("text")}, root / "tuned" / names[0])
    places = {n: names[not n.startswith("text")] for n in found}
    (root / "tuned/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def nan(found):
    found["vision_model.post_layernorm.weight"][0] = float("nan")


def eight_bits(found):
    name = "visual_projection.weight"
    return {**found, name: found[name].to(torch.int8)}


def wider(found):
    return {**found, "visual_projection.weight": torch.zeros(9, 16)}


def other_plan(root):
    done = CliRunner().invoke(app, [*REPORT, "--measures", "", "--alphas", "0,1", "--quiet", "--out", "out"])
    assert done.exit_code == 0, done.output


def scanned_other_weights(root):
    other_plan(root)
    weights(lambda found: {n: t + 1 for n, t in found.items()})(root)


def no_numbers(root):
    """Images that are all well, and a model whose loss is not finite."""
    weights(lambda found: {**found, "logit_scale": torch.tensor(300.0)}, "base")(root)


def nothing(root):
    pass


OUT = ("--out", "out")
FILE = ("--fine-tuned", "ft.pt", *OUT)
# What is broken, and the command that meets it.
REFUSALS = {
    # models
    "no such model": (nothing, (*REPORT, "--fine-tuned", "gone", *OUT)),
    "another width": (weights(wider), (*REPORT, *OUT)),
    "another library's names": (
        weights(lambda found: {f"visual.{n}": t for n, t in found.items()}),
        (*REPORT, *OUT),
    ),
    "another activation": (setting("hidden_act", "gelu"), (*REPORT, *OUT)),
    "other heads": (setting("num_attention_heads", 4), (*REPORT, *OUT)),
    "other positions": (setting("image_size", 32), (*REPORT, *OUT)),
    "a missing shard": (shard, (*REPORT, *OUT)),
    "cut weights": (content("tuned/model.safetensors", b"\x09\0\0\0\0\0\0\0{"), (*REPORT, *OUT)),
    "a pickle": (pickled, (*REPORT, *FILE)),
    "LoRA": (lora, (*REPORT, *FILE)),
    "not finite": (weights(nan), (*REPORT, *OUT)),
    "quantised": (weights(eight_bits), (*REPORT, *OUT)),
    "no weights": (gone("tuned/model.safetensors"), (*REPORT, *OUT)),
    "no configuration": (gone("tuned/config.json"), (*REPORT, *OUT)),
    "no tokenizer": (gone("base/tokenizer.json"), (*REPORT, *OUT)),
    "no preprocessor": (gone("base/preprocessor_config.json"), (*REPORT, *OUT)),
    "a loss that is not finite": (no_numbers, (*REPORT, *OUT)),
    "no factory": (nothing, (*REPORT, "--fine-tuned", "py:nowhere:made", *OUT)),
    "layers of no model": (nothing, ("layers", "--model", "gone")),
    # data
    "no such data": (nothing, (*REPORT, "--id", "gone", *OUT)),
    "an unknown class": (lambda root: (root / "ood/red").rename(root / "ood/reed"), (*REPORT, *OUT)),
    "a class twice": (lambda root: clips.images(root / "ood", ("Red",)), (*REPORT, *OUT)),
    "an empty class": (lambda root: [f.unlink() for f in (root / "id/red").iterdir()], (*REPORT, *OUT)),
    "a corrupt image": (content("ood/red/0000.png", b"no picture"), (*REPORT, *OUT)),
    "a zero-byte image": (content("ood/red/0000.png", b""), (*REPORT, *OUT)),
    "a shard gone": (gone("wds/test/1.tar"), (*REPORT, "--id", "wds:wds", *OUT)),
    "a cut shard": (content("wds/test/1.tar", b"\0" * 700), (*REPORT, "--id", "wds:wds", *OUT)),
    "a label too high": (content("wds/classnames.txt", b"blue\n"), (*REPORT, "--id", "wds:wds", *OUT)),
    "no such class names": (nothing, (*REPORT, "--classnames", "gone.json", *OUT)),
    "a template without a place": (content("t.txt", b"a photo"), (*REPORT, "--templates", "t.txt", *OUT)),
    # settings
    "an unknown measure": (nothing, (*REPORT, "--measures", "tracee", *OUT)),
    "alphas that are none": (nothing, (*REPORT, "--alphas", "half", *OUT)),
    "an unknown key": (content("c.toml", b"sede = 1"), (*REPORT, "--config", "c.toml", *OUT)),
    "no image": (nothing, (*REPORT, "--limit", "0", *OUT)),
    "an unknown objective": (nothing, (*REPORT, "--objective", "text", *OUT)),
    "captions of nothing": (nothing, (*REPORT, "--captions", *OUT)),
    "captions of a folder": (nothing, (*REPORT, "--objective", "contrastive", "--captions", *OUT)),
    "half a batch": (nothing, (*REPORT, "--objective", "contrastive", *OUT)),
    "a name twice": (nothing, (*REPORT, "--ood", "id=ood", *OUT)),
    "no audit": (nothing, (*REPORT, "--audit", "gone.jsonl", *OUT)),
    "a file in the place of the folder": (content("out", b"mine"), (*REPORT, *OUT)),
    "a folder below a file": (content("file", b"mine"), (*REPORT, "--out", "file/out")),
    "another plan's folder": (other_plan, (*REPORT, "--measures", "", "--alphas", "0,0.5,1", *OUT)),
    "a folder that holds no scan": (nothing, ("report", "id")),
    "a flag beside a folder": (nothing, ("report", "scan", "--seed", "3")),
    "a demo in the place of a file": (content("out", b"mine"), ("demo", *OUT)),
    # merges
    "a merge of another width": (weights(wider), MERGE),
    "a merge of another activation": (setting("hidden_act", "gelu"), MERGE),
    "a merge of a pickle": (pickled, (*MERGE, "--fine-tuned", "ft.pt")),
    "a merge of LoRA": (lora, (*MERGE, "--fine-tuned", "ft.pt")),
    "a merge of what is not finite": (weights(nan), MERGE),
    "a merge with a missing shard": (shard, MERGE),
    "a merge over a folder": (nothing, (*MERGE, "--out", "id")),
    "a merge over a folder, forced": (nothing, (*MERGE, "--out", "id", "--overwrite")),
    "a merge over a merge": (nothing, (*MERGE, "--out", "merge")),
    "a merge into its source": (nothing, (*MERGE, "--out", "tuned/new")),
    "a merge below a file": (content("file", b"mine"), (*MERGE, "--out", "file/out")),
    "a recipe of no layer": (
        content(
            "r.toml",
            b'alpha_convention = "alpha 0 = zero-shot (start), alpha 1 = fine-tuned (end)"\n'
            b'rules = [["visual.blok.*", 0.5], ["*", 1.0]]',
        ),
        (*MERGE, "--recipe", "r.toml"),
    ),
    "a recipe that is none": (content("r.toml", b"rules = 3"), (*MERGE, "--recipe", "r.toml")),
    "a recommendation of no scan": (nothing, (*MERGE, "--recipe", "recommended")),
    "a merge of a scan of other weights": (scanned_other_weights, ("merge", "out", "--out", "new")),
    # conversions
    "a pickle converted": (pickled, ("convert", "ft.pt", "--out", "new.safetensors")),
    "a conversion over a file": (content("n.safetensors", b"mine"), ("convert", "tuned", "--out", "n.safetensors")),
    "a conversion to no library": (nothing, ("convert", "tuned", "--to", "jax", "--out", "n.safetensors")),
    "a conversion of no CLIP": (
        lambda root: torch.save({"net.0.weight": torch.zeros(2, 2)}, root / "ft.pt"),
        ("convert", "ft.pt", "--to", "open_clip", "--out", "deep/n.safetensors"),
    ),
    "a conversion into a file": (content("file", b"mine"), ("convert", "tuned", "--out", "file/n.safetensors")),
    # gates and comparisons
    "rules that are none": (content("rules.toml", b"min = 3"), CHECK),
    "a rule of no measure": (content("rules.toml", RULE.format("acuracy").encode()), CHECK),
    "no rules": (gone("rules.toml"), CHECK),
    "no scan to check": (nothing, ("check", "id", *CHECK[2:])),
    "a document below a file": (content("m", b"mine"), (*CHECK, "--md", "m/m.md")),
    "a document in the place of a folder": (lambda root: (root / "m.md").mkdir(), CHECK),
    "a comparison with nothing": (nothing, ("diff", "scan", "gone", "--json", "d.json")),
    "a comparison in the place of a folder": (
        lambda root: (root / "d.json").mkdir(),
        ("diff", "scan", "scan", "--json", "d.json"),
    ),
    "a comparison below a file": (content("m", b"mine"), ("diff", "scan", "scan", "--json", "m/d.json")),
}


def everything(root):
    """Path -> content of a file, None of a folder."""
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


@pytest.mark.filterwarnings("default::UserWarning")  # the command line shows them
@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_leaves_every_file_as_it_was(case, world):
    damage, command = REFUSALS[case]
    damage(world)
    before = everything(world)
    done = CliRunner().invoke(app, [*command, "--quiet"] if command[0] == "report" and len(command) > 4 else [*command])
    assert done.exit_code in (2, 3, 4), done.output
    assert "error: " in done.output
    assert "fault of sharpscope" not in done.output
    assert everything(world) == before
