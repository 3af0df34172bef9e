"""Laws that hold for any network, data and seed; hypothesis looks for the case that breaks them."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nets import batches, flat, images, made, objective
from torch import nn

from sharpscope import tree
from sharpscope.curvature.lanczos import Eigenvalue
from sharpscope.curvature.point import Point
from sharpscope.curvature.trace import Trace
from sharpscope.objective import Batch, Objective
from sharpscope.partition import Partition, container_names, partition
from sharpscope.perturbation import AverageMSharpness, MSharpness

SOME = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
KINDS = st.sampled_from(["mlp", "conv", "vit"])
SEEDS = st.integers(0, 1000)
MEASURES = [Trace(most=4), Eigenvalue(tolerance=1e-6), MSharpness(m=12), AverageMSharpness(draws=2)]


def rows(point, layers, measure, seed):
    return {layer: found.value for layer, found in measure(point, layers, seed)}


def close(first, second, tolerance=1e-7):
    assert first.keys() == second.keys()
    for layer, value in first.items():
        assert second[layer] == pytest.approx(value, rel=tolerance, abs=1e-10), layer


@SOME
@given(
    kind=KINDS,
    seed=SEEDS,
    cuts=st.lists(st.integers(1, 11), unique=True, max_size=4),
    measure=st.sampled_from(MEASURES[1:]),  # every batch has trace probes of its own: test_trace.py
)
def test_how_examples_are_batched_changes_nothing(kind, seed, cuts, measure):
    net = made(kind, seed)
    fn, weights, names = objective(net, (12,))
    ends = [0, *sorted(cuts), 12]
    split = Objective(fn.forward, fn.loss, batches(*images(), tuple(np.diff(ends))))
    layers = partition(names, containers=container_names(net))
    one, other = (rows(Point(f, weights, names), layers, measure, seed) for f in (fn, split))
    close(one, other)


@SOME
@given(kind=KINDS, seed=SEEDS, shuffle=st.permutations(range(12)), measure=st.sampled_from(MEASURES))
def test_the_order_of_the_examples_changes_nothing(kind, seed, shuffle, measure):
    net = made(kind, seed)
    fn, weights, names = objective(net, (12,))
    x, y = images()
    moved = Objective(fn.forward, fn.loss, (Batch(x[list(shuffle)], y[list(shuffle)]),))
    layers = partition(names, containers=container_names(net))
    close(*(rows(Point(f, weights, names), layers, measure, seed) for f in (fn, moved)))


@SOME
@given(kind=KINDS, seed=SEEDS, order=st.randoms(use_true_random=False), measure=st.sampled_from(MEASURES[1:]))
def test_the_order_of_the_layers_changes_nothing(kind, seed, order, measure):
    """Draws belong to a layer and a tensor, not to a place in a loop. (A trace takes its number of probes jointly.)"""
    net = made(kind, seed)
    fn, weights, names = objective(net)
    layers = partition(names, containers=container_names(net)).layers
    shuffled = list(layers)
    order.shuffle(shuffled)
    one, other = (
        rows(Point(fn, weights, names), Partition({k: layers[k] for k in keys}), measure, seed)
        for keys in (list(layers), shuffled)
    )
    close(one, {layer: other[layer] for layer in one})


@SOME
@given(kind=KINDS, seed=SEEDS)
def test_a_layers_block_is_the_restriction_of_the_whole(kind, seed):
    net = made(kind, seed)
    fn, weights, names = objective(net)
    point = Point(fn, weights, names)
    for mine in partition(names, containers=container_names(net)).layers.values():
        v = tree.gaussian(tree.select(point.gradient, mine), seed)
        padded = {**tree.zeros(point.gradient), **v}
        for operator in (point, point.gauss_newton):
            whole, own = operator.product(padded), operator.block_product(mine, v)
            torch.testing.assert_close(flat(own, mine), flat(whole, mine), rtol=1e-8, atol=1e-11)


@SOME
@given(kind=KINDS, seed=SEEDS)
def test_the_gauss_newton_matrix_is_never_negative(kind, seed):
    net = made(kind, seed)
    fn, weights, names = objective(net)
    point = Point(fn, weights, names)
    v = tree.gaussian(point.gradient, seed)
    assert tree.dot(v, point.gauss_newton.product(v)) >= -1e-12
    low = Eigenvalue("min", matrix="gauss_newton", tolerance=1e-3)(point, partition(names), seed)
    assert all(found.value >= -1e-9 for _, found in low)


def relu_pair(c):
    """Two linear layers around a ReLU, rescaled by c and 1 / c: the same function."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3)).double().eval()
    with torch.no_grad():
        net[1].weight.mul_(c)
        net[1].bias.mul_(c)
        net[3].weight.div_(c)
    return net


@SOME
@given(c=st.floats(0.2, 5.0), seed=SEEDS)
def test_rescaling_moves_curvature_between_layers_but_no_adaptive_measure(c, seed):
    """Blocks of weights scaled by c and 1 / c have Hessians scaled by c^-2 and c^2; adaptive sharpness stays."""
    found = {}
    for scale in (1.0, c):
        net = relu_pair(scale)
        fn, weights, names = objective(net)
        layers = Partition({"first": ("1.weight", "1.bias"), "second": ("3.weight",), "bias": ("3.bias",)})
        point = Point(fn, weights, names)
        for measure in (
            Eigenvalue(tolerance=1e-8, most=60),
            MSharpness(m=12, adaptive=True, rho=0.1),
            MSharpness(m=12, adaptive=True, rho=0.01, norm="inf"),
            AverageMSharpness(adaptive=True, rho=0.05, draws=2),
        ):
            found[scale, measure.name] = rows(point, layers, measure, seed)
    before, after = (found[scale, "lambda_max"] for scale in (1.0, c))
    assert after["first"] == pytest.approx(before["first"] / c**2, rel=1e-5)
    assert after["second"] == pytest.approx(before["second"] * c**2, rel=1e-5)
    for name in ("m_sharpness_adaptive", "m_sharpness_inf_adaptive", "m_sharpness_average_adaptive"):
        for layer in ("first", "second"):
            assert found[c, name][layer] == pytest.approx(found[1.0, name][layer], rel=1e-6, abs=1e-12), (name, layer)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_numbers_of_the_cpu():
    net = made("vit")
    fn, weights, names = objective(net)
    v = tree.gaussian({n: weights[n] for n in names}, "v")
    device = torch.device("cuda")
    moved = Objective(fn.forward, fn.loss, tuple(b.to(device) for b in fn.batches))
    there = Point(moved, {n: t.to(device) for n, t in weights.items()}, names)
    found = flat(there.product({n: t.to(device) for n, t in v.items()}), names).cpu()
    torch.testing.assert_close(found, flat(Point(fn, weights, names).product(v), names), rtol=1e-9, atol=1e-11)
