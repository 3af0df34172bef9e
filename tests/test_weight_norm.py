"""The Hessian under weight norm is that of the formula written out, in float64."""

import pytest
import torch
from nets import flat
from torch import nn

from sharpscope.curvature.point import Point
from sharpscope.losses import cross_entropy
from sharpscope.network import network
from sharpscope.objective import Batch, Objective


def written_out(weights, x, dim):
    axes = [axis for axis in range(2) if axis != dim]
    v = weights["v"]
    weight = weights["g"] * v / v.pow(2).sum(axes, keepdim=True).sqrt() if dim is not None else None
    weight = weights["g"] * v / v.pow(2).sum().sqrt() if dim is None else weight
    return torch.tanh(x @ weight.T + weights["bias"]) @ weights["last"].T


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("kind", ["new", "old"])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_curvature_under_weight_norm_is_that_of_its_formula(kind, dim):
    torch.manual_seed(0)
    norm = nn.utils.parametrizations.weight_norm if kind == "new" else nn.utils.weight_norm
    model = nn.Sequential(norm(nn.Linear(5, 4), dim=dim), nn.Tanh(), nn.Linear(4, 3, bias=False)).double().eval()
    net = network(model, "the model")
    own = {"g": "original0", "v": "original1"} if kind == "new" else {"g": "weight_g", "v": "weight_v"}
    names = {short: next(n for n in net.parameters if n.endswith(name)) for short, name in own.items()}
    names |= {"bias": "0.bias", "last": "2.weight"}
    x, y = torch.randn(7, 5, dtype=torch.float64), torch.arange(7) % 3
    point = Point(Objective(net.forward, cross_entropy, (Batch(x, y),)), net.parameters, list(names.values()))
    like = {name: net.parameters[name] for name in names.values()}
    sizes = [tensor.numel() for tensor in like.values()]

    def tree(vector):
        parts = vector.split(sizes)
        return {name: part.view_as(like[name]) for name, part in zip(like, parts, strict=True)}

    def loss(vector):
        weights = dict(zip(names, tree(vector).values(), strict=True))
        return nn.functional.cross_entropy(written_out(weights, x, dim), y)

    truth = torch.autograd.functional.hessian(loss, flat(like, list(like)))
    found = torch.stack([flat(point.product(tree(v)), list(like)) for v in torch.eye(sum(sizes), dtype=torch.float64)])
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-11)
