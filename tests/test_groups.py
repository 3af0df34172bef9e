"""Groups of a batch's examples with weights of their own in one graph: against each group by itself, in float64."""

import gc
import math
import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from nets import made
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sharpscope.curvature import activation, attention, gradient, groups, layer_norm
from sharpscope.curvature.groups import Grouping, pieces_of
from sharpscope.curvature.point import Point
from sharpscope.curvature.trace import Trace
from sharpscope.curvature.workspace import Workspace
from sharpscope.losses import contrastive, cross_entropy
from sharpscope.network import network
from sharpscope.objective import Batch, Objective
from sharpscope.partition import container_names, partition
from sharpscope.table import MODEL
from sharpscope.tree import norm, rademacher


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Networks of a few weights are busy enough."""
    monkeypatch.setattr(groups, "BUSY", 0)


@pytest.fixture(params=[False, True], ids=["plain", "smooth"])
def routes(request, monkeypatch):
    """The closed forms of second derivatives too, as on a GPU."""
    if request.param:
        kind = gradient.smooth
        monkeypatch.setattr(gradient, "smooth", lambda on, batched, peaks: kind(batched=batched, peaks=peaks))


def images(count=48, seed=0):
    made_by = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 4, 4, generator=made_by, dtype=torch.float64)
    return x, torch.randint(0, 3, (count,), generator=made_by)


def objective(net, count=48, **more):
    return Objective(network(net, "net").forward, cross_entropy, (Batch(*images(count)),), **more)


def weights_of(net):
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def point(net, fn, **more):
    return Point(fn, weights_of(net), list(dict(net.named_parameters())), **more)


def by_torch(net, batch, v, matrix="hessian"):
    """Return the gradient of the summed loss and the product with v, by autograd alone."""
    weights = [dict(net.named_parameters())[name] for name in v]
    grad = partial(torch.autograd.grad, allow_unused=True, materialize_grads=True)
    with sdpa_kernel(SDPBackend.MATH):
        outputs = net(batch.inputs)
    copy = outputs.detach().requires_grad_()
    if matrix == "hessian":
        gradient = grad(cross_entropy(outputs, batch.targets), weights, create_graph=True)
        image = grad(gradient, weights, list(v.values()))
    else:
        u = torch.zeros_like(outputs, requires_grad=True)
        gradient = grad(outputs, weights, u, create_graph=True)
        (moved,) = grad(gradient, u, list(v.values()), retain_graph=True)
        (slope,) = grad(cross_entropy(copy, batch.targets), copy, create_graph=True)
        image = grad(outputs, weights, *grad(slope, copy, moved))
    return dict(zip(v, gradient, strict=True)), dict(zip(v, image, strict=True))


def without_biases():
    """As the patches of a CLIP."""
    torch.manual_seed(0)
    patch = nn.Conv2d(1, 6, 2, stride=2, bias=False)
    rest = nn.Flatten(), nn.Linear(24, 5, bias=False), nn.GELU(), nn.LayerNorm(5, bias=False), nn.Linear(5, 3)
    return nn.Sequential(patch, *rest).double().eval()


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("kind", ["mlp", "conv", "vit", "without biases"])
@pytest.mark.usefixtures("routes")
def test_each_groups_product_is_that_of_the_group_by_itself(kind, matrix):
    net = without_biases() if kind == "without biases" else made(kind)
    fn = objective(net)
    whole = point(net, fn)
    assert whole.grouping.of(fn.batches[0]) == 6
    (part,) = whole.operator(matrix).parts()
    like = {name: leaf.expand(6, *leaf.shape) for name, leaf in whole.leaves.items()}
    v = rademacher(like, "probe")
    found = part.each(tuple(v), v)
    for g, batch in enumerate(fn.batches[0].split(6)):
        _, image = by_torch(net, batch, {name: tensor[g] for name, tensor in v.items()}, matrix)
        for name, tensor in image.items():
            torch.testing.assert_close(found[name][g], tensor / 48, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("routes")
def test_gradient_and_products_with_one_vector_are_those_of_the_batch():
    net = made("vit")
    fn = objective(net)
    grouped = point(net, fn)
    v = rademacher(grouped.gradient, "v")
    gradient, image = by_torch(net, fn.batches[0], v)
    for name, tensor in gradient.items():
        torch.testing.assert_close(grouped.gradient[name], tensor / 48, rtol=1e-9, atol=1e-12)
    for name, tensor in image.items():
        torch.testing.assert_close(grouped.product(v)[name], tensor / 48, rtol=1e-9, atol=1e-12)
    for name in v:  # a tensor by itself: what lies above it is walked for its sake alone
        _, image = by_torch(net, fn.batches[0], {name: v[name]})
        found = grouped.block_product((name,), v)[name]
        torch.testing.assert_close(found, image[name] / 48, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pieces", [2, 3, 4, 7, 200])
def test_in_pieces_groups_have_the_same_probes_and_products(pieces):
    net = made("vit")
    fn = objective(net)
    whole, cut = point(net, fn), point(net, replace(fn, pieces=pieces))
    layers = partition(list(whole.leaves), containers=container_names(net))
    for measure in (Trace(most=4), Trace(most=4, matrix="gauss_newton")):
        one, other = (dict(measure(p, layers, 0)) for p in (whole, cut))
        for layer, estimate in one.items():
            assert other[layer].draws == estimate.draws
            np.testing.assert_allclose(other[layer].samples, estimate.samples, rtol=1e-8)


@pytest.mark.parametrize(("count", "number", "pieces"), [(48, 3, 1), (48, 3, 2), (48, 3, 8), (50, 2, 3), (17, 1, 4)])
def test_pieces_hold_every_example_once_and_know_their_groups(count, number, pieces):
    found = pieces_of(Batch(torch.arange(count), torch.arange(count)), number, pieces)
    assert torch.cat([piece.batch.targets for piece in found]).equal(torch.arange(count))
    each = count // number
    for piece in found:
        rows = piece.batch.targets
        assert piece.groups == range(int(rows[0]) // each, int(rows[-1]) // each + 1)
    assert max(len(piece.batch.targets) for piece in found) <= max(each, -(-count // pieces)) + each * (pieces > 1)


@pytest.mark.parametrize(
    ("count", "most", "expected"), [(512, 100, 64), (512, 20, 16), (50, 9, 5), (47, 9, 1), (9, 9, 1)]
)
def test_groups_are_of_one_size_and_not_too_small(count, most, expected):
    assert Grouping(most).of(Batch(torch.zeros(count), torch.zeros(count))) == expected


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = made("mlp")


class Reads(Wrapped):
    """Control flow by what is computed."""

    def forward(self, x):
        return self.net(x) if float(x.sum()) > -1e9 else self.net(-x)


class Mixes(Wrapped):
    """Examples depend on each other."""

    def forward(self, x):
        return self.net(x - x.mean(0))


class Texts(Wrapped):
    """Something is computed once a batch that has as much work as some examples."""

    def __init__(self):
        super().__init__()
        self.classes = nn.Linear(16, 16, bias=False).double()
        self.register_buffer("texts", torch.randn(64, 16, dtype=torch.float64))

    def forward(self, x):
        return self.net(x + self.classes(self.texts).mean(0).view(1, 4, 4))


class Gated(Wrapped):
    """A gate that is zero now lets examples see each other: the loss is that of groups, its derivatives are not."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x):
        found = self.net(x)
        return found + self.gate * found.mean(0)


class Asks(Wrapped):
    """A gradient within the forward."""

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.net(x).square().sum(), x, create_graph=True)
        return self.net(slope)


class Padded(nn.Module):
    """An embedding whose padding has no gradient."""

    def __init__(self, **how):
        super().__init__()
        self.table, self.head = nn.Embedding(3, 5, **how).double(), nn.Linear(80, 3).double()

    def forward(self, x):
        return self.head(self.table((x > 0).long() + (x > 1).long()).flatten(1))


@pytest.mark.parametrize("how", [{"padding_idx": 0}, {"padding_idx": 2}, {"scale_grad_by_freq": True}])
def test_what_vmap_leaves_out_of_an_embedding_is_not_left_out(how):
    torch.manual_seed(0)
    x, y = images()
    x[:16] = -x[:16].abs()  # the two groups that are tried have the first row only

    def most(net):
        return point(net, Objective(network(net.eval(), "net").forward, cross_entropy, (Batch(x, y),))).grouping.most

    assert most(Padded(**how)) == 1
    assert most(Padded()) > 1


class Remembers(Wrapped):
    """A cache by the number of examples, and then a number on the host."""

    def __init__(self):
        super().__init__()
        self.cache, self.last = {}, [None]

    def forward(self, x):
        self.last[0] = self.net(x)
        if len(x) not in self.cache:
            self.cache[len(x)] = x.mean()
        return self.last[0] * (1.0 if float(self.cache[len(x)]) < 1e9 else 0.0)


def test_nothing_of_vmap_stays_in_the_module():
    net = Remembers().eval()
    found = point(net, objective(net))
    assert found.grouping == Grouping()
    assert (net.cache, net.last) == ({}, [None])
    assert torch.isfinite(net(images(8)[0])).all()


class InPlace(nn.Module):
    """Written into after a linear layer and after patches, which closed forms give as views."""

    def __init__(self):
        super().__init__()
        patch = nn.Conv2d(1, 6, 2, stride=2)
        self.all = nn.Sequential(
            patch, nn.Hardtanh(inplace=True), nn.Flatten(), nn.Linear(24, 3), nn.ReLU(inplace=True)
        )

    def forward(self, x):
        return self.all(x)


@pytest.mark.usefixtures("routes")
def test_what_is_written_in_place_is_measured_all_the_same():
    torch.manual_seed(0)
    net = InPlace().double().eval()
    fn = objective(net)
    found = point(net, fn)
    v = rademacher(found.gradient, "v")
    _, image = by_torch(net, fn.batches[0], v)
    for name, tensor in found.product(v).items():
        torch.testing.assert_close(tensor, image[name] / 48, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [Reads, Mixes, Texts, Gated, Asks])
def test_models_whose_examples_are_no_groups_have_none(kind):
    net = kind().eval()
    found = point(net, objective(net))
    assert found.grouping == Grouping()
    v = rademacher(found.gradient, "v")
    assert norm(found.product(v)) > 0


def test_a_contrastive_batch_has_no_groups():
    batch = Batch(torch.randn(32, 4).double(), torch.arange(32))
    fn = Objective(lambda w, x: (x @ w["a"]) @ x.T, contrastive, (batch,))
    assert Point(fn, {"a": torch.eye(4).double()}, ["a"]).grouping == Grouping()


def test_inputs_by_name_are_grouped_too():
    torch.manual_seed(0)
    inputs = {"a": torch.randn(32, 4).double(), "b": torch.randn(32, 5).double()}
    weights = {"one": torch.randn(4, 3).double(), "two": torch.randn(5, 3).double()}
    batch = Batch(inputs, torch.arange(32) % 3)
    fn = Objective(lambda w, x: (x["a"] @ w["one"]) * (x["b"] @ w["two"]), cross_entropy, (batch,))
    found = Point(fn, weights, list(weights))
    assert found.grouping.of(batch) == 4
    for name, tensor in fn.gradient(weights, weights)[1].items():
        torch.testing.assert_close(found.gradient[name], tensor, rtol=1e-9, atol=1e-12)


def test_a_probe_of_all_groups_has_room(monkeypatch):
    net = made("mlp")
    fn = objective(net, 320)
    size = sum(p.nbytes for p in net.parameters())

    def most(memory):
        return point(net, fn, workspace=Workspace(memory=memory)).grouping.most

    assert most(None) == groups.ENOUGH
    monkeypatch.setattr(groups, "ENOUGH", 10**9)
    assert most(None) == int(groups._memory(torch.device("cpu"), None) * groups.ROOM / size)
    assert most(int(5.5 * size / groups.ROOM)) == 5
    assert most(size) == 1


def test_a_group_has_as_many_rows_as_its_probe_is_worth(monkeypatch):
    """A linear layer of one row an example: so many examples a group as make the operations for each weight."""
    monkeypatch.setattr(groups, "BUSY", 128)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3, bias=False)).double().eval()
    assert point(net, objective(net, 320)).grouping.least == 64  # of 2 operations a row for each weight


def test_an_error_is_honest_and_smaller_with_groups(monkeypatch):
    """The same images, as many draws: values that agree, a smaller error, and a spread as it says."""
    net = made("vit")
    fn = objective(net, 320)
    layers = partition(list(dict(net.named_parameters())), containers=container_names(net))
    measure = Trace(first=30, most=30)
    grouped = [dict(measure(point(net, fn), layers, seed)) for seed in range(12)]
    assert grouped[0][next(iter(layers.layers))].draws == 30 * 40
    monkeypatch.setattr(groups, "LEAST", 1000)
    plain = [dict(measure(point(net, fn), layers, seed)) for seed in range(12)]
    for layer in grouped[0]:
        mine, theirs = ([run[layer] for run in runs] for runs in (grouped, plain))
        gap = np.mean([e.value for e in mine]) - np.mean([e.value for e in theirs])
        assert abs(gap) < 4 * math.hypot(mine[0].stderr, theirs[0].stderr) / math.sqrt(12), layer
        assert mine[0].stderr < theirs[0].stderr, layer
        if layer != MODEL:
            assert 0.4 < np.std([e.value for e in mine], ddof=1) / mine[0].stderr < 1.8, layer


@pytest.mark.usefixtures("routes")
def test_a_point_with_groups_that_is_dropped_frees_its_graphs(monkeypatch):
    """Without the collector, though nodes of the way up hold those of the way down."""
    watched = []
    for module in (activation, attention, layer_norm):

        def left(ctx, real=module.left):
            watched.append(weakref.ref(ctx))
            return real(ctx)

        monkeypatch.setattr(module, "left", left)
    net = made("vit")
    gc.collect()
    gc.disable()
    try:
        here = point(net, objective(net))
        here.product(here.gradient)
        tensor = weakref.ref(here._graphs.kept[0].slopes["head.weight"])
        assert tensor() is not None
        assert not watched or any(ctx() is not None for ctx in watched)  # not those of the trial
        del here
        assert tensor() is None
        assert all(ctx() is None for ctx in watched)
    finally:
        gc.enable()
