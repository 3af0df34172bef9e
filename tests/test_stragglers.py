"""Correlation along a path: statistics against scipy, the null's size, whiskers' coverage, words, bad input."""

import io
import math

import numpy as np
import pandas as pd
import pytest
from planted import ALPHAS, STRAGGLER, planted
from scipy import stats

from sharpscope.errors import UsageError
from sharpscope.result import ScanResult
from sharpscope.saved import open_result
from sharpscope.stragglers.association import association
from sharpscope.stragglers.correlation import COLUMNS, NUMBERS, co_movement, ood_error
from sharpscope.stragglers.resampling import curve_draws, error_draws
from sharpscope.stragglers.surrogates import surrogates
from sharpscope.stragglers.wording import supported, wording
from sharpscope.table import Row, frame

PLACES = np.array(ALPHAS)
WIGGLY = np.array([0.4, 0.2, 0.5, 0.3, 0.45, 0.1, 0.6, 0.35, 0.55, 0.15, 0.5])  # no trend: many features to follow


def smooth(random, count, length, places=PLACES):
    """Independent Gaussian curves with a squared-exponential kernel, shape (count, n)."""
    kernel = np.exp(-0.5 * ((places[:, None] - places) / length) ** 2)
    values, vectors = np.linalg.eigh(kernel)
    return random.standard_normal((count, len(places))) @ (vectors * np.sqrt(np.maximum(values, 0))).T


def rows(curves, alphas=ALPHAS, stderr=0.0, converged=True, measure="trace"):
    return frame(
        Row(alpha, layer, "id", measure, float(value), stderr, 8, converged)
        for layer, curve in curves.items()
        for alpha, value in zip(alphas, curve, strict=True)
    )


def table(curves, error=WIGGLY, alphas=ALPHAS, **knobs):
    own = {key: knobs.pop(key) for key in ("stderr", "converged") if key in knobs}
    return co_movement(rows(curves, alphas, **own), pd.Series(error, index=alphas), **knobs).set_index("layer")


ORACLES = {"kendall": stats.kendalltau, "spearman": stats.spearmanr, "pearson": stats.pearsonr}


@pytest.mark.parametrize("statistic", ORACLES)
@pytest.mark.parametrize("ties", [False, True])
def test_every_correlation_is_that_of_scipy(statistic, ties):
    random = np.random.default_rng(0)
    first, second = random.standard_normal((4, 9)), random.standard_normal((3, 9))
    if ties:
        first, second = first.round(), second.round()
    expected = [[ORACLES[statistic](a, b).statistic for b in second] for a in first]
    np.testing.assert_allclose(association(first, second, statistic), expected, atol=1e-12)


@pytest.mark.parametrize("statistic", ORACLES)
def test_a_constant_correlates_zero_with_everything(statistic):
    constant = np.full((1, 7), 0.1)
    assert association(constant, np.arange(7.0)[None], statistic).item() == 0
    assert association(constant, constant, statistic).item() == 0


def test_an_unknown_correlation_is_refused_by_name():
    with pytest.raises(UsageError, match="'tau' is unknown"):
        table({"a": WIGGLY}, statistic="tau")


@pytest.mark.parametrize("alphas", [PLACES, np.array([0, 0.05, 0.1, 0.4, 0.9, 1.0])])
def test_surrogates_are_rearrangements_and_half_keep_the_trend(alphas):
    random = np.random.default_rng(1)
    curve = (alphas - 0.4) ** 2 + 0.001 * random.standard_normal(len(alphas))
    found = surrogates(alphas, curve, 400, random)
    np.testing.assert_array_equal(np.sort(found, axis=1), np.tile(np.sort(curve), (400, 1)))
    likeness = association(found, curve[None])[:, 0]
    assert (likeness[:200] > 0.8).all()
    assert (likeness[200:] < 0).any()


def test_surrogates_keep_ties():
    curve = np.array([0.2, 0.2, 0.3, 0.3, 0.3, 0.5, 0.2])
    found = surrogates(np.linspace(0, 1, 7), curve, 50, np.random.default_rng(0))
    assert all(sorted(one) == sorted(curve) for one in found)


def test_surrogates_of_a_smooth_curve_are_smooth():
    """Roughness (squared second differences) of surrogates is of the order of the curve's, not of a shuffle's."""
    random = np.random.default_rng(2)
    curve = smooth(random, 1, 0.3)[0]
    rough = [np.square(np.diff(c, 2)).sum() for c in (curve, *surrogates(PLACES, curve, 500, random))]
    shuffled = [np.square(np.diff(random.permutation(curve), 2)).sum() for _ in range(500)]
    assert np.median(rough[1:]) < 0.2 * np.median(shuffled)


@pytest.mark.slow
def test_family_wise_flags_fire_in_at_most_seven_percent_of_null_paths_where_naive_ones_fire_in_most():
    """40 layers, all unrelated to the error, three length scales; 1,000 paths each in benchmarks/stragglers.py."""
    random = np.random.default_rng(3)
    fired, naive, paths = 0, 0, 180
    for path in range(paths):
        length = (0.1, 0.3, 1.0)[path % 3]
        error, layers = smooth(random, 1, length)[0], smooth(random, 40, length)
        found = table({f"l{i}": np.exp(curve) for i, curve in enumerate(layers)}, error, seed=path)
        fired += found["verdict"].eq("co-moves beyond the null").any()
        naive += any(stats.kendalltau(curve, error, alternative="greater").pvalue < 0.05 for curve in layers)
    assert fired <= 0.07 * paths
    assert naive > 0.8 * paths


@pytest.mark.parametrize("shape", ["monotone", "valley"])
def test_layers_that_only_share_a_trend_with_the_error_are_never_beyond_the_null(shape):
    random = np.random.default_rng(4)
    fired = 0
    for path in range(30):
        middles = random.uniform(0.2, 0.8, 41) if shape == "valley" else np.full(41, -0.2)
        curves = [(PLACES - m) ** 2 + 0.005 * random.standard_normal(11) for m in middles]
        found = table({f"l{i}": np.exp(c) for i, c in enumerate(curves[1:])}, curves[0], seed=path)
        fired += (found["p_family"] <= 0.05).any()
    assert fired <= 2


def test_a_layer_that_follows_a_wiggly_error_is_beyond_the_null_and_the_others_are_not():
    random = np.random.default_rng(5)
    curves = {f"l{i}": np.exp(curve) for i, curve in enumerate(smooth(random, 39, 0.15))}
    found = table({**curves, "planted": np.exp(5 * WIGGLY)})
    assert found.index[0] == "planted"
    assert found["verdict"].eq("co-moves beyond the null").sum() == 1
    assert found.loc["planted", "p_family"] <= 0.005
    assert found.loc["planted", "q"] <= 0.1
    assert table({**curves, "planted": np.exp(-5 * WIGGLY)}).loc["planted", "verdict"] == "co-moves, inverted"


def test_p_values_follow_from_their_definition():
    random = np.random.default_rng(6)
    curves = {f"l{i}": np.exp(curve) for i, curve in enumerate(smooth(random, 6, 0.2))}
    found = table(curves, seed=7)
    null = surrogates(PLACES, WIGGLY, 999, np.random.default_rng([7, 0]))
    taus = {name: [stats.kendalltau(curve, one).statistic for one in null] for name, curve in curves.items()}
    largest = np.max(list(taus.values()), axis=0)
    for name, row in found.iterrows():
        assert row["p"] == pytest.approx((1 + np.sum(np.array(taus[name]) >= row["tau"] - 1e-9)) / 1000)
        assert row["p_family"] == pytest.approx((1 + np.sum(largest >= row["tau"] - 1e-9)) / 1000)
        assert row["null_high"] == pytest.approx(np.quantile(taus[name], 0.95))
    np.testing.assert_allclose(found["q"], stats.false_discovery_control(found["p"]))


def test_twenty_copies_of_a_layer_count_once():
    curve = smooth(np.random.default_rng(8), 1, 0.15)[0]
    one = table({"a": np.exp(curve)})
    many = table({f"a{i}": np.exp(curve + i) for i in range(20)})
    assert set(many["p_family"]) == set(one["p_family"])


def test_other_statistics_see_what_they_should():
    curves = {"a": np.exp(3 * WIGGLY), "b": np.exp(WIGGLY**3)}
    pearson = table(curves, statistic="pearson")["tau"]
    assert pearson["a"] == pytest.approx(1.0)
    assert pearson["b"] == pytest.approx(stats.pearsonr(WIGGLY**3, WIGGLY).statistic)
    assert table(curves, statistic="spearman")["tau"].tolist() == pytest.approx([1.0, 1.0])


def test_image_draws_have_the_paired_spread_of_binomials():
    random = np.random.default_rng(9)
    luck = random.random(400)
    correct = {(a, s): luck < rate for a, rate in ((0.0, 0.5), (1.0, 0.6)) for s in ("x", "y")}
    drawn = error_draws(correct, ["x", "y"], [0.0, 1.0], 4000, random)
    rates = [correct[a, "x"].mean() for a in (0.0, 1.0)]
    np.testing.assert_allclose(drawn.mean(axis=0), 1 - np.array(rates), atol=0.002)
    np.testing.assert_allclose(drawn.std(axis=0), [math.sqrt(r * (1 - r) / 800) for r in rates], rtol=0.06)
    gap = rates[1] - rates[0]  # nested: the same images are right, so the gap is a binomial of its own
    assert (drawn[:, 0] - drawn[:, 1]).std() == pytest.approx(math.sqrt(gap * (1 - gap) / 800), rel=0.06)


def test_probes_resampled_together_leave_a_shared_error_out_of_the_differences():
    random = np.random.default_rng(10)
    probes = random.standard_normal(30)
    values, stderr = np.array([1.0, 2.0, 3.0]), np.full(3, 0.5)
    drawn = curve_draws(values, stderr, [probes] * 3, 3000, random)
    np.testing.assert_allclose(drawn.std(axis=0), stderr, rtol=0.06)
    np.testing.assert_allclose(np.diff(drawn, axis=1), 1.0)
    alone = curve_draws(values, stderr, [None] * 3, 3000, random)
    assert np.diff(alone, axis=1).std() == pytest.approx(math.sqrt(2) * 0.5, rel=0.06)


def test_whiskers_cover_the_tau_of_the_true_curves_and_grow_with_the_errors():
    random = np.random.default_rng(11)
    hits, widths, true = 0, [], np.exp(np.sin(7 * PLACES))
    expected = stats.kendalltau(true, WIGGLY).statistic
    for _ in range(100):
        noisy = true + 0.15 * random.standard_normal(11)
        found = table({"a": noisy}, stderr=0.15).loc["a"]
        hits += found["tau_low"] <= expected <= found["tau_high"]
        widths.append(found["tau_high"] - found["tau_low"])
        assert found["tau_low"] <= found["tau"] <= found["tau_high"]
    assert hits >= 93
    assert np.mean(widths) > 3 * np.ptp(table({"a": true}, stderr=0.01).loc["a", ["tau_low", "tau_high"]].tolist())


SUPPORT = pd.DataFrame(
    [
        ("harms", "necessary", "ood mean", 3.0, True),
        ("harms alone", "sufficient", "ood mean", -3.0, True),
        ("helps", "necessary", "ood mean", -3.0, True),
        ("helps", "sufficient", "ood mean", 3.0, True),
        ("within noise", "necessary", "ood mean", 3.0, False),
        ("harms ID", "necessary", "id", 3.0, True),
    ],
    columns=["layer", "question", "split", "effect", "supported"],
)


def test_only_a_layer_beyond_the_null_whose_move_is_shown_to_harm_is_a_straggler():
    names = list(dict.fromkeys(SUPPORT["layer"]))
    found = table(dict.fromkeys(names, np.exp(WIGGLY)), supported=supported(SUPPORT))["verdict"]
    assert set(found[found == "straggler"].index) == {"harms", "harms alone"}
    assert set(found[found == "co-moves beyond the null"].index) == {"helps", "within noise", "harms ID"}
    assert supported(None) == supported(SUPPORT.iloc[:0]) == set()


def test_a_layer_that_did_not_move_is_never_flagged_and_takes_no_part_in_the_test():
    curves = {"frozen": np.exp(WIGGLY), "moved": np.exp(np.roll(WIGGLY, 2))}
    found = table(curves, supported={"frozen"}, unmoved={"frozen"})
    assert found.loc["frozen", "verdict"] == "undecided: the layer did not move"
    assert math.isnan(found.loc["frozen", "p"])
    alone = table({"moved": curves["moved"]})
    assert found.loc["moved", "p_family"] == alone.loc["moved", "p_family"]


def test_a_scan_takes_a_layer_with_equal_weights_at_both_ends_as_one_that_did_not_move():
    result = planted(studied=True)
    meta = {**result.meta, "layers": {**result.meta["layers"]}}
    meta["layers"][STRAGGLER] = {**meta["layers"][STRAGGLER], "delta_norm": 0.0}
    for found, unmoved in ((result, False), (ScanResult(result.cells, meta), True)):
        verdicts = found.stragglers.query("layer == @STRAGGLER")["verdict"]
        assert (verdicts == "undecided: the layer did not move").eq(unmoved).all()


@pytest.mark.parametrize(
    ("tau", "p_family", "backed", "words"),
    [
        (0.9, 0.05, True, "straggler"),
        (0.9, 0.05, False, "co-moves beyond the null"),
        (0.9, 0.051, True, "co-moves"),
        (0.9, math.nan, True, "co-moves"),
        (0.49, 0.01, True, "does not co-move"),
        (-0.5, 1.0, True, "co-moves, inverted"),
    ],
)
def test_the_ladder_has_no_short_cut(tau, p_family, backed, words):
    assert wording(tau, p_family, backed) == words


BAD = {
    "constant": ({"a": np.full(11, 3.0)}, {}, "undecided: sharpness is the same at every alpha"),
    "unconverged": ({"a": np.exp(WIGGLY)}, {"converged": False}, "undecided: sharpness converged nowhere"),
    "noise": ({"a": np.exp(WIGGLY)}, {"stderr": 5.0}, "undecided: sharpness does not rise above its own error"),
    "error unknown": ({"a": np.exp(WIGGLY)}, {"stderr": math.inf}, "undecided: sharpness does not rise above its own"),
    "constant OOD error": ({"a": np.exp(WIGGLY)}, {"error": np.full(11, 0.25)}, "undecided: OOD error is the same at"),
    "three alphas": ({"a": [3, 1, 2]}, {"error": [3, 1, 2], "alphas": [0, 0.5, 1]}, "not enough points to test"),
    "four alphas": ({"a": [3, 1, 4, 2]}, {"error": [3, 1, 4, 2], "alphas": [0, 0.1, 0.5, 1]}, "not enough points to"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_tested_is_said_and_never_flagged(case):
    curves, knobs, words = BAD[case]
    found = table(curves, **knobs, supported={"a"}).loc["a"]
    assert found["verdict"].startswith(words)
    assert found[list(NUMBERS)].isna().all()


def test_untestable_layers_take_no_part_in_the_family():
    curves = {"a": np.exp(WIGGLY), "b": np.exp(smooth(np.random.default_rng(12), 1, 0.2)[0])}
    alone, beside = table(curves), table({**curves, "flat": np.full(11, 2.0)})
    pd.testing.assert_frame_equal(beside.loc[["a", "b"]], alone.loc[["a", "b"]])


def test_rows_without_a_number_are_left_out_and_too_few_are_not_enough():
    layers = rows({"a": np.exp(WIGGLY), "b": np.exp(WIGGLY)})
    text = layers.to_csv(index=False)
    read = pd.read_csv(io.StringIO(text))
    read.loc[(read["layer"] == "a") & (read["alpha"] == 0.3), "value"] = math.nan
    read.loc[(read["layer"] == "b") & (read["alpha"] > 0.35), "value"] = math.nan
    found = co_movement(read, pd.Series(WIGGLY, index=ALPHAS)).set_index("layer")
    assert found.loc["a", ["alphas", "verdict"]].tolist() == [10, "co-moves beyond the null"]
    assert found.loc["b", ["alphas", "verdict"]].tolist() == [4, "not enough points to test"]


def test_ties_are_counted_as_kendalls_tau_b_does():
    error = np.array([0.2, 0.2, 0.3, 0.3, 0.3, 0.5, 0.2, 0.4, 0.4, 0.2, 0.3])
    curve = np.array([1, 1, 2, 3, 3, 4, 1, 2, 3, 2, 2.0])
    assert table({"a": curve}, error).loc["a", "tau"] == pytest.approx(stats.kendalltau(curve, error).statistic)


def evaluation(values):
    return pd.DataFrame(
        [(a, s, "accuracy", v) for (a, s), v in values.items()], columns=["alpha", "split", "measure", "value"]
    )


def test_sets_without_labels_are_left_out_of_the_mean_error():
    evals = evaluation({(0.0, "x"): 0.5, (1.0, "x"): 0.25, (0.0, "id"): 0.9, (1.0, "id"): 0.9})
    assert ood_error(evals, ["x", "unlabelled"]).to_dict() == {0.0: 0.5, 1.0: 0.75}
    assert ood_error(evals, ["unlabelled"]).empty
    assert co_movement(rows({"a": WIGGLY}), ood_error(evals, ["unlabelled"])).columns.tolist() == list(COLUMNS)


def test_the_mean_is_over_the_same_sets_at_every_alpha():
    evals = evaluation({(0.0, "x"): 0.5, (1.0, "x"): 0.25, (0.0, "y"): 0.3, (1.0, "y"): math.nan})
    assert ood_error(evals, ["x", "y"]).to_dict() == {0.0: pytest.approx(0.6)}


def test_the_same_accuracies_on_other_sets_are_the_same_error():
    found = [(0.0, "x", 0.1), (0.0, "y", 0.2), (0.0, "z", 0.3), (1.0, "x", 0.3), (1.0, "y", 0.2), (1.0, "z", 0.1)]
    evals = frame(Row(alpha, "model", split, "accuracy", value, 0.0, 9, True) for alpha, split, value in found)
    assert ood_error(evals, ("x", "y", "z")).nunique() == 1


def test_a_layer_that_follows_a_single_valley_co_moves_and_is_not_called_more():
    found = planted().stragglers
    assert (found["layer"].iloc[0], found["verdict"].iloc[0]) == (STRAGGLER, "co-moves")
    assert not found["verdict"].isin(["co-moves beyond the null", "straggler"]).any()


def test_the_table_is_the_same_whatever_the_order_of_the_rows_and_after_save_and_open(tmp_path):
    result = planted()
    again = open_result(result.save(tmp_path))
    pd.testing.assert_frame_equal(again.stragglers, result.stragglers)
    text = (tmp_path / "stragglers.csv").read_text()
    result.save(tmp_path)
    assert (tmp_path / "stragglers.csv").read_text() == text
    one, other = (
        co_movement(layers, pd.Series(WIGGLY, index=ALPHAS)).set_index(["layer", "measure"])
        for layers in (result.layers, result.layers.iloc[::-1])
    )
    pd.testing.assert_frame_equal(other.loc[one.index], one)
