"""Selective Projection Decay against the formula, in numpy, and the laws that follow from it."""

import numpy as np
import pytest
import torch

from sharpscope.optim import SGDSPD, AdamSPD, selective

SHAPES = {"stem.weight": (4, 3), "stem.bias": (4,), "body.weight": (2, 4), "body.scale": ()}


def parameters(seed=0, dtype=torch.float64, order=tuple(SHAPES)):
    draw = np.random.default_rng(seed)
    start = {name: draw.normal(size=shape) for name, shape in SHAPES.items()}
    return {name: torch.nn.Parameter(torch.tensor(start[name], dtype=dtype)) for name in order}


def gradients(steps, seed=1):
    """Slowly turning random gradients: momentum then carries a step against its gradient."""
    draw = np.random.default_rng(seed)
    state = {name: draw.normal(size=shape) for name, shape in SHAPES.items()}
    for _ in range(steps):
        state = {name: np.asarray(0.6 * g + draw.normal(size=g.shape)) for name, g in state.items()}
        yield state


def run(optimizer, weights, steps, seed=1):
    for gradient in gradients(steps, seed):
        for name, weight in weights.items():
            weight.grad = torch.tensor(gradient[name], dtype=weight.dtype)
        optimizer.step()
    return {name: weight.detach().clone() for name, weight in weights.items()}


def transcription(start, anchor, steps, *, lr, decay, weight_decay=0.0, units=None, update_gate=False):
    """The formula of arXiv 2411.01713 in numpy on Adam with bias correction; also counts gated and active units."""
    units = units or {name: [name] for name in start}
    theta = {n: w.copy() for n, w in start.items()}
    m, v = ({n: np.zeros_like(w) for n, w in start.items()} for _ in range(2))
    gated = active = 0
    for t, gradient in enumerate(gradients(steps), 1):
        plain = {}
        for n, g in gradient.items():
            m[n] = 0.9 * m[n] + 0.1 * g
            v[n] = 0.999 * v[n] + 0.001 * g * g
            step = (m[n] / (1 - 0.9**t)) / (np.sqrt(v[n] / (1 - 0.999**t)) + 1e-8)
            plain[n] = theta[n] * (1 - lr * weight_decay) - lr * step
        for names in units.values():
            way = {n: plain[n] - theta[n] if update_gate else -gradient[n] for n in names}
            c = sum(np.sum(way[n] * (theta[n] - anchor[n])) for n in names)
            before = np.sqrt(sum(np.sum((theta[n] - anchor[n]) ** 2) for n in names))
            after = np.sqrt(sum(np.sum((plain[n] - anchor[n]) ** 2) for n in names))
            r = np.clip((after - before) / after, 0, 1) if c < 0 else 0.0
            gated, active = gated + (c < 0), active + (r > 0)
            for n in names:
                theta[n] = plain[n] - min(decay * r, 1.0) * (plain[n] - anchor[n])
    return theta, gated, active


def arrays(tensors):
    return {name: tensor.detach().double().numpy().copy() for name, tensor in tensors.items()}


@pytest.mark.parametrize("decay", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("gate", ["gradient", "update"])
@pytest.mark.parametrize("granularity", ["tensor", "layer"])
def test_fifty_steps_agree_with_the_formula_in_numpy(decay, gate, granularity):
    weights, anchor = parameters(0), parameters(5)
    units = {"stem": ["stem.weight", "stem.bias"], "body": ["body.weight", "body.scale"]}
    expected, gated, active = transcription(
        arrays(weights),
        arrays(anchor),
        50,
        lr=0.3,
        decay=decay,
        weight_decay=0.1,
        units=units if granularity == "layer" else None,
        update_gate=gate == "update",
    )
    optimizer = AdamSPD(
        weights.items(), lr=0.3, anchor=anchor, decay=decay, weight_decay=0.1, gate=gate, granularity=granularity
    )
    optimizer.record()
    found = run(optimizer, weights, 50)
    assert gated > active > 0 or gate == "update"
    for name, weight in found.items():
        np.testing.assert_allclose(weight.numpy(), expected[name], rtol=1e-12, atol=1e-12)
    counts = optimizer.activity()
    assert sum(one.gated for one in counts) == gated
    assert sum(one.active for one in counts) == active


def test_sgd_with_momentum_agrees_with_the_formula_in_numpy():
    weights, anchor = parameters(0), arrays(parameters(5))
    theta = arrays(weights)
    velocity = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    active = 0
    for gradient in gradients(50):
        for name, g in gradient.items():
            velocity[name] = 0.9 * velocity[name] + g
            plain = theta[name] - 0.05 * velocity[name]
            before, after = (np.linalg.norm((x - anchor[name]).ravel()) for x in (theta[name], plain))
            gated = -np.sum(g * (theta[name] - anchor[name])) < 0
            r = np.clip((after - before) / after, 0, 1) if gated else 0
            active += r > 0
            theta[name] = plain - r * (plain - anchor[name])
    assert active > 5
    optimizer = SGDSPD(weights.items(), lr=0.05, momentum=0.9, anchor=parameters(5))
    for name, weight in run(optimizer, weights, 50).items():
        np.testing.assert_allclose(weight.numpy(), theta[name], rtol=1e-12, atol=1e-12)


def test_row_norms_agree_with_the_formula_in_numpy():
    weights, anchor = parameters(0), arrays(parameters(5))
    name, lr = "stem.weight", 0.2
    before = arrays(weights)[name]
    optimizer = SGDSPD(weights.items(), lr=lr, momentum=0.9, anchor=parameters(5), row_norms=True)
    optimizer.record()
    velocity, active = np.zeros(SHAPES[name]), 0
    for gradient in gradients(30):
        for n, weight in weights.items():
            weight.grad = torch.tensor(gradient[n])
        optimizer.step()
        velocity = 0.9 * velocity + gradient[name]
        plain = before - lr * velocity
        d, moved = before - anchor[name], plain - anchor[name]
        old, new = np.abs(d).sum(1, keepdims=True), np.abs(moved).sum(1, keepdims=True)
        r = np.clip((new - old) / new, 0, 1) * (np.sum(gradient[name] * d) > 0)
        active += (r > 0).any()
        before = plain - r * moved
        np.testing.assert_allclose(weights[name].detach().numpy(), before, rtol=1e-12, atol=1e-12)
    assert active == next(one.active for one in optimizer.activity() if one.unit == name) > 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": False}, {"amsgrad": True}, {"maximize": True}])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lambda_zero_is_adamw_bit_for_bit(dtype, options, weight_decay):
    mine, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    ours = AdamSPD(mine.items(), 0.1, anchor=parameters(5), decay=0.0, weight_decay=weight_decay, **options)
    found = run(ours, mine, 100)
    expected = run(torch.optim.AdamW(theirs.values(), 0.1, weight_decay=weight_decay, **options), theirs, 100)
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lambda_zero_is_adam_bit_for_bit(dtype):
    mine, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    found = run(AdamSPD(mine.items(), 0.1, anchor="init", decay=0.0), mine, 100)
    expected = run(torch.optim.Adam(theirs.values(), 0.1), theirs, 100)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_the_first_step_from_the_anchor_is_adams():
    mine, theirs = parameters(), parameters()
    found = run(AdamSPD(mine.items(), 0.1, anchor="init"), mine, 1)
    expected = run(torch.optim.Adam(theirs.values(), 0.1), theirs, 1)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def step_with(weight, anchor, gradient, dtype=torch.float64, **options):
    """One SGD step with momentum that carries the weight by ``carry``; return weights before, plain, and after."""
    parameter = torch.nn.Parameter(torch.tensor(weight, dtype=dtype))
    carry = options.pop("carry")
    optimizer = SGDSPD(
        [("w", parameter)], lr=1.0, momentum=1.0, anchor={"w": torch.tensor(anchor, dtype=dtype)}, **options
    )
    gradient = torch.tensor(gradient, dtype=dtype)
    optimizer.state[parameter]["momentum_buffer"] = -torch.tensor(carry, dtype=dtype) - gradient
    parameter.grad = gradient
    before = parameter.detach().clone()
    optimizer.step()
    return before, before + torch.tensor(carry, dtype=dtype), parameter.detach()


def test_lambda_one_on_an_outward_step_restores_the_previous_radius():
    before, plain, after = step_with([3.0, 4.0], [0.0, 0.0], [1.0, 1.0], carry=[1.0, 2.0], decay=1.0)
    assert plain.norm() > before.norm()
    torch.testing.assert_close(after.norm(), before.norm(), rtol=1e-15, atol=0)
    torch.testing.assert_close(after / after.norm(), plain / plain.norm(), rtol=1e-15, atol=0)


def test_an_outward_step_along_the_gradient_is_left_bit_for_bit():
    _, plain, after = step_with([3.0, 4.0], [0.0, 0.0], [-1.0, -1.0], carry=[1.0, 2.0], decay=1.0)
    assert torch.equal(after, plain)


def test_a_gated_step_inwards_is_left_bit_for_bit():
    _, plain, after = step_with([3.0, 4.0], [0.0, 0.0], [1.0, 1.0], carry=[-1.0, -1.0], decay=1.0)
    assert torch.equal(after, plain)


@pytest.mark.parametrize("decay", [0.25, 0.5, 1.0])
def test_lambda_up_to_one_never_ends_nearer_to_the_anchor_than_before(decay):
    draw = np.random.default_rng(0)
    for _ in range(200):
        w, a, g, carry = draw.normal(size=(4, 3)).tolist()
        before, plain, after = step_with(w, a, g, carry=carry, decay=decay)
        anchor = torch.tensor(a, dtype=torch.float64)
        low = min((before - anchor).norm(), (plain - anchor).norm())
        assert (after - anchor).norm() >= low * (1 - 1e-12)


def test_lambda_two_stops_at_the_anchor_where_the_published_code_overshoots():
    # The measured case of the published code: .01 -> -.058 at lambda 2.
    _, plain, after = step_with([0.01], [0.0], [1.0], carry=[0.09], decay=2.0)
    assert plain > 0
    assert after.item() == 0.0


def test_a_hundred_thousand_random_steps_stay_finite_and_never_overshoot():
    generator = torch.Generator().manual_seed(0)
    anchor = torch.randn(100, 3, generator=generator)
    weights = [(f"w{i}", torch.nn.Parameter(row.clone())) for i, row in enumerate(anchor)]
    optimizer = AdamSPD(weights, lr=0.05, anchor="init", decay=5.0, betas=(0.9, 0.99))
    m, v = torch.zeros_like(anchor).double(), torch.zeros_like(anchor).double()
    active = 0
    for t in range(1, 1001):  # of 100 tensors: 1e5 decisions
        before = torch.stack([weight.detach() for _, weight in weights])
        scale = 10 ** float(torch.empty(()).uniform_(-6, 6, generator=generator))
        gradient = scale * torch.randn(100, 3, generator=generator)
        for (_, weight), row in zip(weights, gradient, strict=True):
            weight.grad = row
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient.double() ** 2
        adam = 0.05 * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
        step = before - adam - anchor
        after = torch.stack([weight.detach() for _, weight in weights]) - anchor
        assert torch.isfinite(after).all()
        # On the segment from the anchor to the plain step, up to rounding: same direction, at most as far.
        assert ((after * step).sum(1) >= -1e-6 * step.norm(dim=1)).all()
        assert (after.norm(dim=1) <= step.norm(dim=1) * (1 + 1e-5) + 1e-6).all()
        active += int((after.norm(dim=1) < step.norm(dim=1) * (1 - 1e-4)).sum())
    assert active > 1000


def test_the_order_of_the_tensors_is_irrelevant():
    first, second = parameters(), parameters(order=tuple(reversed(SHAPES)))
    one = run(AdamSPD(first.items(), 0.3, anchor=parameters(5), granularity="layer"), first, 30)
    other = run(AdamSPD(second.items(), 0.3, anchor=parameters(5), granularity="layer"), second, 30)
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], rtol=1e-13, atol=1e-13)


def test_no_anchor_is_anchor_zero():
    first, second = parameters(), parameters()
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    optimizer = AdamSPD(first.items(), 0.3, anchor=None)
    one = run(optimizer, first, 30)
    other = run(AdamSPD(second.items(), 0.3, anchor=zeros), second, 30)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert list(optimizer.anchors.values()) == [None] * len(SHAPES)


def test_maximize_mirrors_minimize():
    up, down = parameters(), parameters()
    descent = AdamSPD(down.items(), 0.3, anchor=parameters(5))
    ascent = AdamSPD(up.items(), 0.3, anchor=parameters(5), maximize=True)
    for gradient in gradients(30):
        for name in SHAPES:
            down[name].grad = torch.tensor(gradient[name])
            up[name].grad = -torch.tensor(gradient[name])
        descent.step()
        ascent.step()
    assert all(torch.equal(up[name], down[name]) for name in SHAPES)


def test_groups_that_maximize_and_minimize_do_not_mix():
    mixed, down = parameters(), parameters()
    names = list(SHAPES)
    groups = [{"params": [(n, mixed[n])], "maximize": n in names[::2]} for n in names]
    optimizer, descent = AdamSPD(groups, 0.3, anchor=parameters(5)), AdamSPD(down.items(), 0.3, anchor=parameters(5))
    for gradient in gradients(30):
        for name in SHAPES:
            down[name].grad = torch.tensor(gradient[name])
            mixed[name].grad = torch.tensor(gradient[name]) * (-1 if name in names[::2] else 1)
        descent.step()
        optimizer.step()
    assert all(torch.equal(mixed[name], down[name]) for name in SHAPES)


def test_one_small_chunk_after_another_gives_the_same_weights(monkeypatch):
    first, second = parameters(), parameters()
    one = run(AdamSPD(first.items(), 0.3, anchor=parameters(5)), first, 20)
    monkeypatch.setattr("sharpscope.optim.chunk.LIMIT", 1)
    other = run(AdamSPD(second.items(), 0.3, anchor=parameters(5)), second, 20)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_norms_and_dots_of_large_tensors_are_good_to_a_millionth():
    from sharpscope.optim.projection import products, squares

    generator = torch.Generator().manual_seed(0)
    a = 1e-4 * torch.randn(2_500_000, generator=generator)
    b = torch.randn(2_500_000, generator=generator)
    exact = a.double() @ a.double()
    assert abs(squares([a])[0] / exact - 1) < 1e-6
    scale = (a.double() * b.double()).abs().sum()
    assert abs(products([a], [b])[0] - a.double() @ b.double()) < 1e-6 * scale


def test_half_precision_weights_have_float32_norms():
    """In bfloat16 a norm has two digits, and a step of this size would not grow it."""
    torch.manual_seed(0)
    start = torch.randn(4096).bfloat16()
    parameter = torch.nn.Parameter(start.clone())
    anchor = torch.randn(4096).bfloat16()
    optimizer = SGDSPD([("w", parameter)], lr=1.0, momentum=1.0, anchor={"w": anchor})
    optimizer.record()
    deviation = start.double() - anchor.double()
    gradient = (0.01 * deviation).bfloat16()
    optimizer.state[parameter]["momentum_buffer"] = -3 * gradient
    parameter.grad = gradient
    plain = (start - (-3 * gradient + gradient)).double() - anchor.double()
    optimizer.step()
    expected = 1 - deviation.norm() / plain.norm()
    assert optimizer.activity()[0].ratio == pytest.approx(expected.item(), rel=1e-5)
    assert expected < 2**-5
    exact = start - (-3 * gradient + gradient)
    exact = exact.double() - expected * (exact.double() - anchor.double())
    torch.testing.assert_close(parameter.detach().double(), exact, rtol=2**-8, atol=1e-6)  # rounded once
    assert parameter.dtype == torch.bfloat16


def test_a_tensor_without_gradient_is_left_alone_and_counts_nothing():
    weights = parameters()
    optimizer = AdamSPD(weights.items(), 0.3, anchor=parameters(5))
    optimizer.record()
    still = weights["body.scale"].detach().clone()
    for gradient in gradients(5):
        for name in SHAPES.keys() - {"body.scale"}:
            weights[name].grad = torch.tensor(gradient[name])
        optimizer.step()
    assert torch.equal(weights["body.scale"].detach(), still)
    assert {one.unit for one in optimizer.activity()} == SHAPES.keys() - {"body.scale"}


@pytest.mark.parametrize("change", ["state", "group", "skips"])
def test_no_decision_is_lost_where_state_groups_or_the_tensors_with_gradients_change(monkeypatch, change):
    monkeypatch.setattr(selective, "PLANS", 1)
    weights = parameters()
    optimizer = AdamSPD(weights.items(), 0.3, anchor="init")
    optimizer.record()
    for step, gradient in enumerate(gradients(6)):
        for name in SHAPES:
            weights[name].grad = torch.tensor(gradient[name])
        if change == "skips" and step % 2:
            weights["body.scale"].grad = None
        optimizer.step()
        if change == "state" and step == 2:
            optimizer.load_state_dict(optimizer.state_dict())
        if change == "group" and step == 2:
            optimizer.add_param_group({"params": [("new", torch.nn.Parameter(torch.ones(2)))]})
    made = {one.unit: one.decisions for one in optimizer.activity()}
    assert made == dict.fromkeys(SHAPES, 6) | ({"body.scale": 3} if change == "skips" else {})
    assert len(optimizer._plans) == 1
    assert optimizer.activity() == []


def test_every_group_has_its_own_lambda():
    weights = parameters()
    names = list(SHAPES)
    groups = [
        {"params": [(n, weights[n]) for n in names[:2]], "decay": 0.0},
        {"params": [(n, weights[n]) for n in names[2:]]},
    ]
    found = run(AdamSPD(groups, 0.3, anchor=parameters(5), decay=1.0), weights, 30)
    plain, full = parameters(), parameters()
    zero = run(AdamSPD(plain.items(), 0.3, anchor=parameters(5), decay=0.0), plain, 30)
    one = run(AdamSPD(full.items(), 0.3, anchor=parameters(5), decay=1.0), full, 30)
    for name in names:
        assert torch.equal(found[name], (zero if name in names[:2] else one)[name])
        assert not torch.equal(zero[name], one[name])


def test_lambdas_within_one_layer_differ_by_group_while_its_ratio_is_shared():
    def last(decays):
        weights = parameters()
        groups = [{"params": [(n, weights[n])], "decay": decays[n]} for n in SHAPES]
        optimizer = AdamSPD(groups, 0.3, anchor=parameters(5), granularity="layer")
        optimizer.record()
        return run(optimizer, weights, 3), optimizer.activity()

    mixed, _ = last({"stem.weight": 1.0, "stem.bias": 1e-9, "body.weight": 1.0, "body.scale": 1.0})
    full, counts = last(dict.fromkeys(SHAPES, 1.0))
    assert [one.unit for one in counts] == ["stem", "body"]
    assert [one.tensors for one in counts] == [2, 2]
    assert torch.equal(mixed["body.weight"], full["body.weight"])


@pytest.mark.parametrize("gate", ["gradient", "update"])
def test_the_path_for_accelerators_agrees_with_that_for_the_cpu(monkeypatch, gate):
    """Its foreach calls run on a CPU too; only the choice between the two looks at the device."""
    first, second = parameters(), parameters()
    one = run(AdamSPD(first.items(), 0.3, anchor=parameters(5), gate=gate), first, 30)
    monkeypatch.setattr("sharpscope.optim.projection.on_cpu", lambda tensor: False)
    other = run(AdamSPD(second.items(), 0.3, anchor=parameters(5), gate=gate), second, 30)
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], rtol=1e-12, atol=1e-12)
