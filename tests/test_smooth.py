"""Closed-form second derivatives of activations and norms against autograd's own, in float64."""

import pytest
import torch
from torch import nn

from sharpscope.curvature import activation, layer_norm
from sharpscope.curvature.smooth import smooth


class QuickGelu(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Mixed(nn.Module):
    """A product by 1.702 and a sigmoid that are no QuickGELU."""

    def forward(self, x):
        return (1.702 * x) * torch.sigmoid(x) + torch.sigmoid(1.702 * x) * x.flip(-1)


class Written(nn.Module):
    """QuickGELUs but for what is written in between."""

    def forward(self, x):
        x = x * 1.0
        gate = torch.sigmoid(1.702 * x)
        x.add_(1.0)
        other = 1.702 * x
        other.add_(0.5)
        return x * gate + x * torch.sigmoid(other)


class ByKeywords(nn.Module):
    """Calls that a closed form has no place for."""

    def forward(self, x):
        wide = torch.layer_norm(x, (6,), torch.ones(6).double(), torch.ones(6).double(), 1e-5, False)
        return nn.functional.gelu(input=wide) + torch.mul(input=x, other=x) + torch.sigmoid(input=1.702 * x) * x


def affine_norm():
    norm = nn.LayerNorm(6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


MIDDLES = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "quick": QuickGelu,
    "mixed": Mixed,
    "written": Written,
    "keywords": ByKeywords,
    "norm": affine_norm,
    "norm_without_bias": lambda: nn.LayerNorm(6, bias=False),
    "norm_without_weights": lambda: nn.LayerNorm(6, elementwise_affine=False),
    "norm_over_two_axes": lambda: nn.LayerNorm((5, 6)),
}


def derivatives(net, x, v, on):
    """Return loss, gradient and the Hessian's product with v."""
    weights = list(net.parameters())
    with smooth(on=on):
        loss = net(x).pow(3).mean()
        gradient = torch.autograd.grad(loss, weights, create_graph=True)
    return loss, *gradient, *torch.autograd.grad(gradient, weights, v)


@pytest.fixture(params=["kept", "anew"])
def way(request, monkeypatch):
    """What products need of a call is kept, as on a CPU, or computed anew, as on a GPU without Triton."""
    if request.param == "anew":
        for module in (activation, layer_norm):
            monkeypatch.setattr(module, "keeps", lambda _: False)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", MIDDLES)
def test_hessian_products_are_those_of_autograd(name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), MIDDLES[name](), nn.Linear(6, 6), MIDDLES[name](), nn.Linear(6, 2)).double()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    v = [torch.randn_like(p) for p in net.parameters()]
    for mine, plain in zip(derivatives(net, x, v, True), derivatives(net, x, v, False), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "quick", "norm"])
def test_the_routes_are_taken(name):
    """Else the test above would compare autograd with itself."""
    net = nn.Sequential(nn.Linear(4, 6), MIDDLES[name]())
    with smooth():
        node = net(torch.randn(3, 4)).grad_fn
    taken = type(node.next_functions[0][0] if name == "norm" else node).__name__
    assert taken in ("_ActivationBackward", "_NormBackward")


@pytest.mark.usefixtures("way")
def test_gradients_by_the_input_and_of_weights_that_are_constant_are_right():
    norm = affine_norm().double().requires_grad_(False)
    x, g = (torch.randn(3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v = torch.randn(3, 6, dtype=torch.float64)
    found = []
    for on in (True, False):
        with smooth(on=on):
            (slope,) = torch.autograd.grad(norm(x), x, g, create_graph=True)
        found.append(torch.autograd.grad(slope, (x, g), v))
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-13)
