"""The gate errs as often as it says: exact rates where they can be summed, simulated ones through the gate itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
from gates import evaluated, pair
from scipy import optimize, stats

from sharpscope import check
from sharpscope.calibration import calibration_error
from sharpscope.detectors import EvaluationDetector, Limits, OODRegression
from sharpscope.detectors.calibration import calibration, calibration_change
from sharpscope.detectors.intervals import Estimate, mean, paired_counts, paired_proportion, proportion, score
from sharpscope.detectors.layers import ratio
from sharpscope.stragglers.barrier import barrier

NOMINAL = 0.025  # each side of 95 %


def outcomes(n, gained, lost):
    """Return every (gained, lost) that occurs with a probability over 1e-8, and these probabilities."""
    b, c = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    fits = b + c <= n
    b, c = b[fits], c[fits]
    chance = stats.multinomial.pmf(np.stack([b, c, n - b - c], axis=1), n, [gained, lost, 1 - gained - lost])
    kept = chance > 1e-8
    return zip(b[kept].tolist(), c[kept].tolist(), chance[kept].tolist(), strict=True)


def verdict_rates(n, gained, lost, limit):
    """Return the exact chance of each verdict on ``change >= limit``."""
    rates = dict.fromkeys(("pass", "fail", "undecided"), 0.0)
    for b, c, chance in outcomes(n, gained, lost):
        rates[Limits(low=limit).verdict(paired_counts(b, c, n).interval)] += chance
    return rates


# --- the interval of a paired change


@pytest.mark.parametrize(("gained", "lost", "n"), [(9, 1, 44), (12, 2, 50), (0, 3, 80), (5, 5, 30)])
@pytest.mark.parametrize("gap", [-0.3, -0.05, 0.0, 0.02, 0.25])
def test_the_score_statistic_is_that_of_the_restricted_maximum_likelihood(gained, lost, n, gap):
    rest = n - gained - lost

    def surprise(share):
        return -sum(
            k * math.log(p) for k, p in ((gained, share + gap), (lost, share), (rest, 1 - 2 * share - gap)) if k
        )

    lowest, highest_share = max(0.0, -gap) + 1e-12, (1 - gap) / 2 - 1e-12
    share = optimize.minimize_scalar(
        surprise, bounds=(lowest, highest_share), method="bounded", options={"xatol": 1e-12}
    ).x
    deviation = math.sqrt(n * (2 * share + gap - gap**2))
    assert score(gained, lost, n, gap) == pytest.approx((gained - lost - n * gap) / deviation, rel=1e-4)


def test_at_no_change_the_statistic_is_mcnemars():
    assert score(17, 6, 200, 0.0) == pytest.approx((17 - 6) / math.sqrt(17 + 6))


def test_without_a_disagreement_the_interval_still_has_the_width_that_n_images_leave():
    found = paired_counts(0, 0, 100)
    width = stats.norm.ppf(0.975) ** 2
    assert found.interval == pytest.approx((-width / (100 + width), width / (100 + width)))


def test_a_swap_of_the_models_turns_the_interval_round():
    one, other = pair(30, 11, 100, 59)
    found, back = paired_proportion(one, other), paired_proportion(other, one)
    assert found.value == pytest.approx(19 / 200)
    assert found.interval == pytest.approx((-back.high, -back.low))


def test_the_interval_of_everything_gained_ends_at_one():
    assert paired_counts(5, 0, 5).high == 1.0
    assert paired_counts(0, 5, 5).low == -1.0


# --- how often the gate errs


@pytest.mark.parametrize(
    ("n", "gained", "lost"),
    [(100, 0.1, 0.1), (100, 0.2, 0.1), (360, 0.01, 0.03), (360, 0.05, 0.055), (1000, 0.0, 0.005)],
)
def test_on_the_limit_the_gate_passes_and_fails_at_the_stated_rate(n, gained, lost):
    """A candidate exactly on the limit: a pass is a miss, a fail a false alarm, 2.5 % each; never more than 3.5 %."""
    rates = verdict_rates(n, gained, lost, gained - lost)
    assert sum(rates.values()) == pytest.approx(1, abs=1e-4)
    assert rates["fail"] < 1.4 * NOMINAL
    assert rates["pass"] < 1.4 * NOMINAL
    if n * (gained + lost) >= 20:
        assert min(rates["fail"], rates["pass"]) > 0.7 * NOMINAL


def test_beyond_the_limit_errors_vanish_and_power_grows_with_images():
    worse = [verdict_rates(n, 0.05, 0.10, -0.01) for n in (100, 400)]
    assert max(rates["pass"] for rates in worse) < 0.002
    assert worse[0]["fail"] < 0.4 < worse[1]["fail"]
    assert verdict_rates(400, 0.10, 0.05, -0.01)["fail"] < 1e-4


@pytest.mark.parametrize(("gained", "lost", "n"), [(7, 5, 100), (5, 6, 100), (0, 0, 50)])
def test_the_images_asked_for_decide_four_times_in_five(gained, lost, n):
    limits = Limits(low=-0.03)
    found = paired_counts(gained, lost, n)
    assert limits.verdict(found.interval) == "undecided"
    needed = found.needed(limits)
    if gained:
        assert verdict_rates(needed, gained / n, lost / n, -0.03)["pass"] == pytest.approx(0.8, abs=0.05)
    else:  # nothing is left to chance: more of the same must decide
        assert limits.verdict(paired_counts(0, 0, needed).interval) == "pass"
        assert limits.verdict(paired_counts(0, 0, needed // 3).interval) == "undecided"


def simulated(random, n, alphas, sets, share=0.6, stays=0.8):
    """Return correctness that is as likely at every alpha, the same images at each."""
    luck = {s: random.random(n) for s in sets}
    return {(a, s): np.where(random.random(n) < stays, luck[s], random.random(n)) < share for a in alphas for s in sets}


def test_a_candidate_picked_among_equals_is_judged_no_better_than_it_is():
    """Ten alphas as good as zero-shot: judged by the images it was picked on, the best would pass far too often."""
    random, passed, failed, runs = np.random.default_rng(0), 0, 0, 500
    for _ in range(runs):
        result = evaluated(simulated(random, 80, np.linspace(0, 1, 11), ("id", "a", "b")))
        verdict = OODRegression(min_change=0)(result).verdict
        if result.recommend().alpha == 0:
            continue
        passed, failed = passed + (verdict == "pass"), failed + (verdict == "fail")
    bound = NOMINAL + 3 * math.sqrt(NOMINAL * (1 - NOMINAL) / runs)
    assert passed / runs < bound
    assert failed / runs < bound
    assert passed + failed > 0


def test_unpaired_intervals_would_leave_open_what_the_gate_decides():
    one, other = pair(4, 40, 300, 156)
    result = evaluated({(0.0, "id"): one, (1.0, "id"): other})
    judge = EvaluationDetector(split="id", model="fine-tuned", versus="zero-shot", max_change=2)
    assert judge(result).verdict == "fail"
    apart = proportion(one), proportion(other)
    assert apart[0].high > apart[1].low


# --- other intervals


def test_the_interval_of_a_mean_over_sets_covers_as_often_as_it_says():
    random, hits, runs = np.random.default_rng(1), 0, 800
    for _ in range(runs):
        sets = [proportion(random.random(n) < p) for n, p in ((40, 0.9), (60, 0.5), (80, 0.97))]
        low, high = mean(sets).interval
        hits += low <= (0.9 + 0.5 + 0.97) / 3 <= high
    assert 0.93 < hits / runs < 0.975


@pytest.mark.parametrize("height", [0.0, 0.1])
def test_the_interval_of_a_barrier_covers_the_truth_and_misses_high_as_rarely_as_it_says(height):
    alphas, random, runs, n = np.linspace(0, 1, 7), np.random.default_rng(2), 400, 60
    shape = 4 * height * alphas * (1 - alphas)
    low = high = 0
    for _ in range(runs):
        noise = np.cumsum(random.normal(0, 0.1, (7, n)), axis=0) + random.exponential(1, n)
        losses = 1 - 0.5 * alphas[:, None] + shape[:, None] + noise
        found, _ = barrier({(float(a), "id"): loss for a, loss in zip(alphas, losses, strict=True)}, ["id"])
        low, high = low + (found.low > height), high + (found.high < height)
    assert low / runs < 0.05
    assert high / runs < 0.05
    if height:
        assert low + high > 0


def test_the_interval_of_a_paired_ratio_covers_and_is_narrower_than_an_unpaired_one():
    random, hits, runs, n = np.random.default_rng(3), 0, 1500, 30
    for _ in range(runs):
        groups = random.normal(0, 1, n)
        below, above = 4 + groups + random.normal(0, 0.3, n), 8 + 2 * groups + random.normal(0, 0.3, n)
        ends = [
            Estimate(x.mean(), x.mean() - half, x.mean() + half, n)
            for x in (above, below)
            for half in [1.96 * x.std(ddof=1) / math.sqrt(n)]
        ]
        paired = ratio(*ends, np.cov(above, below)[0, 1] / n)
        apart = ratio(*ends)
        assert paired.high - paired.low < 0.7 * (apart.high - apart.low)
        hits += paired.low <= 2 <= paired.high
    assert 0.92 < hits / runs < 0.97


def test_a_ratio_to_what_may_be_zero_or_negative_is_not_known():
    assert ratio(Estimate(3, 2, 4, 9), Estimate(1, -0.5, 2.5, 9)).interval == (-math.inf, math.inf)
    assert ratio(Estimate(3, 2, 4, 9), Estimate(-1, -1.1, -0.9, 9)).interval == (-math.inf, math.inf)


def test_bounds_are_divided_crosswise():
    assert ratio(Estimate(6, 5, 7, 9), Estimate(2, 1, 4, 9), bounds=True).interval == (5 / 4, 7 / 1)


def test_a_rule_through_the_gate_errs_at_the_stated_rate():
    """The same claim from file to outcome, by simulation: a true change of -3 points, the limit there."""
    random, runs, n = np.random.default_rng(4), 1000, 300
    table = {"undecided": "pass", "rules": [RULE]}
    ends = []
    for b, c in random.multinomial(n, [0.06, 0.09, 0.85], runs)[:, :2].tolist():
        fine, zero = pair(b, c, n - b - c, 0)
        ends.append(check(evaluated({(0.0, "id"): zero, (1.0, "id"): fine}), table).checks[0].finding.verdict)
    for verdict in ("pass", "fail"):
        assert abs(ends.count(verdict) / runs - NOMINAL) < 3 * math.sqrt(NOMINAL / runs)


RULE = {
    "id": "change",
    "measure": "accuracy",
    "split": "id",
    "model": "fine-tuned",
    "versus": "zero-shot",
    "min_change": -3.0,
}


# --- the calibration error, which sampling raises


def judged_images(random, n, shift, only_above=0.0):
    """Return confidences and correctness of a model that is right less often than it says, by ``shift``."""
    confidence = np.clip(random.beta(6, 2, n), 0.05, 0.999)
    right = np.clip(confidence - shift * (confidence > only_above), 0, 1)
    return {"confidence": confidence.astype(np.float32), "correct": random.random(n) < right}


def misses(estimates, truth):
    """Return how often a truth lies below the interval, and above it."""
    return tuple(np.mean([(truth < found.low, truth > found.high) for found in estimates], axis=0))


@pytest.mark.parametrize(
    ("n", "shift", "only_above", "truth"),
    [(200, 0, 0, 0.0), (2000, 0, 0, 0.0), (200, 0.05, 0, 0.05), (500, 0.05, 0, 0.05), (500, 0.15, 0.8, 0.0645)],
)
def test_the_interval_of_a_calibration_error_misses_rarely_on_either_side(n, shift, only_above, truth):
    """A bootstrap around the number missed a calibrated model in 96 % (n = 200), an error of 5 points in 19 %."""
    random = np.random.default_rng(5)
    below, above = misses([calibration([judged_images(random, n, shift, only_above)]) for _ in range(300)], truth)
    assert below < 0.08
    assert above < 0.06


@pytest.mark.parametrize(("sets", "n"), [(1, 300), (1, 1000), (3, 300)])
def test_a_model_that_loses_its_calibration_is_seen_to_lose_as_much_as_it_does(sets, n):
    """Estimated as 1.8 to 2.5 of 5 points: the truth was above a bootstrap interval in 21 and 35 %."""
    random = np.random.default_rng(6)
    worse = [[tuple(judged_images(random, n, s) for s in (0.05, 0)) for _ in range(sets)] for _ in range(200)]
    below, above = misses([calibration_change(pairs) for pairs in worse], 0.049)
    assert below < 0.03
    assert above < 0.1
    back = [calibration_change([(other, one) for one, other in pairs]) for pairs in worse[:20]]
    ends = [(-found.high, -found.low) for found in back]
    assert ends == [pytest.approx(calibration_change(pairs).interval) for pairs in worse[:20]]


def test_the_calibration_judged_is_the_one_of_the_tables_and_lies_inside_its_interval():
    random = np.random.default_rng(7)
    for n in (1, 2, 30, 300):
        one, other = judged_images(random, n, 0.3), judged_images(random, n, 0)
        apart = [calibration_error(**model) for model in (one, other)]
        found, change = calibration([one, other]), calibration_change([(one, other)])
        assert found.value == pytest.approx(np.mean(apart))
        assert change.value == pytest.approx(apart[0] - apart[1])
        assert all(e.low < e.value < e.high for e in (found, change))


def test_a_sure_model_that_is_always_right_has_an_interval():
    model = {"confidence": np.ones(50, dtype=np.float32), "correct": np.ones(50, dtype=bool)}
    assert calibration([model]).interval == (0.0, pytest.approx(1 / 50))
    assert calibration_change([(model, model)]).interval == pytest.approx((-1 / 50, 1 / 50))
