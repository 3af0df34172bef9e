"""Planted stragglers are found end to end through ``scan``; fifty trials of each kind are in benchmarks/results."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def plants():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import plants
    finally:
        sys.path.remove(str(BENCHMARKS))
    return plants


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rescaled", "shuffled", "noise"])
def test_planted_stragglers_are_found_and_named_first(plants, kind):
    trials = [plants.trial(kind, seed) for seed in range(100, 106)]
    assert sum(trial.found for trial in trials) >= 5
    assert sum(trial.first for trial in trials) >= 4


def test_a_rescaled_pair_computes_the_same_and_its_sharpness_follows_the_square_of_the_factor(plants):
    data, model = plants.task(0), plants.network(0).eval()
    before = plants.scan(model, model, data, [1], 0).layers.set_index("layer")["value"]
    again = plants.rescaled(plants.trained(model, data.narrow, 0, 1e-3), 2, 3.0)
    torch.testing.assert_close(again(data.broad[0]), model(data.broad[0]), rtol=1e-4, atol=1e-4)
    after = plants.scan(again, again, data, [1], 0).layers.set_index("layer")["value"]
    ratio = (after / before)[plants.names(model)]
    assert ratio.iloc[2] == pytest.approx(9, rel=0.3)
    assert ratio.iloc[[0, 1, 4, 5, 6]].tolist() == pytest.approx([1.0] * 5, rel=0.3)


def test_the_published_rates_are_those_of_the_trials_and_what_was_asked_for():
    """At least 90 % found and 80 % named first; of noise that holds from one and a half times the weights' length."""
    results = BENCHMARKS / "results"
    full = json.loads((results / "stragglers-power.json").read_text())
    noise = json.loads((results / "stragglers-power-noise.json").read_text())["strengths"]
    for found in (full, *noise.values()):
        assert found["trials"] == 50
        for kind, rates in found["rates"].items():
            own = [trial for trial in found["each"] if trial["kind"] == kind]
            assert rates["found"] == sum(trial["found"] for trial in own) / 50
            assert rates["first"] == sum(trial["first"] for trial in own) / 50
    asked = (full["rates"]["rescaled"], full["rates"]["shuffled"], noise["1.5"]["rates"]["noise"])
    assert all(rates["found"] >= 0.9 and rates["first"] >= 0.8 for rates in asked)
