"""m-sharpness against closed forms, brute force over the ball, and plain re-computation."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from nets import block, dense_hessian, made, objective

from sharpscope import tree
from sharpscope.ball import Ball
from sharpscope.curvature.point import Point
from sharpscope.errors import UsageError
from sharpscope.losses import cross_entropy
from sharpscope.objective import Batch, Objective
from sharpscope.partition import Partition, container_names, partition
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
    """It reaches the dual norm of the gradient, which no point of the ball exceeds, and lies on the sphere."""
    random = np.random.default_rng(0)
    g = {"x": torch.tensor(random.normal(size=5))}
    scales = {"x": torch.tensor(np.abs(random.normal(size=5)) if adaptive else np.ones(5))}
    best = Ball(0.3, order, scales).steepest(g)
    assert np.linalg.norm((best["x"] / scales["x"]).numpy(), p) == pytest.approx(0.3)
    dual = {2.0: 2, np.inf: 1}[p]
    assert tree.dot(g, best) == pytest.approx(0.3 * np.linalg.norm((scales["x"] * g["x"]).numpy(), dual))
    for _ in range(200):
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


def two_weights(m=4):
    """A layer of two weights in a curved, tilted landscape; the other layer is fixed."""
    weights = {"a": torch.tensor([0.3, -0.2], dtype=torch.float64), "b": torch.tensor([0.5], dtype=torch.float64)}
    x = torch.tensor([[1.0, 0.5], [0.3, -1.0], [0.8, 0.9], [-0.4, 0.7]], dtype=torch.float64)

    def forward(w, x):
        u, v = w["a"][0] * x[:, 0], w["a"][1] * x[:, 1]
        return torch.sin(3 * u + 1) + torch.cos(4 * v) * u + 0.3 * v * v + w["b"][0] * x[:, 0]

    fn = Objective(forward, lambda z, t: z.sum(), (Batch(x, torch.zeros(4)),))
    return Point(fn, weights, ["a", "b"]), partition(["a", "b"])


def brute_force(point, group, rho, order, adaptive, grid=801):
    """Return the highest rise of a group's loss over a fine grid of the ball around the layer's two weights."""
    w = point.weights["a"].detach()
    c = w.abs().clamp_min(1e-8) if adaptive else torch.ones(2, dtype=torch.float64)
    line = torch.linspace(-rho, rho, grid, dtype=torch.float64)
    u = torch.cartesian_prod(line, line)
    if order == "2":  # polar, so that the rim is hit exactly
        r, angle = torch.cartesian_prod(line[grid // 2 :], torch.linspace(0, 2 * math.pi, grid, dtype=torch.float64)).T
        u = torch.stack([r * angle.cos(), r * angle.sin()], 1)
    x = group.batches[0].inputs
    wild = w + c * u
    a, b = wild[:, :1] * x[:, 0], wild[:, 1:] * x[:, 1]
    z = torch.sin(3 * a + 1) + torch.cos(4 * b) * a + 0.3 * b * b + 0.5 * x[:, 0]
    return float(z.mean(1).max() - group({n: t.detach() for n, t in point.weights.items()}))


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("order", ["2", "inf"])
@pytest.mark.parametrize("rho", [0.05, 0.5, 2.0])
def test_worst_case_never_exceeds_the_true_maximum_and_apgd_reaches_99_percent(order, adaptive, rho):
    point, layers = two_weights()
    ball = {"rho": rho, "m": 2, "norm": order, "adaptive": adaptive}
    one_step = dict(MSharpness(**ball)(point, layers, seed=0))["a"]
    # A wide ball holds several hills: restarts find the highest.
    apgd = dict(MSharpness(**ball, steps=20, restarts=20)(point, layers, seed=0))["a"]
    truth = [brute_force(point, group, rho, order, adaptive) for group in groups(point.objective, 2)]
    for mine, best, exact in zip(one_step.samples, apgd.samples, truth, strict=True):
        assert mine <= best + 1e-12
        assert best <= exact + 1e-3 * abs(exact)  # the grid's own error
        assert best >= 0.99 * exact
    assert apgd.value == pytest.approx(np.mean(apgd.samples))


def test_apgd_without_restarts_is_never_below_the_single_step():
    net = made("vit")
    fn, weights, names = objective(net)
    layers = partition(names, containers=container_names(net))
    point = Point(fn, weights, names)
    single = dict(MSharpness(rho=0.3, m=6)(point, layers, seed=0))
    climbed = dict(MSharpness(rho=0.3, m=6, steps=10)(point, layers, seed=0))
    for layer, found in climbed.items():
        assert (found.samples >= single[layer].samples - 1e-12).all(), layer
    assert climbed["head"].value > 1.001 * single["head"].value


def test_uniform_noise_has_a_third_of_the_gaussian_sharpness_on_a_quadratic():
    point, layers, x = quadratic([2.0, 4.0, 6.0, -1.0], [0.0] * 4)
    found = dict(AverageMSharpness(rho=0.1, norm="inf", draws=4000)(point, layers, seed=0))
    assert abs(found["a"].value - 0.005 * 6.0 / 3 * float(x.mean())) < 4 * found["a"].stderr


def test_logit_normalised_sharpness_does_not_see_the_scale_of_the_logits():
    """The last layer times ten: raw sharpness changes, logit-normalised adaptive sharpness does not."""
    net, scaled = made("mlp"), made("mlp")
    with torch.no_grad():
        for tensor in scaled[4].parameters():
            tensor.mul_(10)
    found = {}
    for key, module in (("one", net), ("ten", scaled)):
        fn, weights, names = objective(module)
        point, layers = Point(fn, weights, names), partition(names, containers=container_names(module))
        for logits in ("raw", "normalised"):
            measure = MSharpness(m=6, adaptive=True, rho=0.1, logits=logits)
            found[key, logits] = dict(measure(point, layers, seed=0))["4"].value
    assert found["ten", "normalised"] == pytest.approx(found["one", "normalised"], rel=1e-9)
    assert found["ten", "raw"] > 2 * found["one", "raw"]


def test_names_say_what_departs_from_the_default():
    assert MSharpness().name == "m_sharpness"
    assert MSharpness(norm="inf", adaptive=True, steps=20).name == "m_sharpness_apgd_inf_adaptive"
    assert AverageMSharpness(logits="normalised").name == "m_sharpness_average_logit_normalised"
    assert MSharpness(rho=0.1, label="m_sharpness_wide").name == "m_sharpness_wide"


def test_inputs_that_cannot_be_regrouped_are_refused():
    point, _ = two_weights()
    pair = Objective(point.objective.forward, point.objective.loss, (Batch({"image": 0}, torch.zeros(2)),))
    with pytest.raises(UsageError, match="regroups examples"):
        groups(pair, 2)


@pytest.mark.parametrize("kind", ["mlp", "conv", "vit"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_groups_done_together_rise_as_groups_done_one_by_one(monkeypatch, kind, adaptive):
    """The way of a GPU, taken here; the last group is smaller and goes alone."""
    net = made(kind)
    fn, weights, names = objective(net, (7, 3, 2))
    layers = partition(names, containers=container_names(net))
    measure = MSharpness(m=5, adaptive=adaptive)
    plain = dict(measure(Point(fn, weights, names), layers, seed=0))
    calls = []

    def chunked(self, found, point):
        calls.append(len(found))
        yield found[:2]
        yield found[2:]

    monkeypatch.setattr(MSharpness, "_chunks", chunked)
    together = dict(measure(Point(fn, weights, names), layers, seed=0))
    assert calls == [3]
    for layer, estimate in plain.items():
        np.testing.assert_allclose(together[layer].samples, estimate.samples, rtol=1e-9, atol=1e-12)


def test_a_small_last_group_counts_by_its_size_in_the_error_too():
    """Over samples of images the stated error is the deviation of the values, whatever the last group's size."""
    torch.manual_seed(0)
    net = torch.nn.Linear(5, 3).double()
    weights = {name: tensor.detach() for name, tensor in net.named_parameters()}
    layers, forward = Partition({"all": tuple(weights)}), partial(torch.func.functional_call, net)

    def measured(count, seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(count, 5, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (count,), generator=generator)
        fn = Objective(forward, cross_entropy, (Batch(x, y),))
        return dict(MSharpness(m=8)(Point(fn, weights, layers.names), layers, seed=0))["all"]

    for count in (64, 65, 68):
        found = [measured(count, seed) for seed in range(60)]
        stated = np.sqrt(np.mean([f.stderr**2 for f in found]))
        assert 0.75 < stated / np.std([f.value for f in found], ddof=1) < 1.3
        assert {f.draws for f in found} == {-(-count // 8)}
    assert measured(9, 0).stderr == float("inf")  # of one whole group and one image nothing is known
