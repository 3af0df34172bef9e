"""Trace against the dense diagonal; the honesty of its standard error; where probes go."""

import numpy as np
import pytest
import torch
from nets import block, dense_hessian, made, objective

from sharpscope.curvature.point import Point
from sharpscope.curvature.trace import Trace
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
        assert layer == MODEL or len(found.samples) == found.draws


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
            assert layer == MODEL or estimate.draws == 30, layer
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
    from sharpscope.objective import Batch, Objective

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
    assert (found["a"].draws, found["b"].draws, point.counts["block_products"]) == (3, 3, 0)


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
