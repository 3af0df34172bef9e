"""Graphs in float16, forced on a CPU: against float64, at any scale of the loss, beyond float16's range."""

import gc
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sharpscope.curvature import gradient, groups, workspace
from sharpscope.curvature.gradient import graph
from sharpscope.curvature.graphs import Part
from sharpscope.curvature.groups import Piece
from sharpscope.curvature.half import Half, small
from sharpscope.curvature.point import Point
from sharpscope.curvature.recorded import Recorder
from sharpscope.curvature.route import Route, near, route
from sharpscope.curvature.smooth import smooth
from sharpscope.curvature.workspace import _recorded_graph
from sharpscope.losses import cross_entropy
from sharpscope.measures import MEASURES
from sharpscope.network import network
from sharpscope.objective import Batch, Objective
from sharpscope.partition import layers as layers_of
from sharpscope.precision import matmul_precision
from sharpscope.tree import norm, rademacher, select

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Block(nn.Module):
    """A pre-norm block as CLIP has it."""

    def __init__(self, width, act):
        super().__init__()
        self.act = act
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.ln_1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(self.act(self.up(self.ln_2(x))))


def quick(x):
    return x * torch.sigmoid(1.702 * x)


class Tower(nn.Module):
    """Patches, two blocks, and a head on pooled features."""

    def __init__(self, act=F.gelu, block=Block):
        super().__init__()
        self.patch, self.pre = nn.Conv2d(3, 32, 4, stride=4, bias=False), nn.LayerNorm(32)
        self.blocks = nn.Sequential(block(32, act), block(32, act))
        self.post, self.head = nn.LayerNorm(32), nn.Linear(32, 5)

    def forward(self, x):
        x = self.blocks(self.pre(self.patch(x).flatten(2).transpose(1, 2)))
        return self.head(self.post(x.mean(1)))


def objective(net, count=32, dtype=torch.float32, batches=1):
    made = torch.Generator().manual_seed(0)
    x, y = torch.randn(count, 3, 8, 8, generator=made).to(dtype), torch.randint(0, 5, (count,), generator=made)
    pairs = zip(x.chunk(batches), y.chunk(batches), strict=True)
    return Objective(network(net, "net").forward, cross_entropy, tuple(Batch(*pair) for pair in pairs))


def tower(dtype=torch.float32, **how):
    torch.manual_seed(0)
    return Tower(**how).to(dtype).eval()


def leaves_of(net):
    return {name: tensor.detach().requires_grad_() for name, tensor in net.named_parameters()}


@pytest.fixture
def forced(monkeypatch):
    """Groups as those of a network that is worth their probes."""
    monkeypatch.setattr(groups, "BUSY", 0)


def graphs(net, count=1, half=None, dtype=torch.float32, scale=1.0):
    """Return the graph of all examples in so many groups, and the names."""
    leaves = leaves_of(net)
    fn = objective(net, dtype=dtype)
    fn = replace(fn, loss=lambda outputs, targets: scale * cross_entropy(outputs, targets))
    piece = Piece(fn.batches[0], range(count))
    return graph(fn, leaves, leaves, piece, fused=half is not None, half=half), tuple(leaves)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("act", [F.gelu, partial(F.gelu, approximate="tanh"), quick], ids=["gelu", "tanh", "quick"])
@pytest.mark.usefixtures("forced")
def test_gradient_and_products_are_those_of_float64(act, count):
    mine, names = graphs(tower(act=act), count, Half())
    true, _ = graphs(tower(torch.float64, act=act), 1, dtype=torch.float64)
    assert mine.exact is not None
    assert near(mine.gradient, {n: t.float() for n, t in true.gradient.items()}, 3e-3)
    blocks = tuple(n for n in names if n.startswith("blocks.0"))
    for some in (names, blocks, ("head.weight",)):
        v = rademacher(select(true.gradient, some), 1)
        image = mine.product(some, {n: 1e-4 * t.float() for n, t in v.items()})
        assert near(
            {n: 1e4 * t for n, t in image.items()}, {n: t.float() for n, t in true.product(some, v).items()}, 3e-3
        )


@pytest.mark.usefixtures("forced")
def test_each_groups_product_is_its_own():
    mine, names = graphs(tower(), 4, Half())
    leaves, fn = leaves_of(tower(torch.float64)), objective(tower(torch.float64), dtype=torch.float64)
    v = rademacher({n: t.expand(4, *t.shape) for n, t in leaves.items()}, 2)
    found = mine.product(names, {n: t.float() for n, t in v.items()}, True)
    for g, part in enumerate(fn.batches[0].split(4)):
        true = graph(fn, leaves, leaves, Piece(part), fused=False).product(names, {n: t[g] for n, t in v.items()})
        assert near({n: t[g] for n, t in found.items()}, {n: t.float() for n, t in true.items()}, 5e-3)


@pytest.mark.parametrize("start", [2.0**-40, 2.0**10, 2.0**40])
@pytest.mark.parametrize("loss", [1e-9, 1.0, 1e9])
@pytest.mark.usefixtures("forced")
def test_the_scale_is_moved_to_where_cotangents_fit(loss, start):
    """From wherever it starts; where it is not found float32 is as right."""
    half = Half()
    half.scale = start
    mine, names = graphs(tower(), 1, half, scale=loss)
    plain, _ = graphs(tower(), scale=loss)
    assert near(mine.gradient, plain.gradient, 3e-3)
    v = rademacher(plain.gradient, 3)
    assert near(mine.product(names, v), plain.product(names, v), 3e-3)
    if start == 2.0**10:
        assert mine.exact is not None


class Replaying(Recorder):
    """A recorder without a GPU: a replay computes losses, slopes and peaks anew where they lie, not what was saved."""

    def record(self, work):
        found = work()

        def replay():
            again = work()
            for old, new in ((found.loss, again.loss), (found.peak, again.peak)):
                old.data.copy_(new.data)
            for name, slope in found.slopes.items():
                slope.data.copy_(again.slopes[name].data)

        return replay, found


@pytest.mark.usefixtures("forced")
def test_a_recorded_graph_moves_its_scale_to_where_cotangents_fit():
    leaves, fn, size = leaves_of(tower()), objective(tower()), torch.tensor(1.0)
    fn = replace(fn, loss=lambda outputs, targets: size * cross_entropy(outputs, targets))
    piece, way, recorder = Piece(fn.batches[0], range(4)), Route(half=Half()), Replaying(torch.device("cpu"))
    other, recorded = (_recorded_graph(fn, leaves, leaves, recorder, way, piece) for _ in range(2))
    plain = graph(fn, leaves, leaves, piece, fused=False).gradient
    for factor in (1.0, 1e-9, 1e-7):
        size.fill_(factor)
        assert recorded.renew(piece.batch)
        assert near({n: t / factor for n, t in recorded.gradient.items()}, plain, 3e-3)
        assert near(other.gradient, plain, 3e-3)  # which was not computed anew
    size.fill_(float("nan"))
    assert not recorded.renew(piece.batch)


@needs_gpu
def test_points_recorded_in_float16_follow_a_loss_that_falls(monkeypatch, recwarn):
    monkeypatch.setattr("sharpscope.curvature.recorded.SLOW", 0.0)
    net, size = tower().cuda(), torch.tensor(1.0, device="cuda")
    fn = objective(net, batches=2)
    on_device = tuple(b.to(torch.device("cuda")) for b in fn.batches)
    fn = replace(fn, batches=on_device, loss=lambda outputs, targets: size * cross_entropy(outputs, targets))
    names, workspace_, weights = list(leaves_of(net)), workspace.Workspace(), dict(net.named_parameters())
    with matmul_precision("high"):
        for factor in (1.0, 1.0, 1e-9, 1e-7):
            size.fill_(factor)
            point = Point(fn, weights, names, workspace=workspace_)
            with matmul_precision("highest"):
                true = Point(replace(fn), weights, names)
            v = rademacher(true.gradient, 6)
            assert next(iter(point._graphs)).exact is not None
            for _ in range(3):
                assert near(point.product(v), true.product(v), 5e-3)
    assert workspace_._recorder.on
    assert not [w for w in recwarn if "recorded" in str(w.message)]


@pytest.mark.usefixtures("forced")
def test_activations_beyond_float16_are_in_float32():
    net = tower()
    with torch.no_grad():
        net.blocks[0].qkv.weight.mul_(1e7)
    mine, _ = graphs(net, 1, Half())
    assert mine.exact is None
    assert near(mine.gradient, graphs(net)[0].gradient, 1e-5)


@pytest.mark.usefixtures("forced")
def test_a_network_without_norms_of_sequences_is_in_float32():
    class Pooled(Block):
        def forward(self, x):
            return x + self.up(x)[..., :32]

    net = tower(block=Pooled)
    net.pre = nn.Identity().eval()
    mine, _ = graphs(net, 1, Half())
    assert mine.exact is None
    assert mine.scale == 1


def test_what_is_not_finite_is_computed_again():
    """All blocks of the step, by a graph that is made for them once; nothing of it where all is finite."""
    bad = {"a": torch.tensor([1.0, float("inf")]), "b": torch.ones(1)}
    asked, graphs = [], [2.0]

    def product(graph, names, v, each):
        return {n: torch.full_like(v[n], 7.0) if graph == "exact" else graph * v[n] for n in names}

    def exact(graph):
        asked.append(graph)
        return "exact"

    part = Part(product, lambda names: graphs, 1, exact)
    assert part.blocks({("b",): {"b": torch.ones(1)}})["b"].tolist() == [2.0]
    assert not asked
    found = part.blocks({("a",): {"a": bad["a"]}, ("b",): {"b": bad["b"]}})
    assert found["a"].tolist() == [7.0, 7.0]
    assert found["b"].tolist() == [7.0]
    assert asked == [2.0]


@pytest.mark.usefixtures("forced")
def test_a_product_beyond_float16_is_exact(monkeypatch):
    """A vector that is brought to a size far too large overflows; the point says the right product all the same."""
    net, fn = tower(), objective(tower(), batches=2)
    monkeypatch.setattr(workspace, "route", lambda *_: Route(half=Half()))
    point = Point(fn, dict(net.named_parameters()), list(leaves_of(net)))
    plain = Point(replace(fn), dict(net.named_parameters()), list(leaves_of(net)))
    monkeypatch.setattr(gradient, "small", lambda tensors: small(tensors) * 2.0**30)
    v = rademacher(point.gradient, 4)
    (first, *_) = point.parts()
    (only,) = first.graphs(tuple(v))
    assert not all(t.isfinite().all() for t in only.product(tuple(v), v).values())
    monkeypatch.setattr(workspace, "route", lambda *_: Route())
    assert near(point.product(v), plain.product(v), 3e-3)
    each = first.each(tuple(v), {n: t.expand(first.groups, *t.shape).contiguous() for n, t in v.items()})
    assert all(t.isfinite().all() for t in each.values())


@pytest.mark.usefixtures("forced")
def test_estimates_in_float16_are_those_in_float32(monkeypatch):
    net = tower()
    fn, layers = objective(net, 64, batches=2), layers_of(net)
    found = []
    for half in (Half(), None):
        monkeypatch.setattr(workspace, "route", lambda *_, half=half: Route(half=half))
        point = Point(replace(fn), dict(net.named_parameters()), list(layers.names))
        assert (next(iter(point._graphs)).exact is not None) == (half is not None)
        found.append({m: dict(MEASURES[m](point, layers, 0)) for m in ("trace", "lambda_max")})
    mine, plain = found
    for layer, estimate in plain["trace"].items():
        other = mine["trace"][layer]
        assert abs(other.value - estimate.value) <= 3e-3 * abs(estimate.value) + 0.1 * estimate.stderr
    for layer, estimate in plain["lambda_max"].items():
        assert mine["lambda_max"][layer].value == pytest.approx(estimate.value, rel=5e-3)


class Odd(Block):
    """Calls of many kinds between norm and stream."""

    def forward(self, x):
        h = self.qkv(self.ln_1(x))
        h += 1.0
        h[..., 0] = 0.5
        q, k, v = h.chunk(3, -1)
        p = torch.softmax(q @ k.transpose(1, 2) / 6, -1)
        h = torch.cat([p @ v, v[:, :1]], 1)[:, :-1]
        h = torch.where(h > 0, h, 0.1 * h) + torch.einsum("bij,bjk->bik", p, v)
        x = x + self.out(F.dropout(F.normalize(h, dim=-1), training=False))
        h = self.up(input=self.ln_2(x))
        return torch.add(x, other=self.down(self.act(h.to(x.dtype)) * torch.sigmoid(h).float()))


class Attending(Block):
    """torch's own attention module, and a mask."""

    def __init__(self, width, act):
        super().__init__(width, act)
        self.attend = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x):
        h = self.ln_1(x)
        x = x + self.attend(h, h, h, need_weights=False)[0]
        q, k, v = (t[:, None] for t in self.qkv(self.ln_2(x)).chunk(3, -1))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        p = (q @ k.mT / 6).masked_fill(~mask, float("-inf")).softmax(-1)
        return x + (p @ v).squeeze(1)


class Causal(Block):
    """Attention under masks, as a text tower has it."""

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.ln_1(x)).chunk(3, -1))
        mask = torch.full((x.shape[1], x.shape[1]), -float("inf")).triu(1)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(F.scaled_dot_product_attention(q, h, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(self.act(self.up(self.ln_2(x))))


@pytest.mark.parametrize("block", [Odd, Attending, Causal])
@pytest.mark.usefixtures("forced")
def test_what_float16_does_not_go_through_is_in_float32(block):
    mine, names = graphs(tower(block=block), 1, Half())
    true, _ = graphs(tower(torch.float64, block=block), dtype=torch.float64)
    assert mine.exact is not None
    v = rademacher(true.gradient, 5)
    assert near(mine.gradient, {n: t.float() for n, t in true.gradient.items()}, 5e-3)
    image = mine.product(names, {n: t.float() for n, t in v.items()})
    assert near(image, {n: t.float() for n, t in true.product(names, v).items()}, 5e-3)


def test_the_stream_and_pooled_features_stay_in_float32():
    net, seen = tower(), {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda m, i, out, name=name: seen.update({name: out.dtype}))
    with smooth(peaks=[]):
        net(torch.randn(2, 3, 8, 8))
    halves = {name for name, dtype in seen.items() if dtype == torch.float16}
    inside = {f"blocks.{i}.{n}" for i in (0, 1) for n in ("ln_1", "qkv", "out", "ln_2", "up", "down")}
    assert halves == inside | {"pre"}


def test_vectors_are_brought_to_a_size_that_float16_has():
    for scale in (1e-30, 1e-4, 1.0, 1e30):
        by = float(small([torch.tensor([0.3, -1.0]) * scale, torch.zeros(2)]))
        assert 2.0**-5 < by * scale <= 2.0**-3
    assert float(small([torch.zeros(3)])) > 0


def test_it_is_not_tried_without_a_gpu_or_in_full_precision():
    net = tower()
    with matmul_precision("high"):
        leaves = leaves_of(net)
        assert route(partial(graph, objective(net), leaves, leaves), objective(net), leaves) == Route()


@needs_gpu
def test_it_is_tried_where_tf32_is_allowed_and_kept_where_it_is_right():
    net = tower().cuda()
    fn = objective(net)
    fn = replace(fn, batches=tuple(b.to(torch.device("cuda")) for b in fn.batches))
    names = list(leaves_of(net))
    true = Point(fn, dict(net.named_parameters()), names)
    with matmul_precision("high"):
        point = Point(replace(fn), dict(net.named_parameters()), names)
        assert next(iter(point._graphs)).exact is not None
        v = rademacher(true.gradient, 6)
        assert near(point.product(v), true.product(v), 5e-3)
        with torch.no_grad():
            net.blocks[0].qkv.weight.mul_(1e7)
        wild = Point(replace(fn), dict(net.named_parameters()), names)
        assert next(iter(wild._graphs)).exact is None


@pytest.mark.usefixtures("forced")
def test_a_graph_that_is_dropped_is_freed():
    mine, names = graphs(tower(), 4, Half())
    gone = weakref.ref(mine.slopes[names[0]])
    mine.product(names, mine.gradient)
    gc.disable()
    try:
        del mine
        assert gone() is None
    finally:
        gc.enable()


def test_near_is_a_share_of_each_tensor_or_of_the_whole():
    true = {"a": torch.ones(100), "b": torch.full((1,), 1e-3)}
    assert near({"a": true["a"] * 1.001, "b": true["b"] * 50}, true, 0.2)
    assert not near({"a": true["a"] * 1.3, "b": true["b"]}, true, 0.2)
    assert not near({"a": true["a"]}, true, 0.2)
    assert not near({"a": true["a"] * float("nan"), "b": true["b"]}, true, 0.2)
    assert norm(true) > 0
