"""Forwards that begin where the weights differ give what full forwards give."""

import pytest
import torch
from nets import NETS, fine_tuned, images, made
from torch import nn

from sharpscope.network import network
from sharpscope.partition import layers
from sharpscope.replay import Replay


def setup(net, other):
    first, second = network(net, "a"), network(other, "b")
    return first, {**first.parameters, **first.buffers}, second.parameters


@pytest.mark.parametrize("granularity", ["block", "part", "tensor", "tower"])
@pytest.mark.parametrize("kind", NETS)
def test_moving_any_layer_gives_the_bits_of_the_full_forward(kind, granularity):
    net = made(kind)
    mine, weights, others = setup(net, fine_tuned(net, kind))
    x, _ = images()
    replay = Replay(mine)
    assert torch.equal(replay.record(weights, x), mine.forward(weights, x))
    for names in layers(net, granularity).layers.values():
        moved = {**weights, **{n: others[n] for n in names}}
        with torch.no_grad():
            full = mine.forward(moved, x)
        assert torch.equal(replay(moved, x, names), full)
        assert not torch.equal(full, mine.forward(weights, x))
        assert replay.agrees(moved, x, names)


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.eye(3)), 0

    def forward(self, x):
        self.calls += 1
        return x @ self.weight


def counted(count=4):
    return nn.Sequential(*(Counted() for _ in range(count))).eval()


@pytest.mark.parametrize("place", range(4))
def test_only_the_modules_from_the_moved_one_on_run(place):
    net = counted()
    mine, weights, _ = setup(net, counted())
    x, replay = torch.randn(2, 3), Replay(mine)
    replay.record(weights, x)
    before = [module.calls for module in net]
    replay({**weights, f"{place}.weight": 2 * torch.eye(3)}, x, [f"{place}.weight"])
    assert [module.calls - was for module, was in zip(net, before, strict=True)] == [int(i >= place) for i in range(4)]
    assert all("forward" not in module.__dict__ for module in net)


class Tricky(nn.Module):
    """Runs backwards, calls a module twice, writes in place, scales by a tensor of the root before its first module."""

    def __init__(self):
        super().__init__()
        self.late, self.early, self.twice = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.gain = nn.Parameter(torch.ones(3))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.twice(self.early(x * self.gain))
        h = self.act(self.late(self.twice(h)))
        h += 1
        return h


@pytest.mark.parametrize("layer", ["late", "early", "twice", "gain"])
def test_no_order_of_execution_is_assumed(layer):
    torch.manual_seed(0)
    net = Tricky().eval()
    mine, weights, _ = setup(net, Tricky().eval())
    x, replay = torch.randn(5, 3), Replay(mine)
    for _ in range(2):
        replay.record(weights, x)
        names = layers(net).layers[layer]
        moved = {**weights, **{n: weights[n] * 1.5 for n in names}}
        with torch.no_grad():
            assert torch.equal(replay(moved, x, names), mine.forward(moved, x))


class Borrower(nn.Module):
    """A module that reads the weight of another one behind the network's back."""

    def __init__(self, lender):
        super().__init__()
        self.own = nn.Parameter(torch.ones(3))
        self._lender = [lender]

    def forward(self, x):
        return x @ self._lender[0].weight * self.own


def test_a_module_that_reads_what_it_does_not_hold_is_found_out():
    lender = nn.Linear(3, 3)
    net = nn.ModuleDict({"borrower": Borrower(lender), "lender": lender}).eval()
    net.forward = lambda x: net["lender"](net["borrower"](x))
    mine, weights, _ = setup(net, net)
    x, replay = torch.randn(5, 3), Replay(mine)
    replay.record(weights, x)
    moved = {**weights, "lender.weight": weights["lender.weight"] * 2}
    assert not replay.agrees(moved, x, ["lender.weight"])


def test_a_forward_that_raises_leaves_the_module_as_it_was():
    net = counted()
    mine, weights, _ = setup(net, counted())
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        Replay(mine).record(weights, torch.randn(2, 5))
    assert all("forward" not in module.__dict__ for module in net)
