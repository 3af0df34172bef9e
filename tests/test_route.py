"""Forwards that closed forms do not go with have torch's own derivatives, and the same products."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from sharpscope import tree
from sharpscope.curvature import groups
from sharpscope.curvature.point import Point
from sharpscope.losses import cross_entropy
from sharpscope.objective import Batch, Objective


class Plain(nn.Module):
    """Nothing that is odd."""

    fused = True

    def __init__(self):
        super().__init__()
        self.low, self.norm, self.head = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        nn.init.normal_(self.norm.weight)

    def inner(self, x):
        return nn.functional.gelu(self.norm(self.low(x)))

    def forward(self, x):
        return self.head(self.inner(x))


class Mapped(Plain):
    def forward(self, x):
        return self.head(vmap(self.inner)(x))


class Sloped(Plain):
    fused = False

    def forward(self, x):
        return self.head(vmap(grad(lambda z: self.inner(z).sum()))(x))


class Tangent(Plain):
    def forward(self, x):
        return self.head(jvp(lambda z: self.norm(self.low(z)), (x,), (x,))[1])


class Checkpointed(Plain):
    fused = False

    def forward(self, x):
        return self.head(checkpoint(self.inner, x, use_reentrant=False))


class Compiled(Plain):
    """The compiler takes the second derivative of a function with one of its own for zero."""

    fused = False

    def __init__(self):
        super().__init__()
        self.fast = torch.compile(self.inner, backend="eager")

    def forward(self, x):
        return self.head(self.fast(x))


class Traced(Plain):
    """TorchScript's calls are seen by no mode."""

    def __init__(self):
        super().__init__()
        self.seen = torch.jit.trace(nn.Sequential(self.low, self.norm, nn.GELU()), torch.zeros(2, 6))

    def forward(self, x):
        return self.head(self.seen(x))


@pytest.mark.parametrize("kind", [Plain, Mapped, Sloped, Tangent, Checkpointed, Compiled, Traced])
@pytest.mark.filterwarnings("ignore")
def test_products_are_those_of_autograd(kind, monkeypatch):
    monkeypatch.setattr(groups, "BUSY", 0)
    torch.manual_seed(0)
    net = kind().double().eval()
    batch = Batch(torch.randn(32, 6, dtype=torch.float64), torch.arange(32) % 3)
    weights = dict(net.named_parameters())
    here = Point(Objective(lambda w, x: functional_call(net, w, (x,)), cross_entropy, (batch,)), weights, list(weights))
    assert here._place.route.fused == kind.fused
    loss = nn.functional.cross_entropy(net(batch.inputs), batch.targets)
    gradient = torch.autograd.grad(loss, list(weights.values()), create_graph=True, allow_unused=True)
    live = {n: g for n, g in zip(weights, gradient, strict=True) if g is not None}
    v = tree.gaussian(here.gradient, "v")
    images = torch.autograd.grad(list(live.values()), [weights[n] for n in live], [v[n] for n in live])
    found = here.product(v)
    for name, image in zip(live, images, strict=True):
        torch.testing.assert_close(found[name], image, rtol=1e-9, atol=1e-12)
