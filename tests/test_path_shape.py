"""Barriers, failure of interpolation, and accuracy without labels, against planted truth."""

import math

import numpy as np
import pandas as pd
import pytest
from planted import planted

from sharpscope.errors import UsageError
from sharpscope.stragglers.barrier import barrier, barriers, interpolation_failure, largest
from sharpscope.stragglers.label_free import Answers, average_confidence, label_free
from sharpscope.stragglers.label_free import average_thresholded_confidence as atc
from sharpscope.stragglers.label_free import difference_of_confidences as doc

ALPHAS = [0.0, 0.25, 0.5, 0.75, 1.0]


def losses(curve, n=400, seed=0, noise=0.3):
    random = np.random.default_rng(seed)
    own = random.normal(0, noise, n)
    return {
        (alpha, "id"): value + own + random.normal(0, noise / 3, n) for alpha, value in zip(ALPHAS, curve, strict=True)
    }


def test_a_straight_line_has_no_linear_barrier_and_half_the_difference_by_the_mean_chord():
    start, end = np.linspace(1, 3, 9), np.linspace(2, 6, 9)
    line = {(alpha, "id"): (1 - alpha) * start + alpha * end for alpha in ALPHAS}
    straight, _ = barrier(line, ["id"])
    assert (straight.value, straight.low) == (pytest.approx(0, abs=1e-12), pytest.approx(0, abs=1e-12))
    half, where = barrier(line, ["id"], chord="mean")
    assert (half.value, where) == (pytest.approx((end.mean() - start.mean()) / 2), 1.0)


@pytest.mark.parametrize("chord", ["linear", "mean"])
def test_a_barrier_is_the_highest_point_above_its_chord(chord):
    found = {(a, s): v for s in ("x", "y") for (a, _), v in losses([1, 1.4, 2.2, 1.9, 1.5], seed=len(s)).items()}
    mean = {a: np.mean([found[a, s].mean() for s in ("x", "y")]) for a in ALPHAS}
    chords = {
        a: (1 - a) * mean[0.0] + a * mean[1.0] if chord == "linear" else (mean[0.0] + mean[1.0]) / 2 for a in ALPHAS
    }
    best, where = barrier(found, ["x", "y"], chord=chord)
    assert best.value == pytest.approx(max(mean[a] - chords[a] for a in ALPHAS))
    assert where == 0.5
    assert best.low < best.value < best.high


def test_the_interval_of_the_largest_mean_covers_the_truth_although_it_was_picked():
    """Nine equal means: the largest of the estimates is too high by more than a standard error."""
    random, covered, naive = np.random.default_rng(0), 0, 0
    for _ in range(300):
        gaps = random.normal(0, 1, (100, 1)) + random.normal(0, 2, (100, 9))
        found = largest([gaps])
        covered += found.low <= 0 <= found.high
        picked = gaps[:, found.place]
        naive += abs(picked.mean()) < 1.96 * picked.std(ddof=1) / 10
    assert covered / 300 > 0.92
    assert naive / 300 < 0.9


def test_a_single_image_leaves_everything_open():
    found = largest([np.array([[0.2, 0.4]]), np.zeros((5, 2))])
    assert (found.value, found.low, found.high) == (pytest.approx(0.2), -math.inf, math.inf)
    one = {(a, "a"): np.array([a == 0.5]) for a in ALPHAS}
    assert interpolation_failure(one, ["a"]).verdict == "undecided"


def test_one_place_has_the_ordinary_interval():
    gaps = np.random.default_rng(0).normal(0, 1, (400, 1))
    found = largest([gaps])
    assert found.high - found.low == pytest.approx(2 * 1.96 * gaps.std(ddof=1) / 20, rel=0.03)


def answers(rates, n=3000, seed=0):
    random = np.random.default_rng(seed)
    latent = {s: random.random(n) for s in ("a", "b")}
    return {
        (alpha, s): np.where(random.random(n) < 0.8, latent[s], random.random(n)) < rate
        for alpha, rate in rates.items()
        for s in latent
    }


@pytest.mark.parametrize(
    ("rates", "weak", "strict"),
    [
        ({0.0: 0.5, 0.25: 0.6, 0.5: 0.7, 1.0: 0.5}, "does not fail", "does not fail"),
        ({0.0: 0.5, 0.25: 0.6, 0.5: 0.7, 1.0: 0.9}, "does not fail", "fails"),
        ({0.0: 0.5, 0.25: 0.4, 0.5: 0.3, 1.0: 0.2}, "fails", "fails"),
        ({0.0: 0.5, 0.25: 0.5, 0.5: 0.3, 1.0: 0.2}, "undecided", "undecided"),
        ({0.0: 0.5, 1.0: 0.9}, "undecided", "undecided"),
    ],
)
def test_failure_of_interpolation_is_told_in_both_forms(rates, weak, strict):
    found = answers(rates)
    for form, verdict in (("weak", weak), ("strict", strict)):
        failure = interpolation_failure(found, ["a", "b"], form=form)
        assert failure.verdict == verdict, failure
        if verdict != "undecided":
            ends = 0.5 if form == "weak" else max(0.5, rates[1.0])
            gain = max(rate - ends for alpha, rate in rates.items() if 0 < alpha < 1)
            assert failure.low < 100 * gain < failure.high


def test_agreement_on_a_few_images_is_no_certainty():
    same = {(a, "a"): np.array([True] * 10) for a in ALPHAS}
    failure = interpolation_failure(same, ["a"])
    assert (failure.verdict, failure.gain) == ("undecided", 0)
    assert failure.high > 10


@pytest.mark.parametrize("chord", ["linear", "mean"])
def test_no_error_on_a_few_images_is_no_certainty_that_there_is_no_barrier(chord):
    none = {(a, "a"): np.zeros(10, dtype=bool) for a in ALPHAS}
    found, _ = barrier(none, ["a"], chord=chord)
    assert found.value == 0
    assert found.high == pytest.approx(1.96 / 10, rel=0.01)  # as if one of the ten could be wrong at an inner alpha


def test_two_ends_that_are_to_be_beaten_need_a_band_over_both():
    """One place, two ends whose gains are 0 and independent: beating both by chance must be as rare as stated."""
    random, high, low, runs = np.random.default_rng(3), 0, 0, 2000
    for _ in range(runs):
        found = largest([random.normal(0, 1, (80, 2))], ends=2)
        high, low = high + (found.high < 0), low + (found.low > 0)
    assert high / runs < 0.025 + 3 * math.sqrt(0.025 / runs)
    assert low / runs < 0.025


def test_a_path_without_an_end_or_an_unknown_form_is_refused_and_a_frame_without_ends_is_empty():
    with pytest.raises(UsageError, match=r"alphas \[0.0, 0.25\] lack an end"):
        barrier({(0.0, "id"): np.ones(3), (0.25, "id"): np.ones(3)}, ["id"])
    with pytest.raises(UsageError, match="'half' is unknown"):
        interpolation_failure({}, [], form="half")
    assert barriers({"loss": {(0.5, "id"): np.ones(3)}}, "id", []).empty


def test_a_result_gives_its_barriers_and_says_whether_mixing_fails():
    good, bad = planted(), planted(failure=True)
    assert good.interpolation_failure().verdict == "does not fail"
    assert bad.interpolation_failure().verdict == "fails"
    assert set(good.barriers["split"]) == {"id", *good.ood_splits, "ood mean"}
    assert set(good.barriers["measure"]) == {"error", "loss"}
    straight = bad.barriers.query("split == 'ood mean' and measure == 'error' and chord == 'linear'").iloc[0]
    assert straight["high"] < 0.02, "its error falls on a line"


def calibrated(random, n, spread=1.0, optimism=0.0):
    """Answers that are right as often as they are confident, or less by the optimism."""
    confidence = 1 / (1 + np.exp(-random.normal(1, spread, n)))
    return Answers(random.random(n) < confidence - optimism, confidence.astype(np.float32))


@pytest.mark.parametrize("estimator", [atc, doc, average_confidence])
def test_for_a_calibrated_model_the_estimate_lies_within_its_standard_error_of_the_truth(estimator):
    random, scores = np.random.default_rng(0), []
    for _ in range(200):
        labelled, unlabelled = calibrated(random, 500), calibrated(random, 400)
        found = estimator(labelled, unlabelled.confidence)
        truth = (1 / (1 + np.exp(-random.normal(1, 1, 200_000)))).mean()
        scores.append((found.value - truth) / found.stderr)
    assert abs(np.mean(scores)) < 0.3
    assert 0.8 < np.std(scores) < 1.25


@pytest.mark.parametrize("sets", [1, 8])
def test_the_stated_error_of_a_mean_over_sets_is_the_spread_that_repetitions_show(sets):
    """All sets are judged by the same labelled images, whose error does not average out over them."""
    random, names, runs = np.random.default_rng(4), [f"set {i}" for i in range(sets)], 200
    tables = []
    for _ in range(runs):
        found = {(0.0, split): calibrated(random, 300) for split in ("id", *names)}
        tables.append(label_free(found, "id", names).query("split == 'ood mean'"))
    for name, rows in pd.concat(tables).groupby("estimator"):
        assert rows["estimate"].std() == pytest.approx(rows["stderr"].mean(), rel=0.2), name


def test_on_the_labelled_images_themselves_thresholds_and_differences_give_the_accuracy():
    labelled = calibrated(np.random.default_rng(1), 500, optimism=0.2)
    accuracy = labelled.correct.mean()
    assert atc(labelled, labelled.confidence).value == pytest.approx(accuracy)
    assert doc(labelled, labelled.confidence).value == pytest.approx(accuracy)
    assert average_confidence(labelled, labelled.confidence).value > accuracy + 0.1


def test_the_threshold_is_where_as_many_labelled_images_lie_below_as_are_wrong():
    labelled = Answers(np.array([True, True, False, False, True]), np.array([0.9, 0.8, 0.7, 0.6, 0.5]))
    assert atc(labelled, np.array([0.65, 0.69, 0.7, 0.71])).value == 0.5
    assert atc(Answers(~labelled.correct & False, labelled.confidence), np.array([0.99])).value == 0


def test_a_constant_optimism_misleads_mean_confidence_and_the_choice_is_scored_against_the_truth():
    random = np.random.default_rng(2)
    found = {}
    for alpha, optimism in ((0.0, 0.0), (0.5, 0.05), (1.0, 0.3)):
        for split in ("id", "a", "b"):
            shift = optimism if split != "id" else 0.0
            found[alpha, split] = calibrated(random, 4000, spread=1 + alpha, optimism=shift)
    table = label_free(found, "id", ["a", "b"])
    assert list(table.columns[:6]) == ["alpha", "split", "estimator", "estimate", "truth", "error"]
    means = table[table["split"] == "ood mean"]
    for row in means.itertuples():
        truth = 100 * np.mean([found[row.alpha, s].correct.mean() for s in ("a", "b")])
        assert row.truth == pytest.approx(truth)
        assert row.error == pytest.approx(row.estimate - truth)
    assert (means[means["alpha"] == 1.0]["error"] > 15).all()
    chosen = means[means["chosen"]].set_index("estimator")
    for name, rows in means.groupby("estimator"):
        assert chosen.loc[name, "alpha"] == rows.loc[rows["estimate"].idxmax(), "alpha"]
    assert not table[table["split"] != "ood mean"]["chosen"].any()


def test_without_ood_sets_there_is_nothing_to_estimate():
    assert label_free({(0.0, "id"): calibrated(np.random.default_rng(0), 10)}, "id", []).empty
    assert isinstance(planted().label_free, pd.DataFrame)
    assert not math.isnan(planted().label_free["estimate"].sum())
