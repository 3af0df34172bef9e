"""Claims about two scans side by side: what changed is found, what did not is not, and nothing is made up."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from planted import planted

import sharpscope
from sharpscope.comparison import diff, unpaired
from sharpscope.errors import MismatchError, UsageError
from sharpscope.result import ScanResult
from sharpscope.table import Cell, Row

SMALL = {"alphas": (0.0, 0.5, 1.0), "measures": ("trace", "lambda_max"), "n": 200, "unmeasured": ()}


@pytest.fixture(scope="module")
def one():
    return planted(**SMALL)


def edited(result, change, **meta):
    """The scan with each row passed through a function."""
    cells = [replace(cell, rows=tuple(map(change, cell.rows))) for cell in result.cells]
    return ScanResult(cells, {**result.meta, **meta})


def test_a_scan_and_itself_do_not_differ(one):
    found = diff(one, one)
    assert (found.same_plan, found.same_images) == (True, True)
    assert found.settings.empty
    assert found.verdicts.empty
    assert not found.layers["changed"].any()
    assert not found.accuracy["changed"].any()
    assert (found.layers["change"] == 0).all()
    assert found.recommended[0] == found.recommended[1] is not None
    assert len(found.layers) == len(one.layers)


def test_settings_that_differ_are_named_with_both_values(one):
    plan = {"seed": 0, "measures": {"trace": {"relative": 0.1}}}
    mine = ScanResult(one.cells, {**one.meta, "plan": plan})
    other = {"seed": 1, "measures": {"trace": {"relative": 0.2}}, "loss": "x"}
    theirs = ScanResult(one.cells, {**one.meta, "plan": other, "provenance": {**one.meta["provenance"], "torch": "9"}})
    found = diff(mine, theirs)
    assert not found.same_plan
    assert found.settings.values.tolist() == [
        ["seed", 0, 1],
        ["measures.trace.relative", 0.1, 0.2],
        ["loss", None, "x"],
        ["provenance.torch", "2.13", "9"],
    ]
    assert not found.same_images  # 128 of 200 images were drawn with the seed


def test_a_planted_change_of_one_layer_is_found_there_and_nowhere_else(one):
    def change(row):
        hit = (row.layer, row.measure, row.alpha) == ("visual.proj", "trace", 0.5)
        return replace(row, value=3 * row.value) if hit else row

    found = diff(one, edited(one, change)).layers
    assert found[found["changed"]][["layer", "measure", "alpha"]].values.tolist() == [["visual.proj", "trace", 0.5]]
    row = found[found["changed"]].iloc[0]
    assert row["change"] == pytest.approx(2 * row["first"])
    assert row["low"] < row["change"] < row["high"]


def test_errors_of_means_add_in_squares_and_bounds_of_eigenvalues_add(one):
    def rows(stderr):
        return lambda row: replace(row, stderr=stderr, draws=10**6) if row.split == "id" else row

    found = diff(edited(one, rows(3.0)), edited(one, rows(4.0))).layers.set_index("measure")
    half = (found["high"] - found["low"]) / 2
    assert half["trace"].to_numpy() == pytest.approx(1.959964 * 5, rel=1e-4)
    assert half["lambda_max"].to_numpy() == pytest.approx(7)


def test_rounding_is_no_change_and_an_unknown_error_decides_nothing(one):
    exact = edited(one, lambda row: replace(row, stderr=0.0))
    rounded = edited(exact, lambda row: replace(row, value=row.value * (1 + 2e-6)))
    moved = edited(exact, lambda row: replace(row, value=row.value * (1 + 1e-3)))
    unknown = edited(moved, lambda row: replace(row, stderr=np.inf))
    assert not diff(exact, rounded).layers["changed"].any()
    assert diff(exact, moved).layers["changed"].all()
    assert not diff(exact, unknown).layers["changed"].any()


def test_scans_of_the_same_thing_differ_as_often_as_the_intervals_say():
    random = np.random.default_rng(0)

    def noisy():
        samples = random.standard_normal((400, 12)) * 2 + 5
        rows = [
            Row(0.0, f"l{i}", "id", "m_sharpness", x.mean(), x.std(ddof=1) / np.sqrt(12), 12, True)
            for i, x in enumerate(samples)
        ]
        meta = {**planted(**SMALL).meta, "measures": {"m_sharpness": {}}}
        return ScanResult([Cell("0.0|id|m_sharpness", tuple(rows))], meta)

    changed = np.mean([diff(noisy(), noisy()).layers["changed"].mean() for _ in range(3)])
    assert 0.025 < changed < 0.07  # 1,200 comparisons; standard error 0.006


def test_accuracy_is_paired_on_the_same_images_and_not_on_others(one):
    cells = []
    for cell in one.cells:
        if cell.key == "0.5|id|evaluation":
            flipped = cell.arrays["correct"].copy()
            flipped[np.flatnonzero(flipped)[:12]] = False
            cell = replace(cell, arrays={**cell.arrays, "correct": flipped})
        cells.append(cell)
    found = diff(one, ScanResult(cells, one.meta)).accuracy
    row = found[found["changed"]]
    assert row[["split", "alpha", "change", "paired"]].values.tolist() == [["id", 0.5, pytest.approx(-6.0), True]]
    splits = {name: {**facts, "fingerprint": "other"} for name, facts in one.meta["splits"].items()}
    apart = diff(one, ScanResult(cells, {**one.meta, "splits": splits})).accuracy
    assert not apart["paired"].any()
    assert not apart["changed"].any()  # 6 points of 200 other images are within sampling
    a, b = (float(row.iloc[0][name]) / 100 for name in ("first", "second"))
    wide = apart.set_index(["split", "alpha"]).loc[("id", 0.5)]
    normal = 100 * 1.959964 * np.sqrt(a * (1 - a) / 200 + b * (1 - b) / 200)
    assert (wide["high"] - wide["low"]) / 2 == pytest.approx(normal, rel=0.02)


def test_the_difference_on_other_images_has_newcombes_interval():
    """56 of 70 against 48 of 80: method 10 of Newcombe 1998, Statistics in Medicine 17, 873, table II (a)."""
    first, second = np.arange(80) < 48, np.arange(70) < 56
    found = unpaired(first, second)
    assert (found.value, *found.interval) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_verdicts_that_changed_are_listed_with_both():
    one = planted(**{**SMALL, "alphas": (0.0, 0.2, 0.4, 0.7, 1.0)})
    flat = edited(one, lambda row: replace(row, value=1.0, stderr=0.0) if row.measure == "trace" else row)
    found = diff(one, flat).verdicts
    assert set(found["measure"]) == {"trace"}
    assert (found["first"] != found["second"]).all()
    fewer = planted(**{**SMALL, "alphas": (0.0, 0.2, 0.4, 0.7, 1.0), "measures": ("trace",)})
    assert diff(one, fewer).verdicts.query("measure == 'lambda_max'")["second"].isna().all()


def test_scans_with_nothing_in_common_do_not_match(one):
    with pytest.raises(MismatchError, match="no place in common"):
        diff(one, planted(**{**SMALL, "alphas": (0.25, 0.75)}))


def test_a_folder_in_place_of_a_result_is_refused_with_what_opens_it(one):
    for called in (lambda: diff("runs/a", one), lambda: diff(one, "runs/a"), lambda: sharpscope.check("runs/a", [])):
        with pytest.raises(UsageError, match=r"'runs/a' is a str, no result of a scan\n  fix: sharpscope.open"):
            called()


def test_the_command_prints_and_writes_json_without_torch_and_ends_with_0(run, one, tmp_path):
    other = edited(one, lambda row: replace(row, value=row.value * 5) if row.layer == "visual.proj" else row)
    one.save(tmp_path / "a")
    other.save(tmp_path / "b")
    code, out, err = run("diff", tmp_path / "a", tmp_path / "b", "--json", tmp_path / "d.json")
    assert (code, err) == (0, "")
    assert "plan: the same" in out
    assert "trace: 3 of 24 changed beyond the joint error, 1 expected by chance if nothing changed" in out
    assert "lambda_max: 3 of 24 changed beyond the joint error\n" in out
    assert "id: changed at 0 of 3 alphas" in out
    stored = json.loads((tmp_path / "d.json").read_text())
    assert sum(row["changed"] for row in stored["layers"]) == 6
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "d.json"}
    found = diff(one, other)
    assert stored["accuracy"][0]["change"] == found.accuracy["change"][0]


def test_the_command_ends_as_the_error_says(run, one, tmp_path):
    one.save(tmp_path / "a")
    planted(**{**SMALL, "alphas": (0.25, 0.75)}).save(tmp_path / "b")
    assert run("diff", tmp_path / "a", tmp_path / "b")[0] == 4
    assert run("diff", tmp_path / "a", tmp_path / "none")[0] == 2
