"""Co-movement and recommendation against planted truth; frames, save and open need no torch."""

import math
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from gates import evaluated

from sharpscope.detectors import OODRegression
from sharpscope.errors import UsageError
from sharpscope.recipe import Recipe
from sharpscope.stragglers.correlation import COLUMNS, co_movement, ood_error
from sharpscope.stragglers.label_free import Answers, label_free
from sharpscope.stragglers.paired import difference, mean_difference
from sharpscope.stragglers.recipes import Candidate, Contest
from sharpscope.stragglers.recommendation import at, halves, recommend
from sharpscope.table import Row, frame

ALPHAS = [0.0, 0.25, 0.5, 0.75, 1.0]


def layer_rows(layer, values, stderr=0.01):
    return [Row(a, layer, "id", "trace", v, stderr, 4, True) for a, v in zip(ALPHAS, values, strict=True)]


ERROR = pd.Series([0.4, 0.3, 0.2, 0.3, 0.5], index=ALPHAS)


@pytest.mark.parametrize(
    ("values", "stderr", "tau", "verdict"),
    [
        ([4.0, 3.1, 2.0, 3.0, 5.0], 0.01, pytest.approx(0.95, abs=0.05), "co-moves"),
        ([-4.0, -3.1, -2.0, -3.0, -5.0], 0.01, pytest.approx(-0.95, abs=0.05), "co-moves, inverted"),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 0.01, pytest.approx(0.1, abs=0.2), "does not co-move"),
        ([4.0, 3.1, 2.0, 3.0, 5.0], 9.0, pytest.approx(0.95, abs=0.05), "undecided: sharpness does not rise above"),
        ([4.0, 3.1, 2.0, 3.0, 5.0], math.inf, pytest.approx(0.95, abs=0.05), "undecided: sharpness does not rise"),
        ([2.0] * 5, 0.0, 0.0, "undecided: sharpness is the same at every alpha"),
        ([4.0, 3.1, 2.0, 3.0, 5.0], 0.0, pytest.approx(0.95, abs=0.05), "co-moves"),
    ],
)
def test_wording_follows_the_planted_curve(values, stderr, tau, verdict):
    found = co_movement(frame(layer_rows("x", values, stderr)), ERROR).iloc[0]
    assert found["tau"] == tau
    assert found["verdict"].startswith(verdict)


def test_three_points_decide_nothing():
    rows = layer_rows("x", [4.0, 3.1, 2.0, 3.0, 5.0])[:3]
    assert co_movement(frame(rows), ERROR.iloc[:3])["verdict"].item() == "not enough points to test"


def test_without_ood_sets_the_table_is_empty_but_has_its_columns():
    evals = pd.DataFrame({"alpha": [0.0], "split": ["id"], "measure": ["accuracy"], "value": [0.5]})
    found = co_movement(frame(layer_rows("x", [1.0] * 5)), ood_error(evals, []))
    assert (len(found), list(found.columns)) == (0, list(COLUMNS))


def test_a_paired_difference_is_narrower_than_an_unpaired_one():
    random = np.random.default_rng(0)
    reference = random.random(1000) < 0.6
    candidate = reference.copy()
    candidate[:30] = True
    found = difference(candidate, reference)
    changed = candidate.astype(float) - reference
    assert found.value == pytest.approx(changed.mean())
    low, high = found.interval
    normal = 2 * 1.96 * changed.std(ddof=1) / math.sqrt(1000)  # what it comes to with many images
    assert high - low == pytest.approx(normal, rel=0.2)
    assert high - low < 2 * 1.96 * math.sqrt(2 * 0.24 / 1000) / 2


def test_full_agreement_is_not_certainty():
    same = np.array([True] * 10)
    assert difference(same, same).interval[1] > 0.1


def test_gate_and_recommendation_quote_the_same_interval_of_the_same_change():
    """One pair of models, one number: whichever door it leaves by."""
    result = evaluated(planted(SUCCESS, n=300))
    quoted = result.recommend().versus["zero-shot"]
    for split in ("a", "mean OOD"):
        finding = OODRegression(-1.0, split=split)(result)
        assert finding.interval == pytest.approx([100 * end for end in quoted[split].interval])
        assert finding.score == pytest.approx(100 * quoted[split].value)


def test_the_interval_covers_the_planted_difference_as_often_as_it_says():
    random, hits = np.random.default_rng(1), 0
    for _ in range(400):
        found = [difference(random.random(300) < 0.7, random.random(300) < 0.6) for _ in range(2)]
        low, high = mean_difference(found).interval
        hits += low <= 0.1 <= high
    assert 0.92 < hits / 400 < 0.985


def planted(rates, n=2000, ood=("a", "b"), seed=0):
    """Correctness with a known rate per alpha, the same images at each alpha."""
    random = np.random.default_rng(seed)
    latent = {s: random.random(n) for s in ("id", *ood)}
    flip = {(alpha, s): random.random(n) for alpha in rates for s in latent}
    return {
        (alpha, s): np.where(flip[alpha, s] < 0.9, latent[s] < rate[s != "id"], random.random(n) < rate[s != "id"])
        for alpha, rate in rates.items()
        for s in latent
    }


SUCCESS = {0.0: (0.5, 0.5), 0.25: (0.7, 0.6), 0.5: (0.8, 0.7), 0.75: (0.85, 0.6), 1.0: (0.9, 0.5)}
FAILURE = {0.0: (0.5, 0.5), 0.25: (0.7, 0.45), 0.5: (0.8, 0.4), 0.75: (0.85, 0.3), 1.0: (0.9, 0.2)}


def test_a_planted_interior_optimum_is_found_and_beats_both_ends():
    found = recommend(planted(SUCCESS), "id", ["a", "b"])
    assert (found.alpha, found.beats_both_ends, found.ties) == (0.5, True, (0.5,))
    gain = found.versus["zero-shot"]["mean OOD"]
    assert gain.interval[0] < 0.2 < gain.interval[1]
    assert set(found.versus["fine-tuned"]) == {"id", "a", "b", "mean OOD"}


def test_a_planted_failure_recommends_zero_shot():
    found = recommend(planted(FAILURE), "id", ["a", "b"])
    assert (found.alpha, found.beats_both_ends) == (0.0, False)


def test_keeping_id_accuracy_moves_the_choice_towards_fine_tuned():
    assert recommend(planted(SUCCESS), "id", ["a", "b"], keep_id=-7).alpha == 0.75
    assert recommend(planted(SUCCESS), "id", ["a", "b"], keep_id=0).alpha == 1.0
    with pytest.raises(UsageError, match="keep_id is 1"):
        recommend(planted(SUCCESS), "id", ["a"], keep_id=1)
    with pytest.raises(UsageError, match="keep_id is nan"):
        recommend(planted(SUCCESS), "id", ["a"], keep_id=float("nan"))


def test_without_ood_the_choice_says_it_is_by_id():
    found = recommend({k: v for k, v in planted(SUCCESS).items() if k[1] == "id"}, "id", [])
    assert (found.alpha, found.chosen_by, found.beats_both_ends) == (1.0, "id", False)


def test_a_path_without_its_ends_has_no_verdict():
    middle = {k: v for k, v in planted(SUCCESS).items() if k[0] != 1.0}
    with pytest.raises(UsageError, match="lack an end point"):
        recommend(middle, "id", ["a"])


@pytest.mark.parametrize("names", list(permutations("xyz")))
def test_of_alphas_that_are_equally_good_the_smallest_is_chosen_whatever_the_order_of_the_sets(names):
    """Accuracies 11/14, 12/14 and 13/14, in another order at each alpha: their sums differ in the last bit."""
    chosen = halves(28, 0)[0]
    right = {0.0: (0, 0, 0), 0.3: (11, 12, 13), 0.6: (13, 11, 12), 1.0: (0, 0, 0)}
    correct = {(alpha, "id"): np.zeros(28, dtype=bool) for alpha in right}
    for alpha, counts in right.items():
        for name, count in zip("xyz", counts, strict=True):
            correct[alpha, name] = np.isin(np.arange(28), chosen[:count])
    assert recommend(correct, "id", names).alpha == 0.3
    tried = [Candidate(str(alpha), "uniform", Recipe.uniform(alpha), at(correct, alpha)) for alpha in right]
    assert Contest(tried, "id", names, 0).uniform.name == "0.3"
    sure = {place: Answers(found, found.astype(np.float32)) for place, found in correct.items()}
    table = label_free(sure, "id", names).query("chosen and estimator == 'AC'")
    assert list(table["alpha"]) == [0.3]


def test_the_quoted_gain_is_not_inflated_by_choosing():
    """Eleven alphas that are all the same: quoted on the half it was chosen on, the best would look better."""
    flat = {round(i / 10, 1): (0.5, 0.5) for i in range(11)}
    gains = []
    for seed in range(150):
        random = np.random.default_rng(seed)
        correct = {(alpha, s): random.random(100) < 0.5 for alpha in flat for s in ("id", "a")}
        found = recommend(correct, "id", ["a"], seed=seed)
        if 0 < found.alpha < 1:
            gains.append(found.versus["zero-shot"]["a"].value)
    assert abs(np.mean(gains)) < 3 * np.std(gains) / math.sqrt(len(gains))
