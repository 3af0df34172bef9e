"""Attention's closed form, its kernels, and recorded products. Recording and kernels need a GPU."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sharpscope.curvature.attention import attention
from sharpscope.curvature.point import Point
from sharpscope.curvature.recorded import Products, Recorder
from sharpscope.curvature.smooth import smooth
from sharpscope.losses import cross_entropy
from sharpscope.network import network
from sharpscope.objective import Batch, Objective
from sharpscope.precision import matmul_precision

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def heads(*shape, dtype=torch.float64, seed=0, device="cpu"):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=made, dtype=torch.float64).to(device, dtype)


def derivatives(attend, dtype=torch.float64, device="cpu", tokens=5, width=16):
    """Return output, gradients, and what cotangents of the gradients come to."""
    q, k, v, g = (
        heads(2, tokens, 3, width, dtype=dtype, seed=s, device=device).transpose(1, 2).requires_grad_()
        for s in range(4)
    )
    cotangents = [heads(2, 3, tokens, width, dtype=dtype, seed=s, device=device) for s in range(4, 7)]
    out = attend(q, k, v)
    slopes = torch.autograd.grad(out, (q, k, v), g, create_graph=True)
    return out, *slopes, *torch.autograd.grad(slopes, (g, q, k, v), cotangents)


def reference(q, k, v):
    return torch.softmax(q @ k.mT * 0.3, -1) @ v


def test_attention_and_its_two_derivatives_are_autograds():
    for mine, plain in zip(derivatives(lambda *t: attention(*t, 0.3)), derivatives(reference), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-11, atol=1e-12)


@needs_gpu
@pytest.mark.parametrize(("tokens", "width"), [(5, 16), (50, 64), (64, 32), (17, 64)])
def test_kernels_agree_with_float64(tokens, width):
    shape = {"tokens": tokens, "width": width}
    for precision, bound in (("highest", 2e-5), ("high", 3e-2)):
        with matmul_precision(precision):
            mine = derivatives(lambda *t: attention(*t, 0.3), torch.float32, "cuda", **shape)
        for m, plain in zip(mine, derivatives(reference, **shape), strict=True):
            assert (m.cpu() - plain).norm() <= bound * plain.norm()


class Mapped(nn.Module):
    """Self-attention as CLIP has it, with a head."""

    def __init__(self, **how):
        super().__init__()
        self.how = how
        self.qkv, self.norm, self.head = nn.Linear(32, 96), nn.LayerNorm(32), nn.Linear(32, 3)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.head(
            F.gelu(self.norm(F.scaled_dot_product_attention(q, k, v, **self.how).transpose(1, 2).flatten(2))).mean(1)
        )


@pytest.mark.parametrize("how", [{}, {"scale": 0.4}])
def test_attention_as_torch_is_asked_for_it_takes_the_closed_form(how):
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    with smooth():
        assert type(F.scaled_dot_product_attention(q, q, q, **how).grad_fn).__name__ == "_AttentionBackward"


@pytest.mark.parametrize("how", [{"is_causal": True}, {"attn_mask": torch.ones(3, 3, dtype=torch.bool)}])
def test_masked_attention_is_left_to_torch(how):
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    with smooth(), sdpa_kernel(SDPBackend.MATH):
        assert type(F.scaled_dot_product_attention(q, q, q, **how).grad_fn).__name__ != "_AttentionBackward"


def objective(device, dtype):
    torch.manual_seed(0)
    net = Mapped().to(device, dtype)
    x, y = heads(12, 5, 32, dtype=dtype, device=device), (torch.arange(12) % 3).to(device)
    of = network(net, "the network")
    batches = tuple(Batch(a, b) for a, b in zip(x.split(5), y.split(5), strict=True))
    return Objective(of.forward, cross_entropy, batches), of.parameters


@pytest.mark.parametrize("how", [{}, {"scale": 0.4}])
def test_products_through_attention_are_autograds(how):
    torch.manual_seed(0)
    net, x = Mapped(**how).double(), heads(4, 5, 32)
    found = []
    for on in (True, False):
        with smooth(on=on), sdpa_kernel(SDPBackend.MATH):
            gradient = torch.autograd.grad(net(x).pow(3).sum(), list(net.parameters()), create_graph=True)
        torch.manual_seed(1)
        found.append(torch.autograd.grad(gradient, list(net.parameters()), [torch.randn_like(g) for g in gradient]))
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-10, atol=1e-12)


def test_nothing_is_recorded_without_a_gpu():
    products = Products(Recorder(torch.device("cpu")))
    for factor in (1.0, 2.0, 3.0):
        found = products(("a",), {"a": torch.ones(2)}, lambda v, f=factor: {"a": f * v["a"]})
        assert found["a"].tolist() == [factor, factor]


@needs_gpu
@pytest.mark.parametrize("names", ["all", "layer"])
def test_recorded_products_are_the_unrecorded_ones(names):
    goal, weights = objective("cuda", torch.float64)
    point = Point(goal, weights, tuple(weights))
    taken = tuple(weights) if names == "all" else tuple(n for n in weights if "qkv" in n)
    vectors = [{n: heads(*weights[n].shape, seed=s, device="cuda") for n in taken} for s in range(4)]
    first = [point.block_product(taken, v) for v in vectors]  # each batch: plain, recorded, replayed, replayed
    assert point._graphs.kept[0].products.recorder.on
    for v, found in zip(vectors, first, strict=True):
        anew = Point(goal, weights, tuple(weights)).block_product(taken, v)
        for n in taken:
            torch.testing.assert_close(found[n], anew[n], rtol=1e-11, atol=1e-13)


@needs_gpu
def test_what_cannot_be_recorded_runs_as_it_is():
    products = Products(Recorder(torch.device("cuda")))

    def waits(v):
        return {"a": v["a"] * float(v["a"].sum())}

    v = {"a": torch.full((2,), 2.0, device="cuda")}
    products(("a",), v, waits)
    with pytest.warns(UserWarning, match="unrecorded"):
        found = products(("a",), v, waits)
    assert found["a"].tolist() == [8.0, 8.0]
