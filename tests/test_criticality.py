"""Module criticality against a closed form, whole models put together, and layers known to be uncritical."""

import copy
import math

import numpy as np
import pytest
import torch
from nets import fine_tuned, images, made
from scipy import stats
from test_intervention import hybrid
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sharpscope
from sharpscope.criticality import criticality
from sharpscope.errors import UsageError

LOADER = DataLoader(TensorDataset(*images(40, 2)), batch_size=40)


class Sign(nn.Module):
    """Logits (w x, 0): right as long as w is positive."""

    def __init__(self, weight):
        super().__init__()
        self.gate = nn.Linear(1, 1, bias=False)
        self.gate.weight.data.fill_(weight)

    def forward(self, x):
        return torch.cat([self.gate(x), torch.zeros_like(x)], dim=1)


def test_one_weight_has_the_criticality_of_the_normal_law():
    """Noise of size s makes w negative with probability Phi(-w / s): at most 16 % up to s = w."""
    x = torch.linspace(-1, 1, 50)[:, None]
    loader = DataLoader(TensorDataset(x, (x[:, 0] < 0).long()), batch_size=50)
    allowed = 0.16
    sigmas = [round(0.1 * 1.1**k, 6) for k in range(14)]
    row = criticality(
        Sign(-0.1).eval(), Sign(0.2).eval(), loader, allowed=allowed, sigmas=sigmas, draws=200, alphas=[0.75, 1.0]
    ).iloc[0]
    # The 16 % quantile of 200 draws has a standard error of 11 %; the grid stops up to 10 % below it.
    truth = 0.2 / -stats.norm.ppf(allowed)
    assert (1 - 0.33) / 1.1 < row["sigma"] / truth < 1.33
    assert row["criticality"] == pytest.approx((0.3 / row["sigma"]) ** 2, rel=1e-5)
    assert row["low"] <= (0.3 / truth) ** 2 * 1.21
    assert (0.3 / truth) ** 2 <= row["high"] * 1.21
    assert row["alpha"] == 1, "at .75 the weight is .125, and the noise that it bears smaller still"
    assert row["converged"]


class Root(Sign):
    """Logits (root of w, 0): no numbers where w is negative."""

    def forward(self, x):
        return torch.cat([self.gate.weight.sqrt().expand(len(x), 1), torch.zeros_like(x)], dim=1)


def test_logits_that_are_no_numbers_are_wrong():
    """Of noise 2 with w = 1, Phi(-1 / 2) = 31 % of the draws make w negative; class 0 is right elsewhere."""
    loader = DataLoader(TensorDataset(torch.zeros(4, 1), torch.zeros(4).long()), batch_size=4)
    row = criticality(
        Root(2.0).eval(), Root(1.0).eval(), loader, alphas=[1.0], sigmas=[2.0], draws=400, allowed=1.0
    ).iloc[0]
    assert row["rise"] == pytest.approx(100 * stats.norm.cdf(-0.5), abs=4 * 100 * (0.31 * 0.69 / 400) ** 0.5)


def test_a_layer_that_did_not_move_is_uncritical_and_one_that_carries_the_answer_is_not():
    a = made("mlp")
    b = hybrid(fine_tuned(a, "mlp", step=0.4), a, sharpscope.layers(a).layers["3"])
    x, _ = images(200, 2)
    own = DataLoader(TensorDataset(x, b(x).argmax(1).detach()), batch_size=100)  # what the fine-tuned model answers
    found = criticality(a, b, own).set_index("layer")
    assert found.loc["3", "criticality"] == 0
    assert found.loc["3", "converged"]
    assert found.loc["4", "criticality"] > 0


def test_the_place_that_is_named_keeps_the_error_and_the_next_noise_does_not():
    a = made("mlp")
    b = fine_tuned(a, "mlp", step=0.4)
    sigmas = [0.01, 0.1, 1.0]
    row = criticality(a, b, LOADER, alphas=[1.0], sigmas=sigmas, draws=4, allowed=0.05).set_index("layer").loc["4"]
    delta = sum(((b.state_dict()[n] - a.state_dict()[n]) ** 2).sum() for n in ("4.weight", "4.bias"))
    assert row["criticality"] == pytest.approx(float(delta) / row["sigma"] ** 2, rel=1e-6)
    assert row["rise"] <= 5
    assert row["n"] == 40
    assert row["sigma"] in sigmas


def test_what_bears_no_noise_at_all_is_infinitely_critical_and_marked():
    a, b = made("mlp"), fine_tuned(made("mlp"), "mlp", step=0.4)
    found = criticality(a, b, LOADER, alphas=[1.0], sigmas=[1e3], allowed=0.0).set_index("layer")
    assert math.isinf(found.loc["4", "criticality"])
    assert not found.loc["4", "converged"]
    assert np.isnan(found.loc["4", "sigma"])


class Block(nn.Module):
    """A linear layer and the norm behind it: one layer."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        return torch.tanh(self.norm(self.linear(x)))


def rescaled(net, factor):
    """Return the same function: linear weights times a factor, and running statistics that take it out again."""
    other = copy.deepcopy(net)
    linear, norm = other[0].linear, other[0].norm
    with torch.no_grad():
        linear.weight *= factor
        linear.bias *= factor
        norm.running_mean *= factor
        norm.running_var.copy_(factor**2 * (norm.running_var + norm.eps) - norm.eps)
    return other


def loader_of(net, x):
    with torch.no_grad():
        return DataLoader(TensorDataset(x, net(x).argmax(1)), batch_size=100)


def test_a_layer_goes_back_with_its_running_statistics_and_they_bear_no_noise():
    torch.manual_seed(0)
    a, x = nn.Sequential(Block(), nn.Linear(8, 3)).double().eval(), torch.randn(200, 6, dtype=torch.float64)
    a[0].norm.running_var.fill_(0.1)
    b = rescaled(a, 30.0)
    torch.testing.assert_close(a(x), b(x))
    found = criticality(a, b, loader_of(b, x), sigmas=[1e-6, 1e-3]).set_index("layer")
    assert found.loc["0", ["criticality", "low", "high"]].eq(0).all()
    assert found.loc["0", "converged"]
    # Noise, here far above their size, would make half of the variances negative, and NaN of their roots.
    small = rescaled(a, 0.01)
    borne = criticality(a, small, loader_of(small, x), alphas=[1.0], sigmas=[1e-3], allowed=0.2).set_index("layer")
    assert borne.loc["0", "rise"] <= 20


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"allowed": -1}, "allowed=-1"), ({"draws": 1}, "two draws"), ({"sigmas": [0.0, 1]}, "sigmas above 0")],
)
def test_what_cannot_be_meant_is_refused(wrong, message):
    with pytest.raises(UsageError, match=message):
        criticality(made("mlp"), made("mlp"), LOADER, **wrong)
