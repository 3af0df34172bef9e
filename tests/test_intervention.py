"""Moving one layer: against loops of whole models, planted layers with known truth, and laws."""

import copy
from itertools import product

import numpy as np
import pytest
import torch
from nets import fine_tuned, images, made
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import sharpscope
from sharpscope.data import as_split
from sharpscope.errors import MeasurementError, UsageError
from sharpscope.intervention import Interventions
from sharpscope.moves import Move, moved
from sharpscope.plan import Plan
from sharpscope.preparation import prepare
from sharpscope.stragglers.effects import effects
from sharpscope.stragglers.standing import NECESSARY, SUFFICIENT, Base, Standing, moved_key
from sharpscope.table import Cell
from sharpscope.tree import norm


def loader(count, seed, dtype=torch.float64):
    return DataLoader(TensorDataset(*images(count, seed, dtype=dtype)), batch_size=7)


ID, OOD = loader(30, 2), {"near": loader(24, 3), "far": loader(40, 4)}


def scanned(a, b, out=None, chosen=None, **settings):
    settings = {"measures": [], "alphas": 3, "ood": OOD, **settings}
    chosen = chosen or Interventions(limit=20, draws=2)
    return sharpscope.scan(a, b, ID, interventions=chosen, out=out, progress=False, **settings)


def pair(kind="vit"):
    a = made(kind)
    return a, fine_tuned(a, kind, step=0.4)


def hybrid(base, other, names):
    """Return a copy of the base with the named tensors of the other; made without sharpscope."""
    net = copy.deepcopy(base)
    net.load_state_dict({k: other.state_dict()[k] if k in names else v for k, v in base.state_dict().items()})
    return net


def answers(net, name, data):
    batches = list(as_split(data, name).sample(20, 0, 64))
    x, y = torch.cat([b.inputs for b in batches]), torch.cat([b.targets for b in batches])
    with torch.no_grad():
        return net(x), y


@pytest.mark.parametrize("kind", ["vit", "mlp", "conv"])
def test_every_effect_is_that_of_whole_models_put_together(kind):
    a, b = pair(kind)
    result = scanned(a, b)
    partition = sharpscope.layers(a).layers
    buffers = [name for name, _ in a.named_buffers()]
    for question, base, other in ((NECESSARY, b, a), (SUFFICIENT, a, b)):
        for layer, names in partition.items():
            prefix = names[0].rpartition(".")[0]
            mine = {*names, *(n for n in buffers if n.rpartition(".")[0] == prefix)}
            moved_net, gaps = hybrid(base, other, mine), {}
            for split, data in (("id", ID), *OOD.items()):
                (before, y), (after, _) = answers(base, split, data), answers(moved_net, split, data)
                gaps[split] = ((after.argmax(1) == y).double() - (before.argmax(1) == y).double()).mean().item()
            gaps["ood mean"] = (gaps["near"] + gaps["far"]) / 2
            rows = result.interventions.query("layer == @layer and question == @question").set_index("split")
            for split, gap in gaps.items():
                assert rows.loc[split, "effect"] == pytest.approx(100 * gap, abs=1e-9), (layer, question, split)


def test_the_answers_are_kept_image_by_image():
    a, b = pair()
    result = scanned(a, b)
    after, y = answers(hybrid(b, a, sharpscope.layers(a).layers["head"]), "far", OOD["far"])
    cell = next(c for c in result.cells if c.key == "1.0|far|moved/20/necessary/layer/head")
    assert (cell.arrays["correct"] == (after.argmax(1) == y).numpy()).all()
    np.testing.assert_allclose(cell.arrays["loss"], cross_entropy(after, y, reduction="none").numpy(), rtol=1e-5)
    np.testing.assert_allclose(cell.arrays["confidence"], after.softmax(1).amax(1).numpy(), rtol=1e-5)
    assert set(result.evals["measure"]) == {"accuracy", "loss", "confidence", "calibration_error"}
    assert len(result.correct) == 3 * 3


def job_of(a, b):
    plan = Plan((0.0, 1.0), (), 0, 256, 64, "block")
    return prepare((a, b), as_split(ID, "id"), [], as_split(ID, "id"), plan, None, None)


@pytest.mark.parametrize("base", [Base(NECESSARY, 1.0), Base(SUFFICIENT, 0.0), Base(NECESSARY, 0.25)])
def test_a_random_control_goes_as_far_as_the_move_tensor_by_tensor_and_each_its_own_way(base):
    a, b = pair("conv")
    job = job_of(a, b)
    here, there = job.weights(base.alpha), job.weights(base.target)
    for layer, names in job.layers.layers.items():
        draws = [moved(job, base, here, Move(f"control {i}", layer, (layer,)), 0) for i in range(2)]
        for draw in draws:
            assert draw.keys() == set(names), "running statistics stay"
            for name in names:
                walked, real = norm({"": draw[name] - here[name]}), norm({"": there[name] - here[name]})
                assert walked == pytest.approx(real, rel=1e-9)
                assert not torch.allclose(draw[name], there[name])
        assert not torch.equal(draws[0][names[0]], draws[1][names[0]])
        again = moved(job, base, here, Move("control 1", layer, (layer,)), 0)
        assert all(torch.equal(tensor, draws[1][name]) for name, tensor in again.items())


def test_a_layer_that_did_not_move_has_an_effect_of_zero_and_is_never_supported():
    a, b = pair()
    b = hybrid(b, a, sharpscope.layers(a).layers["blocks.1"])
    rows = scanned(a, b).interventions.query("layer == 'blocks.1'")
    assert len(rows) == 2 * 4
    assert (rows[["effect", "control"]] == 0).all(axis=None)
    assert not rows["supported"].any()
    assert (rows["low"] < 0).all()


def problem(seed=0):
    """Zero-shot: a trained net. Fine-tuned: the same with the second layer spoiled by noise and the first unmoved."""
    torch.manual_seed(seed)
    x = torch.randn(2300, 1, 4, 4)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    y = teacher(x).argmax(1).detach()
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        cross_entropy(net(x[:300]), y[:300]).backward()
        optimizer.step()
    return net.eval(), [
        DataLoader(TensorDataset(x[i : i + 1000], y[i : i + 1000]), batch_size=500) for i in (300, 1300)
    ]


def planted(seed=0, draws=5):
    net, (id_, far) = problem(seed)
    tuned = copy.deepcopy(net)
    with torch.no_grad():
        tuned[3].weight.add_(1.0 * torch.randn_like(tuned[3].weight))  # noise in one layer's delta
        tuned[1].weight.add_(0.02 * torch.randn_like(tuned[1].weight))
        tuned[5].weight.add_(0.02 * torch.randn_like(tuned[5].weight))
    return sharpscope.scan(
        net,
        tuned,
        id_,
        ood={"far": far},
        alphas=3,
        measures=[],
        progress=False,
        interventions=Interventions(limit=None, draws=draws),
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_layer_whose_delta_is_noise_is_found_harmful_and_no_other_is(seed):
    rows = planted(seed).interventions.query("split == 'ood mean'")
    back = rows.query("question == 'necessary'").set_index("layer")
    assert list(back.index[back["supported"]]) == ["3"]
    assert back.loc["3", "low"] > 0
    alone = rows.query("question == 'sufficient'").set_index("layer")
    assert alone.loc["3", "high"] < 0, "it does the damage alone"
    # From zero-shot its delta is as good as any random direction as long: a true noise delta cannot beat its control.
    assert not alone.loc["3", "supported"]


def simulated(random, real, controls):
    """The OOD row of a move with planted rates of right answers, 0.6 at the base, over 400 images of two sets."""
    cells, rates = [], {"base": 0.6, "layer": real} | {f"control {i}": rate for i, rate in enumerate(controls)}
    for split in ("id", "a", "b"):
        latent = random.random(400)
        for what, rate in rates.items():
            luck = np.where(random.random(400) < 0.5, latent, random.random(400))
            key = moved_key(Base(NECESSARY, 1.0), split, None, what, "" if what == "base" else "x")
            cells.append(Cell(key, (), {"correct": luck < rate}))
    settings = {"limit": None, "bases": [[NECESSARY, 1.0]]}
    return effects(cells, settings, ["x"], "id", ["a", "b"]).set_index("split").loc["ood mean"]


def test_the_intervals_of_effect_and_control_cover_the_truth_as_often_as_they_say():
    random = np.random.default_rng(0)
    rows = [simulated(random, 0.7, 3 * [0.55]) for _ in range(300)]
    assert 0.91 < np.mean([row["low"] <= 10 <= row["high"] for row in rows]) < 0.985
    rows = [simulated(random, 0.7, 0.55 + 0.02 * random.standard_normal(3)) for _ in range(150)]
    assert 0.93 < np.mean([row["control_low"] <= -5 <= row["control_high"] for row in rows])  # noqa: SIM300


def skewed(random, count):
    """Rates of right answers after random moves: most do little, some ruin the model."""
    return np.maximum(0.62 - 0.03 * random.lognormal(0, 1.2, count), 0.1)


def test_a_move_that_is_one_random_direction_more_is_seldom_supported_however_skewed_they_are():
    random = np.random.default_rng(1)
    rows = [simulated(random, rates[0], rates[1:]) for rates in (skewed(random, 40) for _ in range(400))]
    assert np.mean([row["low"] > 0 or row["high"] < 0 for row in rows]) > 0.25, "the effect alone is real"
    # At most 1 in 40 on either side; the binomial's .999 quantile at .05 of 400 is 35.
    assert sum(row["supported"] for row in rows) <= 35
    assert sum(row["supported"] and row["effect"] < 0 for row in rows) > 0, "the test can fail"


def test_a_gain_that_few_random_moves_have_is_supported_however_much_others_harm():
    random = np.random.default_rng(2)
    rows = [simulated(random, 0.7, skewed(random, 39)) for _ in range(30)]
    assert np.mean([row["supported"] for row in rows]) > 0.9
    # A single random move is within 2 standard deviations of their mean at a gain of 10 points: skew, not doubt.
    assert 0.62 - 0.03 * np.exp(0.72) + 2 * 0.03 * np.exp(0.72) * np.sqrt(np.expm1(1.44)) > 0.7


@pytest.mark.parametrize(("as_far", "draws", "word"), [(0, 39, True), (1, 39, False), (1, 79, True), (0, 38, False)])
def test_at_most_one_move_in_forty_may_go_as_far_the_real_one_counted(as_far, draws, word):
    random = np.random.default_rng(3)
    row = simulated(random, 0.8, [0.95] * as_far + [0.6] * (draws - as_far))
    assert (row["as_far"], row["draws"], row["supported"]) == (as_far, draws, word)
    assert Standing(True, as_far, draws).supported == word
    assert not Standing(False, as_far, draws).supported, "off its control, not off zero"


def test_moves_that_tie_go_as_far():
    cells, right = [], np.arange(70) < 30
    tried = [("base", ""), ("layer", "x"), *((f"control {draw}", "x") for draw in range(39))]
    for split, (what, layer) in product(("id", *"abcdefghij"), tried):
        key = moved_key(Base(NECESSARY, 1.0), split, None, what, layer)
        cells.append(Cell(key, (), {"correct": right if what == "base" else np.arange(70) < 60}))
    settings = {"limit": None, "bases": [[NECESSARY, 1.0]]}
    rows = effects(cells, settings, ["x"], "id", list("abcdefghij")).set_index("split")
    assert (rows["low"] > 0).all()
    assert (rows["as_far"] == 39).all()


def test_more_random_moves_are_made_until_too_many_go_as_far_and_no_verdict_depends_on_stopping():
    result, whole = planted(0, draws=2), planted(0, draws=39)
    keys = ["layer", "question", "split"]
    table, full = (r.interventions.set_index(keys) for r in (result, whole))
    targets = table.index.get_level_values("split") != "far"
    assert (table["supported"] == full["supported"])[targets].all()
    assert set(full["draws"]) == {39}
    seen = table["draws"]
    assert {2, 39} <= set(seen) <= {2, 8, 32, 39}
    held = (table["low"] > 0) | (table["high"] < 0)
    assert (seen[~held & targets] == 2).all(), "a move that changes nothing needs no more controls"
    assert (seen[(table["as_far"] == 0) & held & targets] == 39).all()
    assert (table["as_far"][(seen < 39) & held & targets] > 0).all()
    assert result.interventions.equals(sharpscope.ScanResult(result.cells, result.meta).interventions)


def test_moving_all_layers_but_one_and_cumulative_moves_are_whole_models_too():
    a, b = pair()
    found = scanned(a, b, chosen=Interventions(limit=20, draws=2, cumulative=True)).cumulative
    partition = sharpscope.layers(a).layers
    order = list(partition)
    assert set(found["layers"]) == set(range(2, len(order)))
    for row in found.query("split == 'far' and question == 'necessary'").itertuples():
        place = order.index(row.layer)
        mine = order[: place + 1] if row.end == "first" else order[place:]
        assert len(mine) == row.layers
        net = hybrid(b, a, {n for layer in mine for n in partition[layer]})
        (after, y), (before, _) = answers(net, "far", OOD["far"]), answers(b, "far", OOD["far"])
        gap = ((after.argmax(1) == y).double() - (before.argmax(1) == y).double()).mean()
        assert row.effect == pytest.approx(100 * float(gap), abs=1e-9)


def test_the_recommended_alpha_can_be_the_base():
    net, (id_, far) = problem()
    tuned = copy.deepcopy(net)
    with torch.no_grad():
        tuned[3].weight.add_(2 * torch.randn_like(tuned[3].weight))
        net[3].weight.add_(-0.5 * (tuned[3].weight - net[3].weight))  # the best weights lie between the ends
    result = sharpscope.scan(
        net, tuned, id_, ood={"far": far}, alphas=7, measures=[], progress=False,
        interventions=Interventions(recommended=True, draws=2),
    )  # fmt: skip
    alpha = result.recommend().alpha
    assert 0 < alpha < 1
    assert set(result.interventions["base"]) == {"fine-tuned", "zero-shot", f"alpha {alpha:g}"}
    middle = result.interventions.query("alpha == @alpha")
    assert set(middle["question"]) == {NECESSARY}


def test_a_scan_with_interventions_cut_anywhere_ends_with_the_same_bytes(tmp_path):
    import sharpscope.journal as journal

    a, b = pair("mlp")
    scanned(a, b, out=tmp_path / "whole")
    whole = (tmp_path / "whole" / "cells.jsonl").read_bytes()

    class Cut(Exception):
        pass

    append, left = journal.Journal.append, [0]

    def cut(self, cell):
        if left[0] == 0:
            raise Cut
        left[0] -= 1
        append(self, cell)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal.Journal, "append", cut)
        for _ in range(100):
            left[0] = 7
            try:
                scanned(a, b, out=tmp_path / "cut")
                break
            except Cut:
                continue
    assert (tmp_path / "cut" / "cells.jsonl").read_bytes() == whole
    assert sharpscope.open(tmp_path / "cut").interventions.equals(sharpscope.open(tmp_path / "whole").interventions)


def test_interventions_are_added_to_a_finished_scan_and_other_settings_are_other_cells(tmp_path):
    a, b = pair("mlp")
    plain = sharpscope.scan(a, b, ID, ood=OOD, alphas=3, measures=[], interventions=False, out=tmp_path, progress=False)
    assert plain.interventions.empty
    assert list(plain.interventions.columns) == list(scanned(a, b).interventions.columns)
    added = scanned(a, b, out=tmp_path)
    assert added.cells[: len(plain.cells)] == plain.cells
    assert added.interventions.equals(scanned(a, b).interventions)
    fewer = scanned(a, b, out=tmp_path, chosen=Interventions(limit=10, draws=2))
    assert set(fewer.interventions.query("split == 'id'")["n"]) == {10}
    assert fewer == sharpscope.open(tmp_path)


def test_by_default_they_run_where_there_are_ood_sets_and_they_cost_less_than_the_scan():
    a, b = pair("mlp")

    def bases(**settings):
        result = sharpscope.scan(a, b, ID, alphas=2, progress=False, **settings)
        return set(result.interventions["base"])

    assert bases(measures=["trace"], ood=OOD) == {"fine-tuned", "zero-shot"}
    assert bases(measures=["trace"]) == set()
    assert bases(measures=[], ood=OOD) == set()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Interventions(draws=1), "draws=1: the spread of random moves needs 2"),
        (lambda: Interventions(most=38), "most=38: of fewer than 39 random moves even the farthest"),
        (lambda: Interventions(limit=1), r"limit=1: needs a whole number, 2 or more\n  fix: .* an interval needs 2"),
        (
            lambda: scanned(*pair("mlp"), chosen=Interventions(recommended=True), alphas=[0.0, 0.5]),
            r"alphas \[0.0, 0.5\] lack an end point",
        ),
    ],
)
def test_interventions_that_cannot_be_meant_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_a_move_that_overflows_is_named():
    a, b = (nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 3)).double().eval() for _ in range(2))
    with torch.no_grad():
        a[2].weight.mul_(1e25)
        b[1].weight.mul_(1e25)
    with pytest.raises(MeasurementError, match="fine-tuned, '2' moved to zero-shot on 'id'"):
        scanned(a, b, alphas=[0.0])


def test_running_statistics_alone_support_nothing():
    """No random move is as long as nothing: any effect would be beyond all of them."""
    torch.manual_seed(0)
    a = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).eval()
    b = copy.deepcopy(a)
    b[1].running_mean.add_(2 * torch.randn(8))
    x = torch.randn(200, 6)
    data = DataLoader(TensorDataset(x, b(x).argmax(1)), batch_size=50)
    found = sharpscope.scan(a, b, data, alphas=2, measures=[], interventions=True, progress=False).interventions
    rows = found[found["layer"] == "1"]
    assert (rows["low"] * rows["high"] > 0).all()
    assert (rows["draws"] >= 39).all()
    assert not rows["supported"].any()
