"""The Hessian under weight norm is that of the formula written out, in float64."""

import json

import pytest
import torch
from nets import flat
from torch import nn

import sharpscope
from sharpscope.curvature.point import Point
from sharpscope.errors import UsageError
from sharpscope.losses import cross_entropy
from sharpscope.network import network
from sharpscope.objective import Batch, Objective

NORMS = {"new": nn.utils.parametrizations.weight_norm, "old": nn.utils.weight_norm, "none": lambda layer: layer}


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
    model = nn.Sequential(NORMS[kind](nn.Linear(5, 4), dim=dim), nn.Tanh(), nn.Linear(4, 3, bias=False)).double().eval()
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


def scanned(kind, out, measures):
    ends = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        ends.append(nn.Sequential(NORMS[kind](nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3)).double().eval())
    data = [(torch.linspace(-1, 1, 35, dtype=torch.float64).view(7, 5), torch.arange(7) % 3)]
    return sharpscope.scan(*ends, data, alphas=2, measures=measures, out=out, progress=False)


def as_before_weight_norm_was_written_out(out):
    """The folder of a scan that was begun by a version without the setting."""
    file = out / "cells.jsonl"
    file.write_text(file.read_text().replace(', "weight_norm": "written out"', ""))
    return json.loads(file.read_text().splitlines()[0])["plan"]


@pytest.mark.parametrize("kind", ["new", "old"])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_a_scan_that_had_weight_norm_wrong_is_not_resumed(kind, tmp_path):
    found = scanned(kind, tmp_path, ["trace"])
    assert scanned(kind, tmp_path, ["trace"]).cells == found.cells  # one that had it right is
    assert "weight_norm" not in as_before_weight_norm_was_written_out(tmp_path)
    with pytest.raises(UsageError, match=r"belongs to another scan: weight_norm differ .*nothing there, .written out"):
        scanned(kind, tmp_path, ["trace"])


@pytest.mark.parametrize(("kind", "measures"), [("none", ["trace"]), ("new", [])])
def test_a_scan_begun_before_without_sharpness_under_weight_norm_is_resumed(kind, measures, tmp_path):
    found = scanned(kind, tmp_path, measures)
    assert found.meta["plan"] == as_before_weight_norm_was_written_out(tmp_path)
    assert scanned(kind, tmp_path, measures).cells == found.cells
