"""What a merge is judged by: found from every folder, read before anything is written, and refused if it cannot be."""

from __future__ import annotations

import json
import shutil

import clips
import pytest

import sharpscope.commands.report as report
from sharpscope import config
from sharpscope.config import FILE

SAME = ", 0 images judged otherwise than in the scan"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A scan in ``scan``, made in this folder and so with places that depend on it; class folders called c0, c1, c2."""
    root = tmp_path_factory.mktemp("world")
    clips.pair(root)
    for name, seed in (("id", 0), ("sketch", 1)):
        clips.images(root / name, seed=seed)
        for i, color in enumerate(clips.COLORS):
            (root / name / color).rename(root / name / f"c{i}")
    (root / "words.csv").write_text("".join(f"c{i},{color}\n" for i, color in enumerate(clips.COLORS)))
    (root / "templates.txt").write_text("the {}\n")
    places = {"zero_shot": "base", "fine_tuned": "tuned", "id": "id", "ood": {"sketch": "sketch"}, "out": "scan"}
    chosen = config.Settings(**places, templates="templates.txt", classnames="words.csv", measures=(), alphas=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(report, "write", lambda result, folder, audit: None)  # the page is tested where it is made
        report.measure(chosen, progress=False)
    return root


@pytest.fixture
def ends(world):
    return ("--zero-shot", world / "base", "--fine-tuned", world / "tuned", "--recipe", "0.5")


def test_a_merge_from_another_folder_is_judged_on_the_data_of_the_scan(run, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("merge", world / "scan", "--recipe", "0.5", "--out", "m")
    assert (code, err) == (0, "")
    assert [line.partition(":")[0] for line in out.splitlines()[-2:]] == ["id", "sketch"]
    assert all(line.endswith(SAME) for line in out.splitlines()[-2:])


def test_the_settings_of_a_scan_repeat_it_from_another_folder(run, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "write", lambda result, folder, audit: None)
    code, _, err = run("report", "--config", world / "scan" / FILE, "--out", "again", "--quiet")
    assert (code, err) == (0, "")
    assert (tmp_path / "again" / "evals.csv").read_bytes() == (world / "scan" / "evals.csv").read_bytes()


def test_references_that_are_no_places_stay_as_they_are(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    (world / "ft.pt").touch()
    references = {"zero_shot": "oc:ViT-B-32/openai", "fine_tuned": "oc:ViT-B-32/ft.pt", "id": "wds:d/{0..3}.tar"}
    chosen = config.Settings(**references, ood={"py": "py:my.data:make", "sketch": "sketch"}, sharpness_on="id")
    found = config.settings({}, config.write_config(chosen, tmp_path))
    assert found.zero_shot == "oc:ViT-B-32/openai"
    assert found.fine_tuned == f"oc:ViT-B-32/{world / 'ft.pt'}"
    assert found.id == f"wds:{world / 'd/{0..3}.tar'}"
    assert found.ood == {"py": "py:my.data:make", "sketch": str(world / "sketch")}
    assert found.sharpness_on == str(world / "id")
    hub = chosen.model_copy(update={"zero_shot": "hf:openai/clip", "fine_tuned": "openai/clip", "id": "py:m:f"})
    again = config.settings({}, config.write_config(hub, tmp_path))
    assert (again.zero_shot, again.fine_tuned, again.id) == ("hf:openai/clip", "openai/clip", "py:m:f")


@pytest.mark.parametrize(
    ("key", "place"), [("id", "id"), ("sketch", "sketch"), ("templates", "templates.txt"), ("classnames", "words.csv")]
)
def test_places_of_an_older_scan_that_depend_on_its_folder_are_said_not_to_be_found(run, world, tmp_path, key, place):
    shutil.copytree(world / "scan", tmp_path / "scan")
    file = tmp_path / "scan" / FILE
    file.write_text(file.read_text().replace(f'"{world / place}"', f'"{place}"'))
    assert f'"{place}"\n' in file.read_text()
    code, out, _ = run("merge", tmp_path / "scan", "--recipe", "0.5", "--out", tmp_path / "m")
    assert code == 0
    assert out.splitlines()[-1].startswith(f"not evaluated: {place} is not found from this folder: "), key


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--id", "nowhere"), "there is no directory nowhere"),
        (("--id", "{world}/id", "--ood", "far=nowhere"), "there is no directory nowhere"),
        (("--id", "wds:nowhere"), "there is no archive nowhere"),
        (("--ood", "far={world}/sketch"), "--ood without --id: there is no scan whose ID data could be taken"),
        (("--templates", "{world}/templates.txt"), "--templates without --id"),
        (("--id", "{world}/id", "--templates", "nowhere"), "there is no file of templates at nowhere"),
        (("--id", "{world}/id", "--classnames", "nowhere"), "there is no file of class names at nowhere"),
    ],
)
def test_what_the_result_cannot_be_judged_on_is_refused_before_it_is_written(run, world, ends, tmp_path, flags, said):
    flags = [flag.format(world=world) for flag in flags]
    for more in ((), ("--dry-run",)):
        code, _, err = run("merge", *ends, *flags, "--out", tmp_path / "m", *more)
        assert (code, said in err) == (2, True), err
    assert not [*tmp_path.iterdir()]


def test_data_named_beside_a_scan_must_be_there(run, world, tmp_path):
    for flags in (("--id", "nowhere"), ("--ood", "far=nowhere")):
        code, _, err = run("merge", world / "scan", "--recipe", "0.5", *flags, "--out", tmp_path / "m")
        assert (code, "there is no directory nowhere" in err) == (2, True)
    code, out, _ = run(
        "merge", world / "scan", "--recipe", "0.5", "--ood", f"far={world / 'id'}", "--out", tmp_path / "m"
    )
    assert code == 0
    assert [line.partition(":")[0] for line in out.splitlines()[-2:]] == ["id", "far"]


def test_words_that_the_tokenizer_does_not_know_are_refused_before_anything_is_written(run, world, ends, tmp_path):
    (tmp_path / "templates.txt").write_text("ein Bild für {}\n")
    flags = ("--id", world / "id", "--templates", tmp_path / "templates.txt", "--out", tmp_path / "m")
    for more in (("--dry-run",), ()):
        code, _, err = run("merge", *ends, *flags, *more)
        assert code in (2, 3)
        assert "holds characters that the model's tokenizer does not know" in err
    assert {path.name for path in tmp_path.iterdir()} == {"templates.txt"}


def test_a_merge_without_a_scan_is_judged_with_templates_and_words_as_a_scan_is(run, world, ends, tmp_path):
    words = ("--templates", world / "templates.txt", "--classnames", world / "words.csv")
    data = ("--id", world / "id", "--ood", f"sketch={world / 'sketch'}")
    lines = []
    for flags in ((world / "scan", "--recipe", "0.5"), (*ends, *data, *words), (*ends, *data)):
        code, out, _ = run("merge", *flags, "--out", tmp_path / "m", "--overwrite")
        assert code == 0
        lines.append([line.split(",")[0] for line in out.splitlines()[-2:]])
    assert lines[0] == lines[1] != lines[2]


@pytest.mark.parametrize("flags", [("--keep-id", "-0.5"), ("--per-layer",)])
def test_a_flag_of_the_recommendation_beside_another_recipe_is_a_usage_error(run, world, ends, tmp_path, flags):
    for where in ((world / "scan", "--recipe", "0.5"), ends):
        code, _, err = run("merge", *where, *flags, "--out", tmp_path / "m")
        assert code == 2
        assert f"{flags[0]} is about the recommendation, --recipe 0.5 is another recipe" in err
    assert not (tmp_path / "m").exists()


def test_a_dry_run_reads_no_model_unless_data_are_named_to_judge_it_on(run, world, ends, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr("sharpscope.commands.merge.load_pair", lambda *_, **__: read.append(1) or 1 / 0)
    for flags in ((world / "scan", "--recipe", "0.5"), ends):
        code, out, _ = run("merge", *flags, "--out", tmp_path / "m", "--dry-run")
        assert (code, read) == (0, [])
        assert out.startswith("layer ")
    assert run("merge", *ends, "--id", world / "id", "--out", tmp_path / "m", "--dry-run")[0] != 0
    assert read


def test_a_scan_that_does_not_say_its_models_is_refused_in_a_sentence(run, world, tmp_path):
    shutil.copytree(world / "scan", tmp_path / "scan")
    stored = json.loads((tmp_path / "scan" / "scan.json").read_text())
    for name in ("models", "granularity"):
        left = {key: value for key, value in stored.items() if key != name}
        (tmp_path / "scan" / "scan.json").write_text(json.dumps(left))
        code, _, err = run("merge", tmp_path / "scan", "--recipe", "0.5", "--out", tmp_path / "m", "--dry-run")
        assert (code, f"does not say which {name} it is of" in err) == (2, True)


def test_a_dry_run_refuses_settings_that_a_merge_refuses(run, world, tmp_path):
    shutil.copytree(world / "scan", tmp_path / "scan")
    (tmp_path / "scan" / "config.resolved.toml").write_text("id = ")
    for more in (("--dry-run",), ()):
        code, _, err = run("merge", tmp_path / "scan", "--recipe", "0.5", "--out", tmp_path / "m", *more)
        assert (code, "is no TOML" in err) == (2, True)


def test_a_dry_run_refuses_the_outputs_that_a_merge_refuses(run, world, ends, tmp_path):
    (tmp_path / "file").write_text("mine")
    outs = {
        world / "scan": "exists already",
        world / "tuned": "is, holds or lies in",
        world / "base" / "new": "is, holds or lies in",
        tmp_path / "file": "exists already",
        tmp_path / "file" / "new": "the merge cannot be written to",
        "/proc/new": "the merge cannot be written to",
    }
    for out, said in outs.items():
        refusals = [run("merge", *ends, "--out", out, *more) for more in (("--dry-run",), ())]
        assert refusals[0][0] == refusals[1][0] in (2, 3)
        assert refusals[0][2] == refusals[1][2]
        assert said in refusals[0][2]
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_a_dry_run_says_what_the_result_must_be_read_with(run, world, tmp_path):
    for alpha, notes in (("1.5", ["note: alpha 1.5 lies beyond the two models, outside of [0, 1]"]), ("0.5", [])):
        code, out, _ = run("merge", world / "scan", "--recipe", alpha, "--out", tmp_path / "m", "--dry-run")
        assert code == 0
        assert [line for line in out.splitlines() if line.startswith("note: ")] == notes
