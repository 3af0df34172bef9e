"""m-sharpness against closed forms, brute force over the ball, and plain re-computation."""

import math

import numpy as np
import pytest
import torch
from nets import block, dense_hessian, made, objective

from sharpscope import tree
from sharpscope.curvature.point import Point
from sharpscope.errors import UsageError
from sharpscope.objective import Batch, Objective
from sharpscope.partition import container_names, partition
from sharpscope.ball import Ball
from sharpscope.perturbation import AverageMSharpness, MSharpness, groups
from sharpscope.table import MODEL


def quadratic(curvatures, slopes):
    """L(w) = mean over examples of x_i * (1/2 w'Dw + b'w); w starts at 1."""
    d, b = torch.tensor(curvatures, dtype=torch.float64), torch.tensor(slopes, dtype=torch.float64)

    def forward(weights, x):
        w = torch.cat(list(weights.values()))
        return x[:, 0] * ((d * w * w).sum() / 2 + (b * w).sum())

    x = torch.tensor([[1.0], [2.0], [0.5], [4.0]], dtype=torch.float64)
    fn = Objective(forward, lambda z, t: z.sum(), (Batch(x[:3], torch.zeros(3)), Batch(x[3:], torch.zeros(1))))
    half = len(curvatures) // 2
    ones = torch.ones(len(curvatures), dtype=torch.float64)
    return Point(fn, {"a": ones[:half], "b": ones[half:]}, ["a", "b"]), partition(["a", "b"]), x[:, 0]


def test_one_step_sharpness_of_a_linear_loss_is_rho_times_the_gradient_norm():
    point, layers, x = quadratic([0.0] * 4, [3.0, 4.0, 1.0, 0.0])
    found = dict(MSharpness(rho=0.1, m=2)(point, layers, seed=0))
    groups_of_two = [float(x[:2].mean()), float(x[2:].mean())]
    assert found["a"].value == pytest.approx(0.1 * 5 * np.mean(groups_of_two))
    assert found["b"].value == pytest.approx(0.1 * 1 * np.mean(groups_of_two))
    assert found[MODEL].value == pytest.approx(0.1 * math.sqrt(26) * np.mean(groups_of_two))
    assert found["a"].samples == pytest.approx([0.5 * g for g in groups_of_two])
    assert found["a"].draws == 2


def test_a_smaller_last_group_weighs_by_its_size():
    point, layers, x = quadratic([0.0] * 4, [3.0, 4.0, 1.0, 0.0])
    found = dict(MSharpness(rho=0.1, m=3)(point, layers, seed=0))
    assert found["a"].value == pytest.approx(0.5 * float(x.mean()))


@pytest.mark.parametrize(("order", "p"), [("2", 2.0), ("inf", np.inf)])
@pytest.mark.parametrize("adaptive", [False, True])
def test_ascent_is_the_best_of_the_ball(order, p, adaptive):
    """No random point of the ball has a larger inner product; the step lies on the sphere."""
    random = np.random.default_rng(0)
    g = {"x": torch.tensor(random.normal(size=5))}
    scales = {"x": torch.tensor(np.abs(random.normal(size=5)) if adaptive else np.ones(5))}
    best = Ball(0.3, order, scales).steepest(g)
    assert np.linalg.norm((best["x"] / scales["x"]).numpy(), p) == pytest.approx(0.3)
    for _ in range(2000):
        u = random.normal(size=5)
        d = 0.3 * u / np.linalg.norm(u, p) * scales["x"].numpy()
        assert float(g["x"].numpy() @ d) <= tree.dot(g, best) + 1e-12


def test_a_weight_of_exactly_zero_does_not_break_the_adaptive_ball():
    """A plain |w| makes 0/0 there; one zero bias then turned .025 into 1.51 in code in the wild."""
    net = made("mlp")
    with torch.no_grad():
        net[1].bias[0] = 0.0
    fn, weights, names = objective(net)
    layers = partition(names, containers=container_names(net))
    with_zero = dict(MSharpness(adaptive=True, m=6)(Point(fn, weights, names), layers, seed=0))
    weights["1.bias"][0] = 1e-6
    without = dict(MSharpness(adaptive=True, m=6)(Point(fn, weights, names), layers, seed=0))
    assert with_zero["1"].value == pytest.approx(without["1"].value, rel=1e-3)


def test_groups_cover_every_example_once_in_order():
    point, _, x = quadratic([1.0] * 4, [0.0] * 4)
    parts = groups(point.objective, 3)
    assert [g.examples for g in parts] == [3, 1]
    assert torch.equal(torch.cat([g.batches[0].inputs[:, 0] for g in parts]), x)


def test_average_sharpness_of_a_quadratic_is_half_rho_squared_times_the_trace():
    point, layers, x = quadratic([2.0, 4.0, 6.0, -1.0], [5.0, 5.0, 5.0, 5.0])
    found = dict(AverageMSharpness(rho=0.1, draws=4000)(point, layers, seed=0))
    for layer, trace in (("a", 6.0), ("b", 5.0), (MODEL, 11.0)):
        assert abs(found[layer].value - 0.005 * trace * float(x.mean())) < 4 * found[layer].stderr, layer
        assert found[layer].stderr < 0.1 * found[layer].value


def test_average_sharpness_of_a_network_is_its_dense_trace_for_small_rho():
    net = made("vit")
    fn, weights, names = objective(net)
    layers = partition(names, containers=container_names(net))
    hessian, places = dense_hessian(net)
    rho = 1e-3
    for layer, found in AverageMSharpness(rho=rho, draws=100)(Point(fn, weights, names), layers, seed=0):
        mine = hessian if layer == MODEL else block(hessian, places, layers.layers[layer])
        assert abs(found.value - rho**2 / 2 * float(mine.trace())) < 4.5 * found.stderr, layer


def test_layer_sharpness_moves_that_layer_only():
    point, layers, _x = quadratic([0.0] * 4, [0.0, 0.0, 3.0, 4.0])
    assert dict(MSharpness(rho=0.1, m=4)(point, layers, seed=0))["a"].value == 0
    before = {name: tensor.clone() for name, tensor in point.weights.items()}
    dict(AverageMSharpness(draws=2)(point, layers, seed=0))
    assert all(torch.equal(before[name], tensor) for name, tensor in point.weights.items())


@pytest.mark.parametrize("settings", [{"rho": 0.0}, {"m": 0}, {"norm": "1"}])
def test_settings_without_meaning_are_refused(settings):
    with pytest.raises(UsageError, match="cannot be meant"):
        MSharpness(**settings)
