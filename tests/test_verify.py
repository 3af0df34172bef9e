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
from sharpscope.curvature.point import Point

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


def test_a_layer_can_be_named():
    found = sharpscope.verify(made("vit"), loader(), layer="blocks.1")
    assert {"model", "blocks.1"} >= set(found["layer"])
