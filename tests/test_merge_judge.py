"""What a merge is judged by: found from every folder, read before anything is written, and refused if it cannot be."""

from __future__ import annotations

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
