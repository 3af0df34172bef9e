"""Claims about rules, detectors and the gate: what is refused, what is judged on what, what is written."""

from __future__ import annotations

import json
import math
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import xmlschema
from gates import evaluated, pair
from planted import HOSTILE, SINGLE, STRAGGLER, UNCONVERGED, planted

import sharpscope
from sharpscope import check
from sharpscope.detectors import (
    BarrierDetector,
    EvaluationDetector,
    Finding,
    GateResult,
    MeasuredDetector,
    OODRegression,
    RecommendedAlphaDetector,
    SharpnessDetector,
    StragglerDetector,
    read_rules,
    rules,
    rules_from,
)
from sharpscope.detectors.documents import as_json, junit, markdown
from sharpscope.detectors.rules import SHARPNESS
from sharpscope.errors import GateError, MeasurementError, UsageError
from sharpscope.measures import MEASURES
from sharpscope.result import ScanResult
from sharpscope.table import Cell, Row

ONE, OTHER = pair(30, 10, 100, 60)  # shares .65 and .55
ENDS = evaluated({(0.0, "id"): OTHER, (1.0, "id"): ONE})
CHANGE = {"id": "r", "measure": "accuracy", "split": "id", "model": "fine-tuned", "versus": "zero-shot"}


@pytest.fixture(scope="module")
def scan():
    return planted()


def finding(result, **rule):
    """Return what one rule of a gate finds."""
    return check(result, {"rules": [{"id": "r", **rule}]}).checks[0].finding


# --- rules that cannot be meant


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"mesure": "x"}, r"rules, rule 1 \('r'\): 'mesure' is no key of this rule\n  fix: did you mean 'measure'\?"),
        ({"measure": "acuracy"}, r"'acuracy' is no measure\n  fix: did you mean 'accuracy'\?"),
        ({"measure": "lamda_max"}, r"'lamda_max' is no measure\n  fix: did you mean 'lambda_max'\?"),
        ({"model": "finetuned"}, r"'finetuned' is no model\n  fix: did you mean 'fine-tuned'\?"),
        ({"versus": "zeroshot"}, r"'zeroshot' is no model\n  fix: did you mean 'zero-shot'\?"),
        ({"min_chnage": 1}, r"'min_chnage' is no key of this rule\n  fix: did you mean 'min_change'\?"),
        ({"split": "idd"}, r"rule 'r': 'idd' is no split of this scan\n  fix: did you mean 'id'\?"),
        ({"model": "candidate", "keep_id": math.nan}, "rule 'r': keep_id is nan: points of ID accuracy to give up"),
        ({"model": "alpha 0.3"}, r"'alpha 0.3' was not scanned; alphas: 0, 1\n  fix: nearest: 'alpha 0'"),
        ({"model": "alpha nan"}, "'alpha nan' is no model"),
        ({"versus": "alpha nan"}, "'alpha nan' is no model"),
        ({"severity": "warning"}, r"'severity': input should be 'error' or 'warn', found 'warning'"),
        ({"min_change": "much"}, r"'min_change' is the text 'much'\n  fix: a number, without quotes"),
        ({"min_change": "-0.5"}, "'min_change' is the text '-0.5'"),
        ({"min_change": [1]}, r"'min_change': input should be a valid number.*found \[1\]"),
        ({"min_change": 10**400}, "'min_change': input should be a valid number"),
        ({"keep_id": "-1"}, "'keep_id' is the text '-1'"),
        ({"keep_id": -1}, "keep_id = -1 changes nothing: it moves the candidate, .*about 'fine-tuned' and 'zero-shot'"),
        ({"model": "zero-shot"}, "'zero-shot' is compared with itself, as 'zero-shot'\n  fix: another one of"),
        ({"model": "alpha 0.0"}, "'alpha 0.0' is compared with itself, as 'zero-shot'"),
        ({"versus": None, "min_change": None, "min": 150}, "accuracy is in percent, and its limit is 150"),
        ({"versus": None, "min_change": None, "max": -5}, "accuracy is in percent, and its limit is -5"),
        ({"min_change": math.nan}, "accuracy has a limit that is nan\n  fix: a finite number"),
        ({"min_change": None}, "accuracy has no limit\n  fix: give min_change or max_change"),
        ({"max_change": -2}, r"min_change is -0.5, above max_change, -2"),
        ({"min": 60}, "min and max are no limits of a change"),
        ({"versus": None}, "min_change and max_change need a model to compare with"),
        ({"split": ...}, "'split' is missing"),
        ({"id": ...}, "rules, rule 1: 'id' is missing"),
        ({"measure": ...}, "a rule names a measure or a detector"),
        ({"detector": "x"}, "a rule names a measure or a detector"),
        ({"versus": None, "min_change": None, "min": 0.6}, "accuracy is in percent: 0.6 means 0.6 %\n  fix: 60"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_named(changed, said):
    rule = {k: v for k, v in ({**CHANGE, "min_change": -0.5} | changed).items() if v is not ...}
    with pytest.raises(UsageError, match=said):
        check(ENDS, {"rules": [rule]})


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"rules": []}, "rules: 'rules': list should have at least 1 item"),
        ({}, "rules: 'rules' is missing"),
        ({"rule": []}, "'rules' is missing|'rule' is no key here; did you mean 'rules'"),
        ({"undecided": "ignore", "rules": [CHANGE]}, "'undecided': input should be 'pass', 'warn' or 'fail'"),
        ({"keep_id": 2, "rules": [CHANGE]}, "'keep_id': input should be less than or equal to 0"),
        ({"rules": [{**CHANGE, "min_change": 0}] * 2}, "two rules have the id 'r'"),
    ],
)
def test_a_table_that_cannot_be_meant_is_named(table, said):
    with pytest.raises(UsageError, match=said):
        rules_from(table)


def test_a_list_of_tables_is_sent_to_the_table_that_holds_it(scan):
    with pytest.raises(UsageError, match=r"rule '1 dict' is no detector\n  fix: .*\{\"rules\": \["):
        check(scan, [CHANGE])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "there is no file of rules .*rules.toml"),
        ("= 3", "rules.toml is no TOML"),
        ("[tool.sharpscope]\ncheck = 3", "rules.toml: tool.sharpscope.check is 3, not a table"),
        (
            "[tool.sharpscop]\nx = 1",
            r"holds no \[tool.sharpscope.check\]: no 'sharpscope' in 'tool'.*\n.*'sharpscop'\?",
        ),
        ("[tool.sharpscope.chekc]", r"no 'check' in 'tool.sharpscope'\n  fix: did you mean 'chekc'\?"),
        ('undecidd = "pass"\nrules = [{}]', r"rules.toml: 'undecidd' is no key here; did you mean 'undecided'\?"),
        (
            '[[rules]]\nid = "a"\nmeasure = "barier"',
            r"rule 1 \('a'\): 'barier' is no measure\n.*'barrier'\?",
        ),
        (
            '[[rules]]\nid = "a"\nmeasure = "accuracy"\nsplit = "s"\nmin = true',
            r"rule 1 \('a'\): 'min' is true\n  fix: a number",
        ),
        (
            '[[rules]]\nid = "a"\nmeasure = "accuracy"\nmin-change = 1\nmin_change = 2',
            r"rule 1 \('a'\): 'min_change' is there twice",
        ),
        ('keep_id = false\n[[rules]]\nid = "a"\nmeasure = "accuracy"', "'keep_id': input should be a valid number"),
    ],
)
def test_a_file_that_cannot_be_meant_is_named(tmp_path, text, said):
    path = tmp_path / "rules.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=said):
        read_rules(path)


def test_a_pyproject_and_a_file_of_its_own_hold_the_same_rules(tmp_path):
    body = 'undecided = "warn"\n[[{0}rules]]\nid = "a"\nmeasure = "barrier"\nmax = 0.05\n'
    (tmp_path / "own.toml").write_text(body.format(""))
    (tmp_path / "pyproject.toml").write_text("[tool.sharpscope.check]\n" + body.format("tool.sharpscope.check."))
    assert read_rules(tmp_path / "own.toml") == read_rules(tmp_path / "pyproject.toml")
    assert read_rules(tmp_path / "own.toml").rules[0].detector == BarrierDetector(max=0.05)


def test_keys_may_be_written_with_hyphens():
    rule = {**CHANGE, "min-change": -0.5}
    assert rules_from({"keep-id": -1, "rules": [rule]}).rules[0].detector.min_change == -0.5


def test_the_rules_that_the_guide_shows_can_be_meant():
    guide = (Path(__file__).parent.parent / "docs" / "gate.md").read_text()
    block = re.search(r"```toml\n(\[tool.sharpscope.check\].*?)```", guide, flags=re.DOTALL)
    found = rules_from(tomllib.loads(block.group(1))["tool"]["sharpscope"]["check"])
    assert [rule.id for rule in found.rules] == ["ood-not-worse", "no-barrier", "stragglers"]


def test_the_names_of_sharpness_are_those_of_the_measures():
    assert set(SHARPNESS) == set(MEASURES)


def test_a_measure_that_was_not_scanned_could_not_be_measured(scan):
    found = check(scan, [SharpnessDetector(measure="directional", max=1)])
    assert found.exit_code == 3
    assert "directional of 'model' was not measured at alpha 0.4; scan again with --measures directional" in str(found)


# --- verdicts


def test_a_paired_change_in_points_is_judged_by_its_interval():
    found = finding(ENDS, **CHANGE | {"id": "r", "min_change": 0})
    assert (found.verdict, found.score) == ("pass", pytest.approx(10.0))
    assert found.interval[0] > 0
    assert finding(ENDS, **CHANGE, min_change=20).verdict == "fail"
    open_one = finding(ENDS, **CHANGE, min_change=8)
    assert open_one.verdict == "undecided"
    assert open_one.needed > 200
    assert f"about {open_one.needed:,} images would decide, there are 200" in open_one.reason
    assert finding(ENDS, **CHANGE, min_change=10).needed is None


def test_the_same_weights_do_not_differ(scan):
    found = finding(planted(failure=True), measure="accuracy", split="scans", versus="zero-shot", min_change=-0.5)
    assert (found.verdict, found.interval) == ("pass", (0.0, 0.0))
    assert "the candidate (alpha 0)" in found.reason


def test_a_candidate_is_judged_on_images_that_it_was_not_picked_on(scan):
    from sharpscope.stragglers.recommendation import halves

    found = finding(scan, measure="accuracy", split="scans", min=10)
    _, unseen = halves(500, 0)
    assert found.score == pytest.approx(100 * scan.correct[0.4, "scans"][unseen].mean())
    whole = finding(scan, measure="accuracy", split="scans", model="alpha 0.4", min=10)
    assert whole.score == pytest.approx(100 * scan.correct[0.4, "scans"].mean())
    assert whole.interval[1] - whole.interval[0] < found.interval[1] - found.interval[0]


def test_keep_id_moves_the_candidate_and_stands_above_the_rules(scan):
    rule = {"id": "r", "measure": "recommended_alpha", "min": 0}
    assert check(scan, {"rules": [rule]}).checks[0].finding.score == 0.4
    kept = check(scan, {"keep_id": 0, "rules": [rule]}).checks[0].finding
    assert kept.score == scan.recommend(0).alpha > 0.4
    versus = {**CHANGE, "split": "mean OOD", "model": "candidate", "versus": "uniform best", "max_change": 0}
    assert check(scan, {"keep_id": 0, "rules": [versus]}).checks[0].finding.score < 0


def test_thousands_of_rules_ask_for_the_candidate_once_and_for_their_checker_once(monkeypatch):
    asked, made = [], []
    recommend, adapter = ScanResult.recommend, rules.TypeAdapter
    monkeypatch.setattr(ScanResult, "recommend", lambda self, keep: asked.append(keep) or recommend(self, keep))
    monkeypatch.setattr(rules, "TypeAdapter", lambda kind: made.append(kind) or adapter(kind))
    rules._adapter.cache_clear()
    many = [{"id": str(i), "measure": "accuracy", "split": "scans", "min": i, "keep_id": -(i % 2)} for i in range(1, 9)]
    found = check(planted(), {"rules": many})
    assert (asked, made) == ([-1, 0], [EvaluationDetector])
    assert [one.finding.score for one in found.checks[:3]] == [
        finding(planted(), **{k: v for k, v in rule.items() if k != "id"}).score for rule in many[:3]
    ]


@pytest.mark.parametrize("measure", ["loss", "confidence"])
def test_loss_and_confidence_change_by_their_mean_difference(scan, measure):
    cells = {cell.key: cell.arrays[measure].astype(float) for cell in scan.cells if "evaluation" in cell.key}
    gaps = cells["0.3|scans|evaluation"] - cells["0.0|scans|evaluation"]
    factor = 1 if measure == "loss" else 100
    found = finding(scan, measure=measure, split="scans", model="alpha 0.3", versus="zero-shot", max_change=1e3)
    assert found.score == pytest.approx(factor * gaps.mean())
    half = factor * 1.965 * gaps.std(ddof=1) / math.sqrt(500)
    assert found.interval[1] - found.score == pytest.approx(half, rel=1e-3)


def test_a_model_that_says_75_percent_and_is_right_in_55_is_20_points_off():
    found = finding(ENDS, measure="calibration_error", split="id", model="zero-shot", max=50)
    assert found.score == pytest.approx(20)
    spread = 100 * math.sqrt(0.55 * 0.45 / 200)  # one bin: the error is that of the share
    assert (found.interval[1] - found.score) / 1.96 == pytest.approx(spread, rel=0.1)
    change = finding(ENDS, **CHANGE | {"measure": "calibration_error"}, max_change=0)
    assert (change.verdict, change.score) == ("pass", pytest.approx(-10))


def test_mean_ood_weighs_every_set_the_same(scan):
    found = finding(scan, measure="accuracy", split="mean OOD", model="fine-tuned", min=1)
    shares = [scan.correct[1.0, split].mean() for split in scan.ood_splits]
    assert found.score == pytest.approx(100 * np.mean(shares))
    with pytest.raises(MeasurementError, match="the scan holds no OOD set"):
        OODRegression()(ENDS)


def bump(height, n=400):
    """Return a result whose loss rises by ``4 height alpha (1 - alpha)`` above the chord from 1 to .6."""
    random, alphas = np.random.default_rng(0), (0.0, 0.25, 0.5, 0.75, 1.0)
    noise = random.normal(0, 0.2, n)
    losses = {(a, "id"): 1 - 0.4 * a + 4 * height * a * (1 - a) + noise * (1 + 0.1 * a) for a in alphas}
    return evaluated({key: np.ones(n, dtype=bool) for key in losses}, losses)


@pytest.mark.parametrize(("height", "verdict"), [(0.2, "fail"), (0.0, "pass"), (-0.3, "pass")])
def test_a_barrier_of_known_height_is_found(height, verdict):
    found = finding(bump(height), measure="barrier", split="id", max=0.05)
    assert found.verdict == verdict
    assert found.score == pytest.approx(max(height, 0), abs=0.01)


def test_unequal_ends_exceed_the_mean_chord_on_a_straight_line():
    found = BarrierDetector(max=0.05, chord="mean")(bump(0.0))
    assert (found.verdict, found.score) == ("fail", pytest.approx(0.2, abs=0.02))  # |1 - .6| / 2


def test_a_barrier_of_the_error_is_in_points():
    right = np.arange(1000)
    shares = {0.0: 600, 0.5: 400, 1.0: 700}
    found = BarrierDetector(max=5, of="error")(evaluated({(a, "id"): right < k for a, k in shares.items()}))
    assert (found.verdict, found.score) == ("fail", pytest.approx(25))


@pytest.mark.parametrize(("n", "verdict"), [(10, "undecided"), (100, "pass")])
def test_models_that_agree_on_ten_images_are_not_certain_to_agree(n, verdict):
    result = evaluated({(a, "id"): np.ones(n, dtype=bool) for a in (0.0, 0.5, 1.0)})
    assert BarrierDetector(max=5, of="error")(result).verdict == verdict
    change = {**CHANGE, "model": "alpha 0.5", "min_change": -5}
    assert finding(result, **change).verdict == verdict
    calibration = finding(result, measure="calibration_error", split="id", model="zero-shot", max=30)
    assert (calibration.score, calibration.verdict) == (pytest.approx(25), verdict)


def test_a_barrier_needs_a_place_between_the_ends():
    with pytest.raises(MeasurementError, match="a barrier needs both ends and an alpha between"):
        BarrierDetector(max=1)(ENDS)


def stragglers(verdicts, intervened=()):
    """Return a stand-in for a result with this straggler table."""
    rows = [{"layer": layer, "measure": measure, "verdict": v} for layer, measure, v in verdicts]
    return SimpleNamespace(
        stragglers=pd.DataFrame(rows, columns=["layer", "measure", "verdict"]),
        interventions=pd.DataFrame({"layer": list(intervened)}),
        meta={"measures": {"trace": {}}},
    )


TABLE = [
    ("a", "trace", "straggler"),
    ("a", "lambda_max", "undecided: sharpness converged nowhere"),
    ("b", "trace", "co-moves beyond the null"),
    ("c", "trace", "co-moves"),
    ("d", "lambda_max", "undecided: sharpness does not rise above its own error"),
    ("e", "trace", "undecided: the layer did not move"),
    ("model", "trace", "straggler"),
]


@pytest.mark.parametrize(
    ("intervened", "settings", "verdict", "interval"),
    [
        ((), {"max": 3}, "pass", (1, 3)),  # a; b (not intervened) and d may be
        ((), {"max": 2}, "undecided", (1, 3)),
        (("a", "b"), {"max": 2}, "pass", (1, 2)),
        ((), {"max": 0}, "fail", (1, 3)),
        (("a", "b"), {"max": 1, "of": "trace"}, "pass", (1, 1)),
        ((), {"min": 4}, "fail", (1, 3)),
    ],
)
def test_stragglers_are_counted_by_layer_and_what_may_be_one_widens_the_interval(
    intervened, settings, verdict, interval
):
    found = StragglerDetector(**settings)(stragglers(TABLE, intervened))
    assert (found.verdict, found.score, found.interval) == (verdict, 1, interval)
    assert "1 straggler (a)" in found.reason


def test_without_a_straggler_table_nothing_passes():
    assert check(stragglers([]), [StragglerDetector(max=2)]).exit_code == 3
    assert check(planted(ood=()), [StragglerDetector(max=2)]).exit_code == 3
    with pytest.raises(UsageError, match="measure 'tracee' is not in this scan"):
        StragglerDetector(max=2, of="tracee")(stragglers(TABLE))


def test_sharpness_is_judged_with_the_interval_of_its_row(scan):
    row = next(r for c in scan.cells for r in c.rows if (r.layer, r.measure, r.alpha) == (STRAGGLER, "trace", 0.4))
    found = finding(scan, measure="trace", layer=STRAGGLER, max=row.value * 0.5)
    assert (found.verdict, found.score, found.interval) == ("fail", row.value, row.interval)
    just = finding(scan, measure="trace", layer=STRAGGLER, max=row.value + 0.1 * row.stderr)
    assert just.verdict == "undecided"
    assert just.needed > row.draws
    with pytest.raises(UsageError, match=r"'visual.blok.02' is not in this scan\n.*'visual.block"):
        SharpnessDetector(measure="trace", layer="visual.blok.02", max=1)(scan)
    with pytest.raises(UsageError, match="max and max_ratio are two limits"):
        SharpnessDetector(measure="trace", max=1, max_ratio=2)


def test_a_ratio_to_zero_shot_is_that_of_the_rows(scan):
    rows = {r.alpha: r.value for c in scan.cells for r in c.rows if (r.layer, r.measure) == (STRAGGLER, "trace")}
    found = finding(scan, measure="trace", layer=STRAGGLER, model="fine-tuned", max_ratio=1)
    assert found.score == pytest.approx(rows[1.0] / rows[0.0])
    assert found.interval[0] < found.score < found.interval[1]


def test_an_eigenvalue_that_did_not_converge_never_passes(scan):
    found = check(scan, [SharpnessDetector(measure="lambda_max", layer=UNCONVERGED, max=1e9)])
    assert found.exit_code == 3
    assert "did not converge" in str(found)


def test_a_single_probe_decides_nothing(scan):
    found = finding(scan, measure="trace", layer=SINGLE, model="zero-shot", max=1e9)
    assert (found.verdict, found.needed) == ("undecided", None)


def test_the_recommended_alpha_is_judged_with_what_cannot_be_told_from_it(scan):
    ties = scan.recommend().ties
    found = RecommendedAlphaDetector(min=0.2, max=0.6)(scan)
    assert (found.verdict, found.interval) == ("pass", (min(ties), max(ties)))
    assert RecommendedAlphaDetector(max=min(ties) - 0.05)(scan).verdict == "fail"


def test_the_measured_share_counts_what_converged_and_what_is_missing(scan):
    rows = scan.layers
    found = MeasuredDetector(min=50)(scan)
    assert found.score == pytest.approx(100 * rows["converged"].sum() / (11 * 8 * 4))  # one layer lacks an alpha
    assert len(rows) < 11 * 8 * 4
    assert MeasuredDetector(min=99.9)(scan).verdict == "fail"
    assert check(planted(converged=False), [MeasuredDetector(min=0)]).exit_code == 3
    assert check(ENDS, [MeasuredDetector(min=0)]).exit_code == 3


def test_limits_that_no_number_of_a_scan_can_meet_are_refused():
    with pytest.raises(UsageError, match=r"measured is in percent: 0.9 means 0.9 %\n  fix: 90\?"):
        MeasuredDetector(min=0.9)
    with pytest.raises(UsageError, match="measured is in percent, and its limit is 120"):
        MeasuredDetector(min=120)
    with pytest.raises(UsageError, match="n_stragglers: max is -1, and layers are counted"):
        StragglerDetector(max=-1)
    with pytest.raises(UsageError, match="n_stragglers has a limit that is 1000"):
        StragglerDetector(max=10**400)


def test_what_changes_nothing_in_a_rule_of_sharpness_is_refused():
    with pytest.raises(UsageError, match="'alpha 0' is compared with itself, as 'zero-shot'"):
        SharpnessDetector(measure="trace", model="alpha 0", max_ratio=2)
    with pytest.raises(UsageError, match="keep_id = -1 changes nothing"):
        SharpnessDetector(measure="trace", model="fine-tuned", max=2, keep_id=-1)


def test_what_stands_above_the_rules_is_for_those_about_the_candidate(scan):
    alone = {"id": "a", "measure": "accuracy", "split": "scans", "model": "fine-tuned", "min": 1}
    versus = {"id": "b", "measure": "accuracy", "split": "scans", "versus": "candidate", "max_change": 1}
    rules = [alone, {**versus, "model": "zero-shot"}, {"id": "c", "measure": "trace", "max": 1}]
    found = [rule.detector.keep_id for rule in rules_from({"keep_id": -1, "rules": rules}).rules]
    assert found == [None, -1, -1]


# --- NaN is never pass


def test_a_verdict_on_nan_cannot_be_given():
    with pytest.raises(MeasurementError, match=r"detector 'x' calls nan .* 'pass'"):
        Finding("x", "pass", math.nan, (0.0, 1.0), "")
    with pytest.raises(MeasurementError, match=r"calls 1.0 \(95 % interval nan to 2.0\) 'undecided'"):
        Finding("x", "undecided", 1.0, (math.nan, 2.0), "")
    with pytest.raises(MeasurementError, match="gave the verdict 'passed'"):
        Finding("x", "passed", 1.0, (1.0, 1.0), "")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("score", "interval"),
    [(None, (0, 1)), ("1", (0, 1)), (1.0, None), (1.0, (0,)), (1.0, (0, None)), (1.0, "01"), (1, 2)],
)
@pytest.mark.parametrize("verdict", ["pass", "unmeasured"])
def test_a_score_and_the_ends_of_an_interval_are_numbers(verdict, score, interval):
    with pytest.raises(MeasurementError, match=r"detector 'x' gave the score .* and the interval "):
        Finding("x", verdict, score, interval, "")


def test_numbers_of_numpy_and_a_list_of_them_are_numbers():
    assert Finding("x", "pass", np.float32(1), [np.int64(0), 2], "").verdict == "pass"


@pytest.mark.parametrize("verdict", ["pass", "fail", "undecided"])
@pytest.mark.parametrize("interval", [(0.7, 0.8), (72.0, 90.0), (-math.inf, 71.0), (71.5, math.inf)])
def test_a_score_outside_of_its_own_interval_is_refused(verdict, interval):
    with pytest.raises(MeasurementError, match=r"'x' gave the score 71.2, outside of its own 95 % interval .* to .*\n"):
        Finding("x", verdict, 71.2, interval, "")


def test_a_score_may_lie_on_an_end_and_past_it_by_rounding():
    assert Finding("x", "pass", 0.3, (0.1 + 0.2, 1.0), "").score < 0.1 + 0.2
    none = evaluated({(a, "id"): np.zeros(52, dtype=bool) for a in (0.0, 1.0)})
    found = finding(none, measure="accuracy", split="id", model="zero-shot", max=50)
    assert (found.verdict, found.score) == ("pass", 0.0)
    assert found.interval[0] > 0


@pytest.mark.parametrize("rules", [None, 5, BarrierDetector(max=0.05)])
def test_what_is_neither_a_file_nor_a_table_nor_detectors_is_no_rules(rules):
    with pytest.raises(
        UsageError, match=r"rules are .*\n  fix: a TOML file, its table as a dict, or a list of detectors"
    ):
        check(ENDS, rules)


@pytest.mark.parametrize("measure", ["accuracy", "loss", "confidence", "calibration_error", "barrier"])
def test_a_result_with_nan_among_its_images_is_not_measured(measure):
    losses = {(a, "id"): np.where(np.arange(200) == 7, math.nan if a else 1.0, 1.0) for a in (0.0, 0.5, 1.0)}
    result = evaluated({(0.0, "id"): OTHER, (0.5, "id"): ONE, (1.0, "id"): ONE}, losses)
    model = {} if measure == "barrier" else {"model": "fine-tuned"}
    found = check(
        result, {"undecided": "pass", "rules": [{"id": "r", "measure": measure, "split": "id", "max": 99, **model}]}
    )
    assert (found.exit_code, found.passed) == (3, False)
    assert "holds nan" in found.checks[0].finding.reason


@pytest.mark.parametrize("severity", ["error", "warn"])
@pytest.mark.parametrize("undecided", ["pass", "warn", "fail"])
def test_unmeasured_is_no_severity(severity, undecided):
    rule = {"id": "r", "measure": "trace", "max": 1, "severity": severity, "model": "zero-shot"}
    assert check(ENDS, {"undecided": undecided, "rules": [rule]}).exit_code == 3


# --- the gate


@pytest.mark.parametrize(
    ("min_change", "severity", "undecided", "outcome", "code"),
    [
        (0, "error", "fail", "passed", 0),
        (20, "error", "pass", "failed", 1),
        (20, "warn", "fail", "warned", 0),
        (8, "error", "fail", "failed", 1),
        (8, "error", "warn", "warned", 0),
        (8, "error", "pass", "passed", 0),
        (8, "warn", "fail", "warned", 0),
    ],
)
def test_severity_and_undecided_make_the_outcome(min_change, severity, undecided, outcome, code):
    rule = {**CHANGE, "min_change": min_change, "severity": severity}
    found = check(ENDS, {"undecided": undecided, "rules": [rule]})
    assert (found.checks[0].outcome, found.exit_code, found.passed) == (outcome, code, code == 0)


def test_raise_for_status_says_what_stopped_it(scan):
    good, bad = EvaluationDetector(split="id", min=10), EvaluationDetector(split="id", min=99)
    found = check(scan, [good])
    assert found.raise_for_status() is found
    with pytest.raises(GateError, match=r"Gate failed: 1 passed, 1 failed of 2 rules.\n  failed +2 Eval") as failed:
        check(scan, [good, bad]).raise_for_status()
    assert failed.value.exit_code == 1
    with pytest.raises(MeasurementError, match="Gate could not be measured") as unmeasured:
        check(scan, [bad, SharpnessDetector(measure="directional", max=1)]).raise_for_status()
    assert unmeasured.value.exit_code == 3


def test_one_line_of_pytest_shows_every_rule_when_it_fails(scan):
    found = check(scan, {"rules": [{"id": "high", "measure": "accuracy", "split": "id", "min": 99}]})
    with pytest.raises(AssertionError) as raised:
        assert found.passed
    assert "failed     high: accuracy of the candidate (alpha 0.4) on 'id'" in str(raised.value)


def test_no_rules_are_no_gate(scan):
    with pytest.raises(UsageError, match="there are no rules"):
        check(scan, [])


def test_a_detector_that_breaks_or_returns_nonsense_is_unmeasured_and_the_others_are_still_asked(scan):
    def breaks(result):
        raise ZeroDivisionError("by nothing")

    def nonsense(result):
        return True

    def dishonest(result):
        return Finding("dishonest", "pass", math.nan, (0.0, 1.0), "all is well")

    found = check(scan, [breaks, nonsense, dishonest, OODRegression()])
    assert [c.outcome for c in found.checks] == ["unmeasured", "unmeasured", "unmeasured", "passed"]
    said = [c.finding.reason for c in found.checks]
    assert said[0].endswith("the detector raised ZeroDivisionError: by nothing")
    assert said[1].endswith("the detector returned bool, not a Finding")
    assert "calls nan" in said[2]


# --- detectors of other packages


@dataclass(frozen=True)
class Depth:
    """Judges the number of layers."""

    limit: int

    def __call__(self, result):
        found = float(len(result.meta["layers"]))
        return Finding("depth", "pass" if found <= self.limit else "fail", found, (found, found), "depth")


class Plain:
    """No dataclass."""

    def __init__(self, limit):
        self.limit = limit

    def __call__(self, result):
        return Finding("plain", "pass", self.limit, (self.limit, self.limit), "plain")


@pytest.fixture
def offered(tmp_path, monkeypatch):
    """A package on the path that offers two detectors."""
    facts = tmp_path / "other-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(
        "[sharpscope.detectors]\ndepth = test_gate:Depth\ngone = test_gate:Gone\nplain = test_gate:Plain\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def test_a_detector_of_another_package_is_named_in_rules(offered, scan):
    rules = [{"id": "a", "detector": "depth", "limit": 3}, {"id": "b", "detector": "plain", "limit": 2}]
    assert [c.outcome for c in check(scan, {"rules": rules}).checks] == ["failed", "passed"]


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"detector": "dept"}, r"no installed package offers a detector 'dept'\n  fix: did you mean 'depth'\?"),
        ({"detector": "depth", "limt": 3}, r"'limt' is no key of this rule\n  fix: did you mean 'limit'\?"),
        ({"detector": "depth", "limit": "x"}, "'limit' is the text 'x'"),
        ({"detector": "depth", "limit": [1]}, "'limit': input should be a valid integer"),
        ({"detector": "depth"}, "'limit' is missing"),
        ({"detector": "gone"}, "test_gate:Gone cannot be loaded: module 'test_gate' has no attribute 'Gone'"),
        ({"detector": "plain"}, "the detector cannot be made: missing a required argument: 'limit'"),
    ],
)
def test_a_mistake_in_a_rule_of_another_package_is_named_too(offered, scan, rule, said):
    with pytest.raises(UsageError, match=said):
        check(scan, {"rules": [{"id": "a", **rule}]})


# --- documents


def gate() -> GateResult:
    """Return a gate with every outcome and names that are out to break formats."""
    result = planted()
    rules = [
        {"id": "<b>&\"' | ` \x07", "measure": "accuracy", "split": HOSTILE, "min": 10},
        {"id": "fails", "measure": "accuracy", "split": HOSTILE, "min": 99},
        {"id": "warns", "measure": "accuracy", "split": "id", "min": 99, "severity": "warn"},
        {"id": "lacks", "measure": "directional", "max": 1},
    ]
    return check(result, {"rules": rules})


def test_junit_is_valid_and_has_a_case_for_each_rule():
    text = junit(gate())
    schema = xmlschema.XMLSchema(str(Path(__file__).parent / "junit.xsd"))
    schema.validate(text)
    found = schema.to_dict(text)["testsuite"][0]
    assert [found[f"@{name}"] for name in ("tests", "failures", "errors", "skipped")] == [4, 1, 1, 1]
    cases = {case["@name"]: case for case in found["testcase"]}
    assert [next(iter(case.keys() - {"@name", "@classname", "@time"})) for case in cases.values()] == [
        *("system-out", "failure", "skipped", "error"),
    ]
    assert next(iter(cases)) == "<b>&\"' | ` \N{REPLACEMENT CHARACTER}"
    assert cases["fails"]["failure"]["@message"].startswith("fail: accuracy of the candidate")


def test_the_schema_can_fail():
    schema = xmlschema.XMLSchema(str(Path(__file__).parent / "junit.xsd"))
    text = junit(gate())
    for right, wrong in (('tests="4"', 'tests="x"'), ("testcase", "case"), ('time="0"', 'tme="0"')):
        assert not schema.is_valid(text.replace(right, wrong))


def test_json_holds_every_number_and_null_where_there_is_none():
    found = json.loads(as_json(gate()))
    assert (found["passed"], found["exit_code"], found["undecided"]) == (False, 3, "fail")
    by_id = {rule["id"]: rule for rule in found["rules"]}
    assert by_id["fails"]["verdict"] == "fail"
    assert by_id["fails"]["interval"][0] < by_id["fails"]["score"] < by_id["fails"]["interval"][1]
    assert (by_id["lacks"]["score"], by_id["lacks"]["interval"]) == (None, [None, None])


def test_markdown_keeps_one_row_a_rule_whatever_the_names_hold():
    lines = markdown(gate()).splitlines()
    assert lines[0] == "### Gate could not be measured: 1 passed, 1 failed, 1 warned, 1 unmeasured of 4 rules."
    assert len(lines) == 4 + 4
    for line in lines[4:]:
        assert line.replace("\\|", "").count("|") == 5
        assert "<b>" not in line


def test_the_readme_style_call_reads_a_saved_scan(tmp_path, scan):
    scan.save(tmp_path)
    rules = tmp_path / "pyproject.toml"
    rules.write_text('[[tool.sharpscope.check.rules]]\nid = "a"\nmeasure = "accuracy"\nsplit = "id"\nmin = 10\n')
    assert sharpscope.check(sharpscope.open(tmp_path), str(rules)).passed


def test_a_row_of_a_cell_that_a_rule_needs_may_be_missing():
    result = evaluated({(0.0, "id"): OTHER, (1.0, "id"): ONE})
    lame = Cell("1.0|id|evaluation", (Row(1.0, "model", "id", "accuracy", 0.5, 0.1, 3, True),))
    result.cells = (result.cells[0], lame)
    assert check(result, [EvaluationDetector(split="id", model="fine-tuned", min=1)]).exit_code == 3
