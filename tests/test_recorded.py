"""Attention's closed form, its kernels, and recorded products. Recording and kernels need a GPU."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sharpscope import tree
from sharpscope.curvature.attention import attention
from sharpscope.curvature.layer_norm import _norm_bend, _norm_slope
from sharpscope.curvature.point import Point
from sharpscope.curvature.recorded import Products, Recorder
from sharpscope.curvature.smooth import smooth
from sharpscope.curvature.workspace import Workspace
from sharpscope.losses import cross_entropy
from sharpscope.network import network
from sharpscope.objective import Batch, Objective
from sharpscope.precision import matmul_precision

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
pytestmark = [  # torch.compile's own
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute"),
]


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
    halves = derivatives(lambda *t: attention(*t, 0.3), torch.float16, "cuda", **shape)
    for m, plain in zip(halves, derivatives(reference, **shape), strict=True):
        assert (m.cpu() - plain).norm() <= 1e-2 * plain.norm()


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
        node = F.scaled_dot_product_attention(q, q, q, **how).grad_fn.next_functions[0][0]  # before a view
    assert type(node).__name__ == "_AttentionBackward"


@pytest.mark.parametrize("how", [{"dropout_p": 0.1}, {"attn_mask": torch.ones(3, 3, requires_grad=True)}])
def test_attention_with_dropout_or_a_mask_that_is_learnt_is_left_to_torch(how):
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    with smooth(), sdpa_kernel(SDPBackend.MATH):
        assert type(F.scaled_dot_product_attention(q, q, q, **how).grad_fn).__name__ != "_AttentionBackward"


def objective(device, dtype, kind=Mapped):
    torch.manual_seed(0)
    net = kind().to(device, dtype).eval()
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


def test_nothing_is_recorded_without_a_recorder_or_a_gpu():
    for products in (Products(), Products(Recorder(torch.device("cpu")))):
        for factor in (1.0, 2.0, 3.0):
            found = products(("a",), {"a": torch.ones(2)}, lambda v, f=factor: {"a": f * v["a"]})
            assert found["a"].tolist() == [factor, factor]


class Counting(Recorder):
    """A recorder that is on without a GPU, and counts."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.on, self.recorded = True, 0

    def record(self, work):
        self.recorded += 1
        result = work()
        return (lambda: None), result


@pytest.mark.parametrize(("share", "recordings"), [(0.5, 0), (0.95, 3)])
def test_products_are_recorded_where_the_device_waits_for_the_host(share, recordings, monkeypatch):
    """The first of a kind is timed; its kind is the examples and the tensors, whichever batch's graph it is."""
    clock, timed = iter([0.0, share, 1.0] * 3), []

    def now():
        timed.append(next(clock))
        return timed[-1]

    monkeypatch.setattr("sharpscope.curvature.recorded.time.perf_counter", now)
    recorder = Counting()
    batches = [Products(recorder, 5), Products(recorder, 5), Products(recorder, 2)]
    for _ in range(3):
        for batch in batches:
            assert batch(("a",), {"a": torch.ones(2)}, lambda v: {"a": 2 * v["a"]})["a"].tolist() == [2, 2]
    assert recorder.recorded == recordings
    assert len(timed) == 3 * 2  # of 5 examples and of 2


def moved(weights, step):
    return {n: w + step * tree.gaussian({n: w}, "way")[n] for n, w in weights.items()}


@needs_gpu
@pytest.mark.parametrize("graph_bytes", [None, 0])
@pytest.mark.parametrize("part", ["", "qkv"])
@pytest.mark.parametrize("slow", [0.0, 9.0])
def test_recorded_points_are_the_unrecorded_ones_along_a_path(slow, part, graph_bytes, monkeypatch):
    """Batches of 5, 5 and 2, kept or renewed in one place; three products at each of three points."""
    monkeypatch.setattr("sharpscope.curvature.recorded.SLOW", slow)
    goal, weights = objective("cuda", torch.float64)
    workspace, names = Workspace(), tuple(weights)
    taken = tuple(n for n in names if part in n)
    for step in (0.0, 0.1, 0.3):
        here = moved(weights, step)
        point = Point(goal, here, names, workspace=workspace, graph_bytes=graph_bytes)
        plain = Point(goal, here, names)
        assert point.loss == pytest.approx(plain.loss, rel=1e-13)
        torch.testing.assert_close(point.gradient, plain.gradient, rtol=1e-11, atol=1e-13)
        for seed in range(3):
            v = tree.gaussian(tree.select(weights, taken), seed)
            torch.testing.assert_close(
                point.block_product(taken, v), plain.block_product(taken, v), rtol=1e-11, atol=1e-13
            )
    assert workspace._recorder.on == (slow == 0.0)


@pytest.mark.parametrize(("batches", "recorded_at"), [(1, [2]), (3, [1])])
def test_the_first_point_is_recorded_where_there_are_several_batches(batches, recorded_at, monkeypatch):
    """Once recorded, a place serves the points after it."""
    monkeypatch.setattr("sharpscope.curvature.workspace.Recorder", Counting)
    monkeypatch.setattr(Counting, "__init__", lambda self, device: setattr(self, "on", True))
    monkeypatch.setattr(Workspace, "_waits", lambda self, place: True)
    monkeypatch.setattr(Workspace, "_moved", lambda self, place, weights: True)
    calls = []

    def recorded(self, objective, how, weights, names, budget):
        calls.append(self._points)
        return self._plain(objective, how, weights, names, budget)

    monkeypatch.setattr(Workspace, "_recorded", recorded)
    goal, weights = objective("cpu", torch.float64)
    goal, workspace = replace(goal, batches=goal.batches[:batches]), Workspace()
    for _ in range(3):
        Point(goal, weights, tuple(weights), workspace=workspace)
    assert calls == recorded_at


class Waiting(Mapped):
    """A network that looks at a number on the host, which no recording can."""

    def forward(self, x):
        return super().forward(x) * (2.0 if float(x.sum()) > 1e9 else 1.0)


@needs_gpu
def test_a_network_that_cannot_be_recorded_is_measured_all_the_same(monkeypatch):
    monkeypatch.setattr("sharpscope.curvature.recorded.SLOW", 0.0)
    goal, weights = objective("cuda", torch.float64, Waiting)
    with pytest.warns(UserWarning, match="unrecorded"):
        point = Point(goal, weights, tuple(weights), workspace=Workspace())
    v = tree.gaussian(weights, "v")
    torch.testing.assert_close(point.product(v), Point(goal, weights, tuple(weights)).product(v))


class Patched(Mapped):
    """With patches of an image before it."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, stride=4, bias=False)

    def forward(self, x):
        return super().forward(self.patch(x).flatten(2).transpose(1, 2))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_groups_on_a_gpu_have_the_products_that_they_have_on_a_cpu(dtype, monkeypatch):
    """Recorded gradients, closed forms, kernels, patches as a matrix product; three points."""
    monkeypatch.setattr("sharpscope.curvature.recorded.SLOW", 0.0)
    monkeypatch.setattr("sharpscope.curvature.groups.BUSY", 0)
    torch.manual_seed(0)
    net = Patched().to(dtype).eval()
    x, y = heads(96, 3, 8, 12, dtype=dtype), torch.arange(96) % 3
    of = network(net, "the network")
    bound = 1e-10 if dtype == torch.float64 else 2e-4
    of_device = {d: Objective(of.forward, cross_entropy, (Batch(x.to(d), y.to(d)),)) for d in ("cpu", "cuda")}
    workspace = Workspace()
    for step in (0.0, 0.1, 0.2):
        found = []
        for device, fn in of_device.items():
            space = workspace if device == "cuda" else None
            weights = {name: (tensor.detach() + step).to(device) for name, tensor in of.parameters.items()}
            point = Point(fn, weights, list(weights), workspace=space)
            (part,) = point.parts()
            assert part.groups == 12
            v = {n: heads(12, *t.shape, dtype=dtype, seed=7).to(device) for n, t in weights.items()}
            images = [part.each(tuple(v), v), point.product({n: t[0] for n, t in v.items()}), point.gradient]
            norms = {n: v[n] for n in v if n.startswith("norm")}
            images.append(part.each(tuple(norms), norms))
            found.append([{n: t.cpu() for n, t in image.items()} for image in images])
        for mine, theirs in zip(*found, strict=True):
            for name, tensor in theirs.items():
                assert (mine[name] - tensor).norm() <= bound * tensor.norm()
    assert workspace._recorder.on


@needs_gpu
@pytest.mark.parametrize("width", [32, 96, 768, 1100])
@pytest.mark.parametrize("own", [True, False])
def test_kernels_of_norms_agree_with_float64(width, own):
    c, g, x, more = (heads(3, 7, width, seed=s) for s in range(4))
    weight, p, q = (heads(3, 1, width, seed=s) for s in range(4, 7))
    weight = weight if own else weight[:1].expand(3, 1, width)
    _, mean, rate = torch.native_layer_norm(x, (width,), None, None, 1e-5)
    p, q = (p, q) if own else (None, None)

    def found(*tensors):
        c, p, q, g, x, weight, mean, rate, more = tensors
        known = g, x, weight, mean, rate
        return _norm_slope(*known, None), _norm_slope(*known, (more,)), *_norm_bend(c, p, q, *known)

    given = c, p, q, g, x, weight, mean, rate, more
    there = [t if t is None else t.to("cuda", torch.float32) for t in given]
    for mine, theirs in zip(found(*there), found(*given), strict=True):
        assert (mine.cpu() - theirs).norm() <= 1e-5 * theirs.norm()
