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
@pytest.mark.parametrize("kind", ["rescaled", "shuffled", "harmful noise"])
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


def test_a_planted_layers_true_gain_is_that_of_whole_models_put_together(plants):
    data, start = plants.task(1, 300), plants.network(1).eval()
    end = plants.noisy(plants.trained(start, data.narrow, 5, 3e-3), start, 2, 1)
    state = {**end.state_dict(), **{k: v for k, v in start.state_dict().items() if k.startswith("4.")}}
    back = plants.network(0).eval()
    back.load_state_dict(state)
    gaps = [
        (back(x).argmax(1) == y).double().mean() - (end(x).argmax(1) == y).double().mean()
        for x, y in data.truth.values()
    ]
    assert plants.true_gains(start, end, data)[2] == pytest.approx(50 * float(sum(gaps)), abs=1e-9)
    assert abs(float(sum(gaps))) > 0.01


def test_more_images_are_the_same_task_with_more_images(plants):
    few, many = plants.task(3, 300), plants.task(3, 1000)
    for name, (x, y) in few.ood.items():
        assert len(y) == 300
        assert torch.equal(many.ood[name][0][:300], x)
        assert torch.equal(many.truth[name][0], few.truth[name][0])
    assert torch.equal(few.narrow[0], many.narrow[0])


def published(name):
    return json.loads((BENCHMARKS / "results" / f"stragglers-{name}.json").read_text())


@pytest.mark.parametrize("name", ["power", "nothing"])
def test_the_published_rates_are_those_of_the_trials(name):
    found = published(name)
    for row in found["rows"]:
        assert len(row["each"]) == found["trials"] == 50
        assert [trial["seed"] for trial in row["each"]] == list(range(found["first_seed"], found["first_seed"] + 50))
        for count in ("found", "first", "others_flagged", "others_wrong"):
            assert row[count] == sum(trial[count] for trial in row["each"]) / 50


def test_the_published_rates_reach_ninety_per_cent_found_and_eighty_named_first():
    rows = {(row["kind"], row["images"]): row for row in published("power")["rows"] if row["strength"] == 1}
    asked = [rows["rescaled", 1000], rows["shuffled", 1000], rows["harmful noise", 3000]]
    assert all(row["found"] >= 0.9 and row["first"] >= 0.8 for row in asked)


def test_noise_that_harms_is_longer_only_where_its_first_length_does_no_harm():
    rows = {(row["kind"], row["strength"], row["images"]): row for row in published("power")["rows"]}
    for raised, plain in zip(rows["harmful noise", 1, 1000]["each"], rows["noise", 1, 1000]["each"], strict=True):
        assert raised["gain"] >= 3
        assert (raised["length"] > 1) == (plain["gain"] < 3)
        assert raised["found"] == plain["found"] or raised["length"] > 1


def test_where_every_delta_is_noise_flags_are_as_rare_as_they_are_said_to_be():
    random = next(row for row in published("nothing")["rows"] if row["kind"] == "random")
    assert random["off_zero"] > 5, "of seven layers: the moves do change accuracy"
    assert random["others_flagged"] / 7 <= 0.05
