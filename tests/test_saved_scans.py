"""A folder is a scan when everything in it is of one scan, and whole; anything else is refused by name."""

import errno
import json
import os
import re
from pathlib import Path

import pytest
from planted import planted

import sharpscope as ss
from sharpscope.errors import OutputError, UsageError
from sharpscope.journal import Journal, encode, read
from sharpscope.report.page import write
from sharpscope.result import ScanResult

FEW = {"alphas": (0.0, 0.5, 1.0), "measures": ("trace",)}


def interrupted(*_, **__):
    raise KeyboardInterrupt


def third(rename):
    """Return renaming that is interrupted at the third file."""
    turns = []

    def called(self, target):
        turns.append(self)
        return interrupted() if len(turns) == 3 else rename(self, target)

    return called


def test_a_save_that_is_cut_short_over_another_scan_leaves_none(tmp_path, monkeypatch):
    planted(**FEW).save(tmp_path)
    other = planted(**FEW, failure=True)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", third(Path.replace))
        with pytest.raises(KeyboardInterrupt):
            other.save(tmp_path)
    with pytest.raises(UsageError, match="a scan that has not finished"):
        ss.open(tmp_path)
    assert ss.open(other.save(tmp_path)).cells == other.cells


def test_a_save_that_is_cut_short_before_its_first_file_leaves_the_other_scan_whole(tmp_path, monkeypatch):
    first, other = planted(**FEW), planted(**FEW, failure=True)
    first.save(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(ScanResult, "stragglers", property(interrupted))
        with pytest.raises(KeyboardInterrupt):
            other.save(tmp_path)
    assert ss.open(tmp_path).cells == first.cells


@pytest.mark.parametrize("file", range(7))
def test_a_full_disk_is_said_and_leaves_the_other_scan_whole(tmp_path, monkeypatch, file):
    def full(_):
        turns.append(_)
        if len(turns) > file:
            raise OSError(errno.ENOSPC, "No space left on device")

    first, other = planted(**FEW), planted(**FEW, failure=True)
    write(first, first.save(tmp_path / "scan"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for place in (tmp_path / "scan", tmp_path / "new"):
        turns = []
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(
                OutputError, match=rf"{place} cannot be written: No space left on device\n  fix: make room"
            ):
                other.save(place)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda at: (at / "scan.json").write_text('{"alphas": ['), r"scan\.json is damaged"),
        (lambda at: cut(at / "cells.jsonl", 3), r"cells\.jsonl is cut short: .* is missing"),
        (lambda at: other_plan(at / "scan.json"), r"holds scan\.json of one scan and cells\.jsonl of another"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_by_name(tmp_path, harm, said):
    harm(planted(**FEW).save(tmp_path))
    with pytest.raises(UsageError, match=said):
        ss.open(tmp_path)


@pytest.mark.parametrize(
    ("gone", "of"),
    [
        ("1.0|id|moved/all/necessary/base/", "112 interventions"),
        ("0.0|scans|moved/all/sufficient/layer/head", "112 interventions"),
        ("0.0|scans|moved/all/sufficient/control 1/head", "112 interventions"),
        ("recipe|id|recipe/b", "4 recipes"),
        ("0.5|scans|evaluation", "6 evaluations"),
    ],
)
def test_answers_that_are_gone_are_missed_by_name(studied, gone, of):
    file = studied / "cells.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if not line.startswith(f'{{"cell": "{gone}"')))
    with pytest.raises(UsageError, match=r"cells\.jsonl is cut short: .*\n  fix: run the same scan again") as refused:
        ss.open(studied)
    assert f"{gone!r} is missing (1 of the {of})" in str(refused.value)


@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("interventions", {"limit": "gone"}),
        ("interventions", {"draws": "gone"}),
        ("interventions", {"bases": [3]}),
        ("interventions", {"bases": [["necessary", "one"]]}),
        ("recipes", {"trials": [{}]}),
        ("recipes", {"trials": [3]}),
        ("recipes", {"trials": [{"key": "b", "name": "b", "kind": "per-layer"}]}),
        ("recipes", {"trials": [{"key": "b", "kind": "per-layer", "rules": None}]}),
        ("recipes", {"trials": [{"key": "b", "name": "b", "kind": "per-layer", "rules": [["head", 0.5]]}]}),
    ],
)
def test_settings_of_moves_and_recipes_that_are_not_whole_are_damage(studied, table, change):
    meta = json.loads((studied / "scan.json").read_text())
    meta[table] = {name: value for name, value in (meta[table] | change).items() if value != "gone"}
    (studied / "scan.json").write_text(json.dumps(meta))
    with pytest.raises(UsageError, match=rf"scan\.json is damaged: its {table} are not whole \(.*\n  fix: run"):
        ss.open(studied)


def without(arrays, name):
    del arrays[name]


def shortened(arrays, name):
    arrays[name] = arrays[name][:-1]


@pytest.mark.parametrize(
    ("harm", "key", "name", "said"),
    [
        (without, "0.5|scans|evaluation", "correct", "lacks 'correct' of its images"),
        (without, "0.5|id|evaluation", "loss", "lacks 'loss' of its images"),
        (without, "recipe|id|recipe/b", "correct", "lacks 'correct' of its images"),
        (without, "1.0|id|moved/all/necessary/base/", "correct", "lacks 'correct' of its images"),
        (shortened, "0.5|id|evaluation", "confidence", "has 'confidence' of 19 images, others of 'id' of 20"),
        (shortened, "recipe|scans|recipe/b", "correct", "has 'correct' of 19 images, others of 'scans' of 20"),
    ],
)
def test_cells_without_the_answers_to_all_images_are_damaged(studied, harm, key, name, said):
    header, cells, _ = read(studied / "cells.jsonl")
    harm(next(cell for cell in cells if cell.key == key).arrays, name)
    (studied / "cells.jsonl").write_text("\n".join([json.dumps(header), *map(encode, cells)]) + "\n")
    with pytest.raises(
        UsageError, match=rf"cells\.jsonl is damaged: {re.escape(repr(key))} {said}\n  fix: run the same"
    ):
        ss.open(studied)


@pytest.fixture
def studied(tmp_path):
    """A scan with moves and recipes, of which only two random moves of each layer were made in any case."""
    made = planted(**FEW, ood=("scans",), n=20, studied=True)
    made.meta["interventions"]["draws"] = 2
    assert ss.open(made.save(tmp_path)) == made
    return tmp_path


def cut(file, lines):
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:lines]))


def other_plan(file):
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({**stored, "plan": {**stored["plan"], "seed": 77}}))


NEEDED = ("plan", "alphas", "measures", "splits", "seed", "layers")


def test_a_scan_that_counts_alphas_from_the_other_end_is_refused(tmp_path):
    file = planted(**FEW).save(tmp_path) / "scan.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "alpha_convention": "alpha 0 = fine-tuned"}))
    with pytest.raises(UsageError, match=r"scan\.json counts alphas otherwise: 'alpha 0 = fine-tuned'"):
        ss.open(tmp_path)


@pytest.mark.parametrize("content", ["[]", "null", '"text"', "3", "{}"])
def test_a_scan_json_that_is_no_scan_is_damaged(tmp_path, content):
    (planted(**FEW).save(tmp_path) / "scan.json").write_text(content)
    with pytest.raises(UsageError, match=r"scan\.json is damaged: (its content|plan) is .*\n  fix: run the same scan"):
        ss.open(tmp_path)


@pytest.mark.parametrize("name", NEEDED)
def test_what_a_scan_lacks_is_named(tmp_path, name):
    file = planted(**FEW).save(tmp_path) / "scan.json"
    stored = json.loads(file.read_text())
    del stored[name]
    file.write_text(json.dumps(stored))
    with pytest.raises(UsageError, match=rf"scan\.json is damaged: {name} is missing"):
        ss.open(tmp_path)


ODD = {
    **dict.fromkeys((*NEEDED, "models", "warnings", "unused", "provenance", "cost"), (None, "x")),
    "alphas": (None, {}, [], [0.0, None], [0.0, "1"], [True]),
    "splits": (None, [], {}, {"id": None}, {"id": {}}, {"a": {"role": "ood"}}),
    "layers": (
        None,
        {"head": 3},
        {"head": {}},
        {"head": {"delta_norm": "x"}},
        {"head": {"delta_norm": 1, "start_norm": "x"}},
    ),
    "measures": (None, ["trace"], {"trace": None}),
    "models": (None, {"zero_shot": None}),
    "recipes": (3, {}, {"trials": None}),
    "interventions": ("x", {"limit": 8}),
    "seed": (None, True, 0.5, "0", -1),
    "curvature_split": (3, "gone"),
    "partition": ([], {"head": 3}, {"head": [{}]}),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in ODD.items() for value in values])
def test_what_is_of_another_kind_is_named(tmp_path, name, value):
    file = planted(**FEW).save(tmp_path) / "scan.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    with pytest.raises(UsageError, match=r"scan\.json is damaged: .*\n  fix: run the same scan") as refused:
        ss.open(tmp_path)
    assert name in str(refused.value)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("[]", "is not a readable list of cells"),
        ("null", "is not a readable list of cells"),
        ('{"format": 1}', "does not say which plan its cells are of"),
        ('{"format": 1, "plan": []}', "does not say which plan its cells are of"),
        ('{"format": 1, "plan": {}}\n{"cell": "a", "rows": [], "arrays": []}', "is not a readable list of cells"),
        (
            '{"format": 1, "plan": {}}\n{"cell": "a", "rows": [], "arrays": {}}',
            "'a' is no cell",
        ),
    ],
)
def test_cells_that_are_no_cells_are_refused(tmp_path, header, said):
    file = planted(**FEW).save(tmp_path) / "cells.jsonl"
    file.write_text("\n".join([*header.splitlines(), *file.read_text().splitlines()[1:]]) + "\n")
    with pytest.raises(UsageError, match=said):
        ss.open(tmp_path)
    if "plan" in said or "readable" in said:
        with pytest.raises(UsageError, match=said):  # nor does a scan resume there
            Journal(file, {})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda cells: cells.append(cells[1]), r"'.*\|.*' is there twice"),
        (lambda cells: cells[0].update(cell=["a"]), r"\['a'\] is no cell"),
        (lambda cells: with_row(cells)["rows"][0].update(alpha=0.3), r"holds Row\(alpha=0.3"),
        (lambda cells: with_row(cells)["rows"][0].update(split="sketch"), r"holds Row\(.*split='sketch'"),
        (lambda cells: with_row(cells)["rows"][0].update(layer=["head"]), r"holds Row\(.*layer=\['head'\]"),
        (lambda cells: with_row(cells)["rows"][0].update(draws="3"), r"holds Row\(.*draws='3'"),
    ],
)
def test_cells_that_are_changed_are_damaged(tmp_path, change, said):
    file = planted(**FEW).save(tmp_path) / "cells.jsonl"
    header, *cells = map(json.loads, file.read_text().splitlines())
    change(cells)
    file.write_text("".join(json.dumps(line) + "\n" for line in (header, *cells)))
    with pytest.raises(UsageError, match=rf"cells\.jsonl is damaged: .*{said}.*\n  fix: run the same scan"):
        ss.open(tmp_path)


def with_row(cells):
    return next(cell for cell in cells if cell["rows"])


def test_cells_that_are_gone_are_missed(tmp_path):
    (planted(**FEW).save(tmp_path) / "cells.jsonl").unlink()
    with pytest.raises(UsageError, match=r"cells\.jsonl is missing\)\n  fix: run the same scan"):
        ss.open(tmp_path)


def test_a_file_of_a_scan_is_not_told_that_it_is_missing_itself(tmp_path):
    planted(**FEW).save(tmp_path)
    with pytest.raises(UsageError, match=rf"scan\.json is a file; .*\n  fix: name the folder: {tmp_path}$"):
        ss.open(tmp_path / "scan.json")


def test_cells_of_a_layer_that_is_not_there_are_refused(tmp_path):
    file = planted(**FEW).save(tmp_path) / "scan.json"
    meta = json.loads(file.read_text())
    gone = next(iter(meta["layers"]))
    file.write_text(json.dumps({**meta, "layers": {n: facts for n, facts in meta["layers"].items() if n != gone}}))
    with pytest.raises(UsageError, match=f"cells of '{gone}', a layer that its scan.json does not know"):
        ss.open(tmp_path)
