"""``sharpscope.verify`` agrees with the rivals, and notices when a derivative is wrong."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from nets import made
from test_scan import loader

import sharpscope
from sharpscope import crosscheck
from sharpscope.curvature.point import Point
from sharpscope.errors import ModelError

MODULES = {"pyhessian": "pyhessian", "curvlinops": "curvlinops", "hessian-eigenthings": "hessian_eigenthings"}


def expected():
    """Return the rivals that must appear: the installed ones, and in CI all three."""
    if os.environ.get("SHARPSCOPE_RIVALS") == "1":
        return set(MODULES)
    return {name for name, module in MODULES.items() if importlib.util.find_spec(module)}


@pytest.mark.parametrize("kind", ["conv", "mlp", "vit"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_rival_that_is_right_agrees(kind, dtype):
    net = made(kind).to(dtype)
    found = sharpscope.verify(net, loader(dtype=dtype))
    rivals = {name for name in MODULES for against in found["against"] if against.startswith(name)}
    assert rivals == expected()
    wrong = found[~found["agrees"]]
    # curvlinops differentiates forward through LayerNorm, which torch 2.13 gets wrong; the note says so.
    assert all("LayerNorm" in note for note in wrong["note"]), wrong
    assert kind != "conv" or wrong.empty
    assert list(found["against"][:2]) == ["itself", "itself"]
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_a_wrong_product_is_noticed(monkeypatch):
    right = Point.product
    monkeypatch.setattr(Point, "product", lambda self, v: {n: 1.01 * t for n, t in right(self, v).items()})
    found = sharpscope.verify(made("conv"), loader())
    assert not found[found["quantity"] == "finite difference"]["agrees"].item()


@pytest.mark.skipif("curvlinops" not in expected(), reason="torch's compiler is loaded by it")
def test_the_environment_is_left_as_it_was():
    code = """
import os, torch, sharpscope
before = dict(os.environ)
net = torch.nn.Linear(3, 2).eval()
sharpscope.verify(net, [(torch.randn(4, 3), torch.arange(4) % 2)])
print(*(os.environ.keys() ^ before.keys()))
"""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR")}
    done = subprocess.run([sys.executable, "-c", code], env=inherited, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


class Single(torch.nn.Module):
    """Computes in float32 inside, as a root mean square norm does; ``back`` to the type of its weights or not."""

    def __init__(self, back):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.back = torch.nn.Linear(6, 6), torch.nn.Linear(6, 3), back

    def forward(self, x):
        here = self.first(x)
        wide = here.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return self.last(normed.to(here.dtype) if self.back else normed)


def itself(net, data):
    return sharpscope.verify(net, data).set_index("quantity").loc["finite difference"]


@pytest.fixture
def alone(monkeypatch):
    """No rivals: they are slow."""
    monkeypatch.setattr(crosscheck, "RIVALS", {})


DATA = [(torch.randn(60, 6, generator=torch.Generator().manual_seed(1)), torch.arange(60) % 3)]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("back", [True, False])
def test_a_model_that_computes_in_float32_inside_agrees_and_a_wrong_product_of_it_does_not(monkeypatch, back):
    net = Single(back).eval()
    assert itself(net, DATA)["agrees"]
    right = Point.product
    monkeypatch.setattr(Point, "product", lambda self, v: {n: 1.01 * t for n, t in right(self, v).items()})
    assert not itself(net, DATA)["agrees"]


@pytest.mark.usefixtures("alone")
def test_a_gradient_that_jumps_at_the_weights_is_said_to():
    """Of a ReLU whose input is 0 until a bias moves, there is no finite difference."""
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)).eval()
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.zero_()
    found = itself(net, DATA)
    assert not found["agrees"]
    assert "grows as the step shrinks" in found["note"]


@pytest.mark.usefixtures("alone")
def test_a_forward_that_fails_beside_the_path_is_a_note_of_its_row(monkeypatch):
    def refused(*_):
        raise RuntimeError("mat1 and mat2 must have the same dtype")

    monkeypatch.setattr(crosscheck, "_difference", refused)
    found = itself(made("mlp"), loader())
    assert (found["difference"], found["agrees"]) == (float("inf"), False)
    assert found["note"].endswith(": mat1 and mat2 must have the same dtype")


def test_a_batch_that_the_model_cannot_take_is_named():
    with pytest.raises(ModelError, match=r"the model fails on inputs of 'data' of shape \(1, 5\) torch.float32: "):
        sharpscope.verify(Single(True).eval(), [(DATA[0][0][:, :5], DATA[0][1])])


def test_a_layer_can_be_named():
    found = sharpscope.verify(made("vit"), loader(), layer="blocks.1")
    assert {"model", "blocks.1"} >= set(found["layer"])
