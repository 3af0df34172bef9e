"""Every curvature value against matrices of torch.func on the concatenated data, float64, none of sharpscope's code.

Three networks: an MLP, a small conv net, and a two-tower CLIP of transformers' own class under its contrastive loss
and under a classification loss; batches are unequal (the contrastive batch is one unit).
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from nets import batches, block, flat, images, made, objective
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev

from sharpscope import tree
from sharpscope.curvature.dense import dense
from sharpscope.curvature.density import density
from sharpscope.curvature.directional import Directional
from sharpscope.curvature.lanczos import Eigenvalue, largest
from sharpscope.curvature.point import Point
from sharpscope.curvature.trace import Trace
from sharpscope.errors import UsageError
from sharpscope.losses import contrastive, cross_entropy, loss_from, squared_error
from sharpscope.objective import Batch, Objective
from sharpscope.partition import Partition, container_names, partition
from sharpscope.table import MODEL

# torch's own, inside its forward mode
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


@dataclass
class Case:
    point: Point
    layers: Partition
    hessian: torch.Tensor
    gauss_newton: torch.Tensor
    places: dict[str, slice]

    def matrix(self, kind, layer):
        whole = self.hessian if kind == "hessian" else self.gauss_newton
        return whole if layer == MODEL else block(whole, self.places, self.layers.layers[layer])

    def all_layers(self):
        return {**self.layers.layers, MODEL: self.layers.names}


def matrices(forward, loss, weights, names, count):
    """Return Hessian and Gauss-Newton matrix of loss(forward(w)) / count over one flat vector."""
    sizes = {n: weights[n].numel() for n in names}
    ends = np.cumsum([0, *sizes.values()])
    places = {n: slice(int(a), int(b)) for n, a, b in zip(names, ends, ends[1:], strict=False)}

    def unflat(vector):
        return {**weights, **{n: vector[p].view(weights[n].shape) for n, p in places.items()}}

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        start = torch.cat([weights[n].reshape(-1) for n in names])
        # torch.func.hessian = jacfwd(jacrev(.)), and jacrev(jacrev(.)) too, is wrong through an affine LayerNorm
        # (test_point holds the trap); forward over a plain gradient is right.
        full = jacfwd(grad(lambda v: loss(forward(unflat(v))) / count))(start)
        jacobian = jacrev(lambda v: forward(unflat(v)))(start)
        z = forward(unflat(start)).detach()
        bend = jacfwd(grad(lambda z: loss(z) / count))(z)
    jacobian = jacobian.reshape(-1, len(start))
    return full.detach(), (jacobian.T @ bend.reshape(len(jacobian), -1) @ jacobian).detach(), places


def classification(kind, loss=cross_entropy):
    net = made(kind)
    fn, weights, names = objective(net)
    fn = Objective(fn.forward, loss, fn.batches)
    x, y = images()
    found = matrices(lambda w: functional_call(net, w, (x,)), lambda z: loss(z, y), weights, names, len(y))
    return Case(Point(fn, weights, names), partition(names, containers=container_names(net)), *found)


class TwoTowers(nn.Module):
    """transformers' CLIPModel as a function of an image-and-text mapping to its similarity matrix."""

    def __init__(self):
        super().__init__()
        from transformers import CLIPConfig, CLIPModel

        shared = {"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = CLIPConfig(
            vision_config={**shared, "image_size": 4, "patch_size": 2, "num_channels": 1},
            text_config={**shared, "vocab_size": 7, "max_position_embeddings": 4, "eos_token_id": 6},
            projection_dim=4,
        )
        self.clip = CLIPModel(config)

    def forward(self, inputs):
        return self.clip(input_ids=inputs["text"], pixel_values=inputs["image"]).logits_per_image


def two_tower():
    torch.manual_seed(0)
    net = TwoTowers().double().eval()
    with torch.no_grad():
        for tensor in net.parameters():
            tensor.add_(0.3 * torch.randn_like(tensor))
        net.clip.logit_scale.fill_(0.7)
    x, y = images(6)
    text = torch.tensor([[1, 2, 3, 6], [3, 2, 6, 0], [4, 4, 6, 0], [2, 6, 0, 0], [5, 1, 2, 6], [1, 1, 1, 6]])
    pairs = {"image": x, "text": text}
    weights = {n: p.detach() for n, p in [*net.named_parameters(), *net.named_buffers()]}
    names = [n for n, _ in net.named_parameters()]
    fn = Objective(lambda w, i: functional_call(net, w, (i,)), contrastive, (Batch(pairs, y),))
    found = matrices(lambda w: functional_call(net, w, (pairs,)), lambda z: contrastive(z, y), weights, names, len(y))
    layers = {"vision": [], "text": [], "rest": []}
    for name in names:
        layers[next((tower for tower in ("vision", "text") if tower in name), "rest")].append(name)
    return Case(Point(fn, weights, names), Partition({k: tuple(v) for k, v in layers.items()}), *found)


CASES = {
    "mlp": lambda: classification("mlp"),
    "conv": lambda: classification("conv"),
    "vit": lambda: classification("vit"),
    "mlp, label smoothing": lambda: classification("mlp", loss_from("cross_entropy", 0.1)),
    "mlp, squared error": lambda: classification("mlp", squared_error),
    "two-tower CLIP, contrastive": two_tower,
}
MATRICES = ["hessian", "gauss_newton"]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]()


@pytest.mark.parametrize("matrix", MATRICES)
def test_products_whole_and_per_layer(case, matrix):
    operator = case.point.operator(matrix)
    for layer, names in case.all_layers().items():
        v = tree.gaussian(tree.select(case.point.gradient, names), "v")
        found = operator.product(v) if layer == MODEL else operator.block_product(names, v)
        expected = case.matrix(matrix, layer)
        if layer == MODEL:  # the dense matrix has the tensors in the module's order
            index = torch.cat([torch.arange(case.places[n].start, case.places[n].stop) for n in names])
            expected = expected[index][:, index]
        expected = expected @ flat(v, names)
        torch.testing.assert_close(flat(found, names), expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))


@pytest.mark.parametrize("matrix", MATRICES)
def test_trace_by_the_full_probe_set_is_exact(case, matrix):
    """The dense diagonal by unit vectors: the trace with every probe there is."""
    for layer, names in case.layers.layers.items():
        if sum(case.point.leaves[n].numel() for n in names) > 200:
            continue
        ours = dense(case.point, names, matrix=matrix)
        theirs = case.matrix(matrix, layer)
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8 * scale)
        assert float(ours.trace()) == pytest.approx(float(theirs.trace()), rel=1e-8, abs=1e-8 * scale)


@pytest.mark.parametrize("matrix", MATRICES)
def test_estimated_traces_agree_within_their_errors(case, matrix):
    for layer, found in Trace(most=60, matrix=matrix)(case.point, case.layers, seed=0):
        assert abs(found.value - float(case.matrix(matrix, layer).trace())) <= 5 * found.stderr + 1e-12, layer


@pytest.mark.parametrize(("end", "place"), [("max", -1), ("min", 0)])
@pytest.mark.parametrize("matrix", MATRICES)
def test_extreme_eigenvalues(case, matrix, end, place):
    for layer, found in Eigenvalue(end, matrix=matrix, tolerance=1e-9, most=150)(case.point, case.layers, seed=0):
        truth = torch.linalg.eigvalsh(case.matrix(matrix, layer))
        scale = float(truth.abs().max())
        assert found.value == pytest.approx(float(truth[place]), rel=1e-8, abs=1e-8 * scale), layer
        assert abs(found.value - float(truth[place])) <= found.stderr + 1e-9 * scale, layer


@pytest.mark.parametrize("matrix", MATRICES)
def test_directional(case, matrix):
    way = tree.gaussian(case.point.leaves, "way")
    point = Point(case.point.objective, case.point.weights, list(case.point.leaves), delta=way)
    for layer, found in Directional(matrix)(point, case.layers, seed=0):
        names = list(case.places) if layer == MODEL else case.layers.layers[layer]
        d = flat(way, names)
        expected = float(d @ case.matrix(matrix, layer) @ d)
        assert found.value == pytest.approx(expected, rel=1e-8, abs=1e-10), layer


def test_top_eigenvalues_are_the_dense_ones_in_order(case):
    names = next(iter(case.layers.layers.values()))
    like = tree.gaussian(tree.select(case.point.gradient, names), "start")
    found = largest(lambda v: case.point.block_product(names, v), like, tolerance=1e-9, most=200, count=3)
    truth = torch.linalg.eigvalsh(block(case.hessian, case.places, names)).flip(0)[:3]
    np.testing.assert_allclose([r.value for r in found], truth.numpy(), rtol=1e-7, atol=1e-9)
    for ritz in found:
        image = case.point.block_product(names, ritz.vector)
        assert tree.norm(tree.axpy(-ritz.value, ritz.vector, image)) == pytest.approx(
            ritz.residual, rel=0.01, abs=1e-10
        )


def test_density_has_the_dense_moments_and_mass():
    case = classification("vit")
    for layer in ("head", MODEL):
        truth = case.matrix("hessian", layer)
        found = density(case.point, case.layers, layer, draws=60, steps=12)
        for power in (0, 1, 2, 3):
            exact = float(torch.linalg.matrix_power(truth, power).trace())
            value, error = found.moment(power)
            assert abs(value - exact) <= 5 * error + 1e-8 * abs(exact), (layer, power)
        width = 0.05 * float(truth.abs().max())
        grid = np.linspace(found.nodes.min() - 6 * width, found.nodes.max() + 6 * width, 4000)
        assert np.trapezoid(found.curve(grid, width), grid) == pytest.approx(1.0, abs=1e-3)


def test_density_of_one_weight_is_that_weight():
    point, layers = one_weight()
    found = density(point, layers, "a", draws=2, steps=5)
    assert found.moment(1)[0] == pytest.approx(3.0)


def one_weight():
    weights = {"a": torch.ones(1, dtype=torch.float64), "b": torch.ones(2, dtype=torch.float64)}
    fn = Objective(
        lambda w, x: 1.5 * w["a"] ** 2 * x[:, 0] - w["b"].pow(2).sum() * x[:, 0],
        lambda z, t: z.sum(),
        (Batch(torch.ones(3, 1, dtype=torch.float64), torch.zeros(3)),),
    )
    return Point(fn, weights, ["a", "b"]), partition(["a", "b"])


def test_a_layer_of_one_weight_and_a_layer_that_curves_down_only():
    point, layers = one_weight()
    top = dict(Eigenvalue()(point, layers, seed=0))
    low = dict(Eigenvalue("min")(point, layers, seed=0))
    trace = dict(Trace()(point, layers, seed=0))
    assert [round(e["a"].value, 9) for e in (top, low, trace)] == [3.0, 3.0, 3.0]
    assert [round(e["b"].value, 9) for e in (top, low, trace)] == [-2.0, -2.0, -4.0]
    assert all(e.converged for found in (top, low, trace) for e in found.values())


def test_the_gauss_newton_matrix_of_a_linear_model_is_its_hessian():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double().eval()
    fn, weights, names = objective(net)
    point = Point(fn, weights, names)
    v = tree.gaussian(point.gradient, "v")
    both = (flat(point.operator(m).product(v), names) for m in MATRICES)
    torch.testing.assert_close(*both, rtol=1e-10, atol=1e-12)


def test_gauss_newton_gives_the_same_with_and_without_kept_graphs():
    net = made("vit")
    fn, weights, names = objective(net)
    v = tree.gaussian({n: weights[n] for n in names}, "v")
    kept, anew = (Point(fn, weights, names, graph_bytes=b) for b in (None, 0))
    torch.testing.assert_close(flat(kept.gauss_newton.product(v), names), flat(anew.gauss_newton.product(v), names))
    assert (len(kept.gauss_newton._graphs.kept), len(anew.gauss_newton._graphs.kept)) == (3, 0)


def test_a_dense_matrix_beyond_reason_and_an_unknown_layer_are_refused(monkeypatch):
    case = classification("mlp")
    monkeypatch.setattr("sharpscope.curvature.dense.MOST", 10)
    with pytest.raises(UsageError, match="a dense matrix of 136 weights is too large"):
        dense(case.point, case.layers.layers["1"])
    with pytest.raises(UsageError, match="layer 'x' is unknown"):
        density(case.point, case.layers, "x")
    with pytest.raises(UsageError, match="no path, so there is no direction"):
        dict(Directional()(case.point, case.layers, seed=0))


def test_losses_by_name():
    z, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    mse = nn.functional.mse_loss(z, nn.functional.one_hot(y, 3).double())
    assert float(squared_error(z, y) / 4) == pytest.approx(float(mse))
    smooth = nn.functional.cross_entropy(z, y, label_smoothing=0.1)
    assert float(loss_from("cross_entropy", 0.1)(z, y) / 4) == pytest.approx(float(smooth))
    with pytest.raises(UsageError, match="did you mean 'cross_entropy'"):
        loss_from("crossentropy")
    with pytest.raises(UsageError, match=r"label_smoothing=0\.1 with squared_error"):
        loss_from("squared_error", 0.1)


def test_the_contrastive_loss_is_that_of_transformers():
    net, pairs = TwoTowers().double().eval(), two_tower().point.objective.batches[0].inputs
    with torch.no_grad():
        found = net.clip(input_ids=pairs["text"], pixel_values=pairs["image"], return_loss=True)
    assert float(contrastive(found.logits_per_image, torch.zeros(6)) / 6) == pytest.approx(float(found.loss))


def test_batches_helper_is_unequal():
    assert [len(b.targets) for b in batches(*images(), (7, 3, 2))] == [7, 3, 2]
