"""A ~ is the home directory wherever a place is named: a shell leaves it inside quotes and after an equals sign."""

from __future__ import annotations

import json
from pathlib import Path

import archives
import clips
import numpy as np
import pytest
import torch
from planted import planted
from typer.testing import CliRunner

import sharpscope as ss
from sharpscope import config
from sharpscope.classnames import read_label_names
from sharpscope.cli import app
from sharpscope.errors import UsageError
from sharpscope.finetune import Schedule, finetune
from sharpscope.models import read_templates
from sharpscope.models.reference import parsed
from sharpscope.optim import AuditLog, audited
from sharpscope.recipe import Recipe
from sharpscope.recipe_file import RecipeFile, read_recipe, write_recipe
from sharpscope.sources import absolute

CLASSES = ("blue", "green", "red")


def mean_color(image):
    return torch.from_numpy(np.asarray(image, dtype=np.float32)).mean(dim=(0, 1))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("home")
    clips.images(root / "id", each=2)
    archives.webdataset(root / "wds", {"test/0": [0, 1, 2], "test/1": [2, 1]}, CLASSES)
    (root / "names.json").write_text(json.dumps({"blue": "sky", "green": "grass", "red": "rust"}))
    (root / "words.txt").write_text("sky\ngrass\nrust\n")
    (root / "sentences.txt").write_text("a {}.\n")
    return root


@pytest.fixture
def home(good, tmp_path, monkeypatch):
    """The home directory; the working directory is another one, and stays empty."""
    monkeypatch.setenv("HOME", str(good))
    monkeypatch.setenv("USERPROFILE", str(good))
    monkeypatch.chdir(tmp_path)
    yield good
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["id", "wds:wds", "wds:wds/test/{0..1}.tar", "wds:wds/test/*.tar"])
def test_data_are_found_at_home(home, place):
    kind, _, rest = place.rpartition(":")
    kind += ":" * bool(kind)
    found, whole = (ss.images(f"{kind}{root}/{rest}", mean_color) for root in ("~", home))
    assert (found.name, found.fingerprint, found.classes) == (whole.name, whole.fingerprint, whole.classes)
    assert absolute(f"{kind}~/{rest}") == f"{kind}{home / rest}"


@pytest.mark.parametrize("of", [str, Path])
def test_a_folder_and_the_words_of_its_classes_are_found_at_home(home, of):
    found = ss.folder(of("~/id"), mean_color, classnames=of("~/names.json"))
    assert (found.name, found.classes) == ("id", ("sky", "grass", "rust"))
    assert read_label_names(of("~/words.txt")) == {"0": "sky", "1": "grass", "2": "rust"}
    assert read_templates(of("~/sentences.txt")) == ("a {}.",)


def test_resolved_settings_name_what_is_at_home_by_its_whole_path(home):
    (home / "c.toml").write_text(
        'zero-shot = "~/id"\nfine-tuned = "b/c"\nid = "~/id"\nclassnames = "~/names.json"\n[ood]\ns = "wds:~/wds"\n'
    )
    chosen = config.settings({"out": "~"}, "~/c.toml")
    found = config.settings({}, config.write_config(chosen, "~"))
    assert (found.zero_shot, found.id, found.classnames) == tuple(
        str(home / name) for name in ("id", "id", "names.json")
    )
    assert found.ood == {"s": f"wds:{home / 'wds'}"}


def test_a_scan_is_kept_and_found_at_home(home):
    data = [(torch.randn(4, 3), torch.arange(4) % 2)]
    ends = [torch.nn.Linear(3, 2).eval() for _ in range(2)]
    kept = ss.scan(*ends, data, alphas=2, measures=[], out="~/scan", progress=False)
    assert ss.open("~/scan") == ss.open(home / "scan") == kept
    kept.save("~/again")
    assert ss.open(home / "again") == kept


def test_commands_read_and_write_at_home(home):
    planted(alphas=(0.0, 0.5, 1.0), n=20, measures=("trace",)).save(home / "planted")
    (home / "rules.toml").write_text('[[rules]]\nid = "a"\nmeasure = "accuracy"\nsplit = "id"\nmin = 10\n')
    check = ("check", "~/planted", "--rules", "~/rules.toml", "--json=~/gate/check.json")
    for command in (("report", "~/planted"), check, ("diff", "~/planted", "~/planted", "--json=~/gate/diff.json")):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, (command, done.output, done.exception)
    for name in ("planted/index.html", "gate/check.json", "gate/diff.json"):
        assert (home / name).is_file()


def test_a_recipe_is_kept_and_found_at_home(home):
    kept = RecipeFile(Recipe.uniform(0.5))
    write_recipe(kept, "~/r.toml")
    assert read_recipe("~/r.toml") == read_recipe(home / "r.toml") == kept


def test_a_training_is_logged_at_home(home):
    model = torch.nn.Linear(3, 2)
    optimizer = ss.AdamSPD(model.named_parameters(), anchor="init")
    for audit in ("~/logs/spd.jsonl", home / "logs" / "spd.jsonl"):  # the second continues the first
        with audited(optimizer, audit, every=1):
            pass
    AuditLog("~/own.jsonl", optimizer)
    assert (home / "logs" / "spd.jsonl").is_file()
    assert (home / "own.jsonl").is_file()


def test_a_training_is_resumed_at_home(home):
    data = ss.Split([(torch.randn(6, 3), torch.arange(6) % 2)], "id")
    steps = []
    for _ in range(2):  # the second finds the first done
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        steps.append(len(list(finetune(model, data, optimizer, Schedule(2, batch_size=3), checkpoint="~/run.pt"))))
    assert steps == [2, 0]
    assert (home / "run.pt").is_file()


@pytest.mark.parametrize("place", ["~no-such-user/model", "~no-such-user"])
def test_what_begins_with_the_name_of_no_user_is_a_place_that_is_not_there(home, place):
    for reads in (parsed, ss.open, read_templates, lambda found: ss.folder(found, mean_color)):
        with pytest.raises(UsageError, match="~no-such-user"):
            reads(place)
