"""A folder is a scan when everything in it is of one scan, and whole; anything else is refused by name."""

import json

import numpy as np
import pytest
from planted import planted

import sharpscope as ss
from sharpscope.errors import UsageError
from sharpscope.result import ScanResult

FEW = {"alphas": (0.0, 0.5, 1.0), "measures": ("trace",)}


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_a_save_that_is_cut_short_over_another_scan_leaves_none(tmp_path, monkeypatch):
    planted(**FEW).save(tmp_path)
    other = planted(**FEW, failure=True)
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", interrupted)
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


def cut(file, lines):
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:lines]))


def other_plan(file):
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({**stored, "plan": {**stored["plan"], "seed": 77}}))
