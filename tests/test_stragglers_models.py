"""Correlation across models: against scipy and textbook formulas, exact p-values, planted and confounded layers."""

import math
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import sharpscope
from sharpscope.errors import UsageError
from sharpscope.result import ScanResult
from sharpscope.stragglers.permutation import Cohort, partial_correlation
from sharpscope.table import Cell, Row, cell_key

LAYERS = ("a", "b", "c", "d")


def model(sharpness, accuracy, *, distance=1.0, start=0.5, loss=0.3, alphas=(0.0, 1.0), ood=("x",), name="m"):
    """A scan of one fine-tuned model: sharpness by layer, mean OOD accuracy and its value at zero-shot."""
    cells = []
    for alpha in alphas:
        rows = [Row(alpha, layer, "id", "trace", float(v), 0.01, 4, True) for layer, v in sharpness.items()]
        cells.append(Cell(cell_key(alpha, "id", "trace"), tuple(rows)))
        for split in ("id", *ood):
            value = start if alpha == 0 else accuracy[split] if isinstance(accuracy, dict) else accuracy
            rows = [
                Row(alpha, "model", split, key, v, 0.0, 9, True) for key, v in (("accuracy", value), ("loss", loss))
            ]
            cells.append(Cell(cell_key(alpha, split, "evaluation"), tuple(rows)))
    layer = {"size": 4, "delta_norm": distance, "start_norm": 1.0}
    meta = {
        "splits": {"id": {"role": "id"}, **{s: {"role": "ood"} for s in ood}},
        "measures": {"trace": {}},
        "alphas": list(alphas),
        "layers": {"a": layer},
        "models": {"fine_tuned": {"name": name}},
        "seed": 0,
    }
    return ScanResult(cells, meta)


def cohort(count, seed=0, **columns):
    """Models whose layers are random but for the columns given: name -> numbers, or accuracy, distance, loss."""
    random = np.random.default_rng(seed)
    numbers = {name: columns.pop(name, np.exp(random.standard_normal(count))) for name in (*LAYERS, "model")}
    columns.setdefault("accuracy", random.random(count))
    return [
        model({k: v[i] for k, v in numbers.items()}, **{k: float(v[i]) for k, v in columns.items()}, name=f"run {i}")
        for i in range(count)
    ]


def hashed(mark):
    result = cohort(1)[0]
    result.meta["models"]["fine_tuned"] = {"name": "h", "hash": mark}
    return result


def found(results, target="OOD accuracy", given="", **knobs):
    table = sharpscope.across_models(results, at=1.0, measure="trace", **knobs)
    return table[(table["target"] == target) & (table["given"] == given)].set_index("predictor")


ORACLES = {"kendall": stats.kendalltau, "spearman": stats.spearmanr, "pearson": stats.pearsonr}


@pytest.mark.parametrize("statistic", ORACLES)
def test_partial_correlation_is_the_textbook_formula(statistic):
    x, y, z = np.random.default_rng(1).standard_normal((3, 12)) + np.linspace(0, 2, 12)
    xy, xz, yz = (ORACLES[statistic](*pair).statistic for pair in ((x, y), (x, z), (y, z)))
    expected = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
    value = partial_correlation(x[None], y[None], z[None], statistic).item()
    assert value == pytest.approx(expected, abs=1e-8)


def test_partial_pearson_given_two_is_the_correlation_of_regression_residuals():
    x, y, *z = np.random.default_rng(2).standard_normal((4, 15))
    design = np.column_stack([np.ones(15), *z])
    left = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (x, y)]
    value = partial_correlation(x[None], y[None], np.array(z), "pearson").item()
    assert value == pytest.approx(np.corrcoef(left)[0, 1], abs=1e-8)


@pytest.mark.parametrize("count", [5, 6, 7])
def test_p_values_of_few_models_are_exact(count):
    results = cohort(count, seed=3)
    table = found(results)
    accuracy = [r.evals.query("alpha == 1 and split == 'x' and measure == 'accuracy'")["value"].item() for r in results]
    sharpness = [r.layers.query("alpha == 1 and layer == 'a'")["value"].item() for r in results]
    exact = stats.kendalltau(sharpness, accuracy, method="exact")
    assert table.loc["a", "tau"] == pytest.approx(exact.statistic)
    assert table.loc["a", "p"] == pytest.approx(exact.pvalue)


def test_the_order_at_hand_counts_among_its_permutations_whatever_the_statistic():
    """So that no p-value of five models lies below one in 120."""
    random = np.random.default_rng(0)
    for _ in range(20):
        target = (30_000 + random.integers(0, 300, 5)) / 90_001  # accuracies within a third of a point
        near = target + 1e-5 * random.standard_normal((4, 5))  # the order at hand is the one of most correlation
        for statistic in ORACLES:
            test = Cohort(near, target, np.zeros((0, 5)), statistic, 0)
            assert (np.mean(np.abs(test.chance()) >= np.abs(test.observed())[:, None], axis=1) >= 1 / 120).all()


def test_any_iterable_of_results_will_do():
    results = cohort(6)
    tables = [sharpscope.across_models(found, at=1.0, measure="trace") for found in (results, iter(results))]
    pd.testing.assert_frame_equal(*tables)


def test_models_with_the_same_accuracies_on_other_sets_tie():
    sets = {"x": (0.1, 0.3, 0.2, 0.4, 0.5), "y": (0.2, 0.2, 0.3, 0.4, 0.6), "z": (0.3, 0.1, 0.1, 0.4, 0.7)}
    results = [
        model(
            {"a": math.exp(i), "model": 1.0},
            {"id": 0.5} | {k: v[i] for k, v in sets.items()},
            ood=tuple(sets),
            name=f"{i}",
        )
        for i in range(5)
    ]
    for target in ("OOD accuracy", "gain over zero-shot"):
        tau = stats.kendalltau(range(5), [0, 0, 0, 1, 2]).statistic
        assert found(results, target).loc["a", "tau"] == pytest.approx(tau)


def test_the_family_of_layers_is_that_of_the_largest_correlation():
    results = cohort(5, seed=4)
    table = found(results)
    columns = np.array(
        [[r.layers.query(f"alpha == 1 and layer == '{n}'")["value"].item() for r in results] for n in LAYERS]
    )
    accuracy = np.array(
        [r.evals.query("alpha == 1 and split == 'x' and measure == 'accuracy'")["value"].item() for r in results]
    )
    largest = [
        max(abs(stats.kendalltau(column, accuracy[list(order)]).statistic) for column in columns)
        for order in permutations(range(5))
    ]
    for name in LAYERS:
        assert table.loc[name, "p_family"] == pytest.approx(
            np.mean(np.array(largest) >= abs(table.loc[name, "tau"]) - 1e-9)
        )
    assert table.loc[["distance", "global sharpness", "held-out loss"], "p_family"].isna().all()


def test_a_planted_layer_is_seenbeside_baselines_that_are_not():
    error = np.random.default_rng(5).random(9)
    table = found(cohort(9, a=np.exp(3 * error), accuracy=1 - error, distance=np.arange(9.0) % 4 + 1))
    assert table.loc["a", ["tau", "p_family"]].tolist() == [-1.0, pytest.approx(0.0002)]
    assert table.loc["a", ["low", "high"]].tolist() == [-1.0, -1.0]
    assert (table.loc[["b", "c", "d"], "p_family"] > 0.05).all()
    assert set(table[table["kind"] == "baseline"].index) == {"distance", "global sharpness", "held-out loss"}


def test_a_relation_against_what_covariates_leave_to_chance_is_found():
    """Error bends with rate and group, the layer is linear in both, so chance alone leaves a partial tau off zero."""
    group, rate = np.repeat([0.0, 1.0], 8), np.tile(np.arange(4.0), 4)
    own, noise = np.random.default_rng(5).standard_normal((2, 16))
    error = -5 * group + 0.5 * rate**2 * (1 - group) + noise - 2 * own
    columns = {"a": np.exp(6 * group + rate + own), "accuracy": 0.9 - 0.02 * error, "distance": np.ones(16)}
    held = {"rate": rate, "group": group}
    table = found(cohort(16, **columns), given="rate + group + distance", covariates=held)
    assert table.loc["a", "chance"] < -0.1
    assert 0 < table.loc["a", "tau"] < 0.3  # by its distance from zero chance does as well in a third of the cases
    assert table.loc["a", "p"] < 0.03
    plain = found(cohort(16, **columns))
    assert (plain["chance"] == 0).all()


def test_a_layer_that_only_follows_the_learning_rate_is_unmasked_by_it():
    """Over 40 cohorts: accuracy and the layer both follow the learning rate and nothing else."""
    fired = {"plain": 0, "partial": 0}
    for seed in range(40):
        random, rate = np.random.default_rng(seed), np.linspace(-3, 0, 12)
        layer, accuracy = rate + 0.3 * random.standard_normal(12), -rate + 0.3 * random.standard_normal(12)
        for name, given in (("plain", np.empty((0, 12))), ("partial", rate[None])):
            test = Cohort(layer[None], accuracy, given, "kendall", seed)
            fired[name] += np.mean(np.abs(test.chance()) >= abs(test.observed().item())) < 0.05
    assert fired["plain"] == 40
    assert fired["partial"] <= 6


def test_the_permutation_test_of_unrelated_models_fires_as_often_as_it_says():
    random, fired = np.random.default_rng(6), 0
    for _ in range(150):
        predictors, target, given = (
            random.standard_normal((4, 8)),
            random.standard_normal(8),
            random.standard_normal((1, 8)),
        )
        test = Cohort(predictors, target, given, "spearman", 0)
        largest = np.abs(test.chance()).max(axis=0)
        fired += np.mean(largest >= np.abs(test.observed()).max()) <= 0.05
    assert fired <= stats.binom.ppf(0.995, 150, 0.05)


def test_the_bootstrap_interval_covers_the_population_correlation():
    random, hits = np.random.default_rng(7), 0
    expected = 2 / math.pi * math.asin(0.6)  # Kendall's tau of a bivariate normal
    for _ in range(40):
        x = random.standard_normal(30)
        y = 0.6 * x + 0.8 * random.standard_normal(30)
        low, high = Cohort(x[None], y, np.empty((0, 30)), "kendall", 0).interval()[:, 0]
        hits += low <= expected <= high
    assert hits >= 34


def test_the_gain_is_over_each_models_own_zero_shot():
    accuracy, start = np.linspace(0.5, 0.9, 6), np.array([0.1, 0.5, 0.2, 0.6, 0.3, 0.4])
    results = cohort(6, a=np.exp(accuracy - start), accuracy=accuracy, start=start)
    assert found(results, "gain over zero-shot").loc["a", "tau"] == 1.0
    assert found(results).loc["a", "tau"] == pytest.approx(stats.kendalltau(accuracy - start, accuracy).statistic)


def test_covariates_are_held_alone_and_together_where_the_models_suffice():
    results, rate = cohort(7), {"log learning rate": np.arange(7.0) % 3}
    table = sharpscope.across_models(results, at=1.0, measure="trace", covariates=rate)
    expected = {"", "log learning rate", "distance", "log learning rate + distance"}
    assert set(table["given"]) == expected
    assert "distance" not in set(table.loc[table["given"] == "distance", "predictor"])
    few = sharpscope.across_models(cohort(5), at=1.0, measure="trace", covariates={"rate": np.arange(5.0)})
    assert "rate + distance" not in set(few["given"])


def test_the_table_repeats_itself():
    tables = [sharpscope.across_models(cohort(8), at=1.0, measure="trace", seed=3) for _ in range(2)]
    pd.testing.assert_frame_equal(*tables)


BAD = {
    "one result twice": (
        lambda: [*cohort(5), *cohort(1)] + (same := cohort(1)) + same,
        {},
        r"model 6 \(run 0\) and model 7 \(run 0\) have the same fine-tuned weights",
    ),
    "one hash twice": (
        lambda: [*cohort(5), hashed("ab12"), hashed("cd34"), hashed("ab12")],
        {},
        r"model 5 \(h\) and model 7 \(h\) have the same fine-tuned weights",
    ),
    "folders": (lambda: ["runs/a"] * 5, {}, "'runs/a' is a str, no result of a scan\n  fix: .sharpscope.open"),
    "four models": (lambda: cohort(4), {}, "4 models are too few to correlate over"),
    "alpha": (
        lambda: cohort(5),
        {"at": 0.7},
        r"model 0 \(run 0\) has no 'trace' at alpha 0.7; it has alphas \[0.0, 1.0\]",
    ),
    "alpha in words": (lambda: cohort(5), {"at": "recommended"}, "at='recommended': needs an alpha, a number"),
    "measure": (lambda: cohort(5), {"measure": "lambda_max"}, "has no 'lambda_max' at alpha 1"),
    "no OOD": (lambda: [*cohort(5), model({"a": 1}, 0.5, ood=())], {}, "no labelled OOD set is common to all models"),
    "layers": (lambda: [*cohort(5), model({"z": 1}, 0.5)], {}, "the models have no layer in common"),
    "covariate": (
        lambda: cohort(5),
        {"covariates": {"rate": [1, 2]}},
        "covariate 'rate' is .* a finite number for each of 5",
    ),
    "NaN": (lambda: cohort(5), {"covariates": {"rate": [1, 2, 3, 4, math.nan]}}, "covariate 'rate' is"),
    "statistic": (lambda: cohort(5), {"statistic": "r"}, "statistic 'r' is unknown"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_correlated_is_refused_in_a_sentence(case):
    results, knobs, words = BAD[case]
    with pytest.raises(UsageError, match=words):
        sharpscope.across_models(results(), **{"at": 1.0, "measure": "trace", **knobs})
