"""The methods that Selective Projection Decay is compared with do what their papers say."""

import copy

import pytest
import torch
from torch import nn

from sharpscope.errors import ModelError, UsageError
from sharpscope.optim import SAM, AdamL2SP, AdamRadius, probing


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def inputs(step):
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(step))


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_l2_sp_is_adamw_on_the_penalised_loss():
    mine, theirs, anchor = network(), network(), network(1)
    optimizer = AdamL2SP(mine.named_parameters(), 0.05, anchor=anchor, strength=0.3, exclude=[r"^2\."])
    plain = torch.optim.AdamW(theirs.parameters(), 0.05, weight_decay=0)
    for step in range(10):
        optimizer.zero_grad()
        mine(inputs(step)).square().sum().backward()
        optimizer.step()
        plain.zero_grad()
        pairs = zip(theirs[0].parameters(), anchor[0].parameters(), strict=True)
        penalty = sum((p - a.detach()).square().sum() for p, a in pairs)
        (theirs(inputs(step)).square().sum() + 0.15 * penalty).backward()
        plain.step()
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_l2_sp_pulls_inwards_when_the_objective_is_maximised_too():
    down, up = network(), network()
    descent = AdamL2SP(down.named_parameters(), 0.05, anchor=network(1), strength=0.3)
    ascent = AdamL2SP(up.named_parameters(), 0.05, anchor=network(1), strength=0.3, maximize=True)
    for step in range(5):
        for model, update, sign in ((down, descent, 1), (up, ascent, -1)):
            update.zero_grad()
            (sign * model(inputs(step)).square().sum()).backward()
            update.step()
    assert same(down, up)


def test_l2_sp_of_strength_zero_is_adamw():
    mine, theirs = network(), network()
    optimizer = AdamL2SP(mine.named_parameters(), 0.05, anchor=None, strength=0.0)
    plain = torch.optim.AdamW(theirs.parameters(), 0.05, weight_decay=0)
    for step in range(5):
        for model, update in ((mine, optimizer), (theirs, plain)):
            update.zero_grad()
            model(inputs(step)).square().sum().backward()
            update.step()
    assert same(mine, theirs)


def test_no_tensor_leaves_its_radius_and_those_inside_move_as_with_adamw():
    mine, theirs, anchor = network(), network(), network()
    optimizer = AdamRadius(mine.named_parameters(), 0.05, anchor="init", radius=0.5)
    plain = torch.optim.AdamW(theirs.parameters(), 0.05, weight_decay=0)
    touched = 0
    for step in range(30):
        for model, update in ((mine, optimizer), (theirs, plain)):
            update.zero_grad()
            model(inputs(step)).square().sum().backward()
            update.step()
        if step == 0:
            assert same(mine, theirs)
        for p, a in zip(mine.parameters(), anchor.parameters(), strict=True):
            relative = ((p - a).norm() / a.norm()).item()
            assert relative <= 0.5 * (1 + 1e-6)
            touched += relative > 0.5 * (1 - 1e-5)
    assert touched


def test_the_radius_of_a_tensor_whose_anchor_is_zero_is_its_largest_norm():
    model = network()
    with torch.no_grad():
        model[0].bias.zero_()
    optimizer = AdamRadius(model.named_parameters(), 0.05, anchor="init", radius=0.1)
    for step in range(30):
        optimizer.zero_grad()
        model(inputs(step)).square().sum().backward()
        optimizer.step()
    assert model[0].bias.norm().item() == pytest.approx(0.1, rel=1e-5)


def test_sam_steps_with_the_gradient_at_the_perturbed_weights():
    """On f(w) = a w^2 / 2 the perturbed gradient is a (w + rho sign w)."""
    w, a, rho, lr = torch.nn.Parameter(torch.tensor([2.0])), 3.0, 0.1, 0.01
    optimizer = SAM(torch.optim.SGD([w], lr), rho=rho)
    values = []

    def closure():
        optimizer.zero_grad()
        loss = (a * w.square() / 2).sum()
        loss.backward()
        values.append(loss.item())
        return loss

    assert optimizer.step(closure).item() == values[0] == 6.0
    assert len(values) == 2
    assert w.item() == pytest.approx(2.0 - lr * a * (2.0 + rho), rel=1e-6)
    assert optimizer.state_dict()["param_groups"][0]["lr"] == lr


def test_sam_that_maximises_mirrors_sam_that_minimises():
    found = []
    for sign in (1, -1):
        model = network()
        optimizer = SAM(torch.optim.SGD(model.parameters(), 0.1, maximize=sign < 0), rho=0.5)

        def closure(model=model, optimizer=optimizer, sign=sign):
            optimizer.zero_grad()
            loss = sign * model(inputs(0)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        found.append(model)
    assert same(*found)


def test_sparse_gradients_have_a_way_out():
    table = torch.nn.Embedding(4, 2, sparse=True)

    def closure():
        table(torch.tensor([1])).sum().backward()

    sam = SAM(torch.optim.SGD(table.parameters(), 0.1))
    with pytest.raises(ModelError, match=r"of shape \(4, 2\) is sparse\n  fix: sparse=False"):
        sam.step(closure)
    with pytest.raises(ModelError, match="gradient of 'weight' is sparse"):
        AdamL2SP(table.named_parameters(), anchor="init", strength=0.1).step()


def test_a_step_of_sam_that_is_interrupted_leaves_the_weights_as_they_were():
    model, before = network(), network()
    optimizer = SAM(torch.optim.SGD(model.parameters(), 0.1))
    calls = []

    def closure():
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        model(inputs(0)).square().sum().backward()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert same(model, before)


def test_a_scheduler_of_torch_takes_sam_as_it_takes_the_optimiser_within():
    ends = []
    for outside in (True, False):
        model = network()
        optimizer = SAM(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
        known = optimizer if outside else optimizer.optimizer
        schedules = torch.optim.lr_scheduler.StepLR(known, 2), torch.optim.lr_scheduler.CyclicLR(known, 0.01, 0.1)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(inputs(0)).square().sum()
            loss.backward()
            return loss.detach()

        for _ in range(4):  # torch warns, an error here, if it sees no step before the schedule's
            optimizer.step(closure)
            for schedule in schedules:
                schedule.step()
        ends.append((model, optimizer.param_groups[0]["lr"], optimizer.optimizer.param_groups[0]["lr"]))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


def test_sam_is_an_optimiser_of_the_groups_state_and_hooks_that_torch_knows():
    model, steps = network(), []
    optimizer = SAM(torch.optim.SGD([model[0].weight], 0.1, momentum=0.9), rho=0.2)
    optimizer.add_param_group({"params": [model[0].bias]})
    optimizer.register_step_post_hook(lambda *_: steps.append(1))

    def closure():
        optimizer.zero_grad()
        loss = model(inputs(0)).square().sum()
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    assert (len(steps), len(optimizer.param_groups), len(optimizer.state)) == (1, 2, 2)
    assert optimizer.defaults["momentum"] == 0.9
    twin = copy.deepcopy(optimizer)
    assert (twin.rho, len(twin.state), twin.optimizer is optimizer.optimizer) == (0.2, 2, False)
    with pytest.raises(UsageError, match=r"step\(\) got no closure\n  fix: step\(closure\)"):
        optimizer.step()


def test_a_step_of_sam_without_gradients_does_nothing_as_with_torch():
    model = network().requires_grad_(False)
    assert SAM(torch.optim.SGD(model.parameters(), 0.1)).step(lambda: 1.0) == 1.0
    assert same(model, network())


def test_probing_trains_the_head_alone_and_puts_everything_back():
    model = network()
    model[0].bias.requires_grad_(False)
    with probing(model, r"^2\.") as head:
        assert [name for name, _ in head] == ["2.weight", "2.bias"]
        assert [name for name, p in model.named_parameters() if p.requires_grad] == ["2.weight", "2.bias"]
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["0.bias"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: AdamL2SP(m.named_parameters(), anchor="init", strength=-1), "strength=-1"),
        (lambda m: AdamRadius(m.named_parameters(), anchor="init", radius=0), "radius=0"),
        (lambda m: SAM(torch.optim.SGD(m.parameters(), 0.1), rho=0), "rho=0"),
        (lambda m: probing(m, "head").__enter__(), "head='head' matches no parameter"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make(network())
