"""Trace against the dense diagonal; the honesty of its standard error; where probes go."""

import math

import numpy as np
import pytest
import torch
from nets import block, dense_hessian, made, objective
from torch import nn

from sharpscope.curvature.point import Point
from sharpscope.curvature.trace import Trace
from sharpscope.losses import cross_entropy
from sharpscope.network import network
from sharpscope.objective import Batch, Objective
from sharpscope.partition import container_names, partition
from sharpscope.table import MODEL


@pytest.fixture(scope="module")
def vit():
    net = made("vit")
    fn, weights, names = objective(net)
    layers = partition(names, containers=container_names(net))
    hessian, places = dense_hessian(net)
    truth = {layer: float(block(hessian, places, mine).trace()) for layer, mine in layers.layers.items()}
    return Point(fn, weights, names), layers, {**truth, MODEL: float(hessian.trace())}


def test_every_layers_trace_is_within_five_standard_errors_of_the_dense_diagonal(vit):
    point, layers, truth = vit
    for layer, found in Trace(most=400)(point, layers, seed=0):
        assert abs(found.value - truth[layer]) < 5 * found.stderr, layer
        assert layer == MODEL or len(found.samples) * len(point.objective.batches) == found.draws


def test_converged_layers_meet_their_target_and_others_say_so(vit):
    point, layers, _ = vit
    measure = Trace(most=30)
    found = dict(measure(point, layers, seed=1))
    floor = measure.absolute * sum(abs(e.value) for layer, e in found.items() if layer != MODEL)
    for layer, estimate in found.items():
        if estimate.converged:
            # The floor is fixed from the joint probes, so it may differ a little from the final sum.
            assert estimate.stderr <= max(0.05 * abs(estimate.value), 1.2 * floor), layer
        else:
            assert layer == MODEL or estimate.draws == 30 * len(point.objective.batches), layer
    assert not all(estimate.converged for estimate in found.values())


def test_standard_error_covers_the_truth_as_often_as_it_should(vit):
    """40 seeds: z = error / stderr of 25-draw estimates has a spread near 1 in every layer."""
    point, layers, truth = vit
    scores = {layer: [] for layer in truth}
    for seed in range(40):
        for layer, found in Trace(first=25, most=25)(point, layers, seed):
            scores[layer].append((found.value - truth[layer]) / found.stderr)
    for layer, z in scores.items():
        assert abs(np.mean(z)) < 4 / np.sqrt(40), layer
        assert 0.7 < np.std(z) < 1.5, layer


def test_diagonal_hessian_is_exact_after_the_first_draws_and_no_own_probes_are_spent():
    """For a diagonal Hessian every Rademacher probe gives the trace itself."""
    weights = {"a": torch.ones(4, dtype=torch.float64), "b": torch.ones(3, dtype=torch.float64)}
    scale = {"a": 3.0, "b": 1e-4}
    fn = Objective(
        lambda w, x: sum(scale[n] * t.pow(2).sum() / 2 for n, t in w.items()) * torch.ones(len(x)),
        lambda z, t: z.sum(),
        (Batch(torch.ones(2, 1), torch.zeros(2)),),
    )
    point = Point(fn, weights, ["a", "b"])
    found = dict(Trace()(point, partition(["a", "b"]), seed=0))
    assert found["a"].value == pytest.approx(12)
    assert found["b"].value == pytest.approx(3e-4)
    assert (found["a"].draws, found["b"].draws, point.counts["block_products"]) == (2, 2, 0)


def test_a_small_layer_beside_a_large_one_gets_probes_of_its_own(vit):
    point, layers, _ = vit
    before = point.counts["block_products"]
    dict(Trace(first=4, most=64)(point, layers, seed=0))
    assert point.counts["block_products"] > before


def test_draws_are_the_same_for_the_same_seed_and_differ_between_seeds(vit):
    point, layers, _ = vit
    first, again, other = (dict(Trace(most=8)(point, layers, seed)) for seed in (0, 0, 1))
    assert all(np.array_equal(first[layer].samples, again[layer].samples) for layer in first)
    assert first["head"].value != other["head"].value


def mlp_in_batches(size):
    """A small network on 48 examples of one distribution, its dense trace and its parameter names."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(48, 6, dtype=torch.float64), torch.randint(0, 3, (48,))
    fn = Objective(network(net.eval(), "net").forward, cross_entropy, tuple(map(Batch, x.split(size), y.split(size))))
    return fn, dict(net.named_parameters()), partition(list(dict(net.named_parameters())), containers=[""])


def test_probes_of_their_own_for_every_batch_have_a_fraction_of_the_variance(monkeypatch):
    """The same examples in one batch and in eight, and as many draws: values that agree, and a far smaller error."""
    monkeypatch.setattr("sharpscope.curvature.groups.LEAST", 48)
    found = []
    for size in (48, 6):
        fn, weights, layers = mlp_in_batches(size)
        found.append(dict(Trace(first=40, most=40)(Point(fn, weights, list(weights)), layers, seed=0)))
    one, eight = found
    for layer in one:
        assert abs(one[layer].value - eight[layer].value) < 4 * math.hypot(one[layer].stderr, eight[layer].stderr), (
            layer
        )
        assert eight[layer].stderr < 0.8 * one[layer].stderr, layer


def test_what_differs_between_batches_is_no_error_of_the_trace():
    """Diagonal Hessians, one a thousand times the other: each is exact, and so is their sum."""
    weights = {"a": torch.ones(5, dtype=torch.float64)}
    fn = Objective(
        lambda w, x: x * w["a"].pow(2).sum() / 2,
        lambda z, t: z.sum(),
        (Batch(torch.ones(2), torch.zeros(2)), Batch(1000 * torch.ones(2), torch.zeros(2))),
    )
    found = dict(Trace()(Point(fn, weights, ["a"]), partition(["a"]), seed=0))
    assert found["a"].value == pytest.approx(5 * 1001 / 2)
    assert found["a"].stderr == pytest.approx(0, abs=1e-9)


def test_the_stated_error_is_the_spread_of_the_draws_where_all_batches_are_alike():
    """Were all batches given one probe, draws would spread twice as far (four times the variance) as they say."""
    fn, weights, layers = mlp_in_batches(6)
    alike = Objective(fn.forward, fn.loss, fn.batches[:1] * 4)
    for layer, found in Trace(first=300, most=300)(Point(alike, weights, list(weights)), layers, seed=0):
        if layer != MODEL:  # whose stated error is a bound
            assert 0.7 < np.var(found.samples) / len(found.samples) / found.stderr**2 < 1.4, layer
