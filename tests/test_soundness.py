"""Models whose gradients or second derivatives would be silently wrong are refused in a sentence."""

import pytest
import torch
from nets import NETS, images, made, objective
from test_models_kept import Bag, ends, scan, tokens
from test_scan_inputs import loader
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import sharpscope as ss
from sharpscope import doctor
from sharpscope.curvature.point import Point
from sharpscope.errors import ModelError
from sharpscope.losses import cross_entropy
from sharpscope.network import network
from sharpscope.objective import Batch, Objective
from sharpscope.soundness import asymmetry


class Middle(nn.Module):
    """Two linear layers and what is between them."""

    def __init__(self, middle, width=6):
        super().__init__()
        self.first, self.last, self.middle = nn.Linear(8, width), nn.Linear(width, 3), middle

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


# --- activation checkpointing


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.block, self.last = nn.Linear(8, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 3)
        self.reentrant = reentrant

    def forward(self, x):
        return self.last(checkpoint(self.block, self.first(x), use_reentrant=self.reentrant))


@pytest.mark.parametrize(
    ("reentrant", "said"),
    [
        (False, "runs again while its gradient is computed, then with its own"),
        (True, "gradient cannot be computed: .*checkpoint"),
    ],
    ids=["again", "reentrant"],
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, of forwards without gradients
def test_activation_checkpointing_is_refused_where_gradients_are_taken(reentrant, said):
    models = ends(lambda: Checkpointed(reentrant))
    for called in (lambda: scan(models), lambda: scan(models, measures=["m_sharpness"])):
        with pytest.raises(ModelError, match=rf"{said}(.|\n)*fix: if it checkpoints activations"):
            called()
    with pytest.raises(ModelError, match=said):
        ss.verify(models[0], loader())


def test_activation_checkpointing_does_no_harm_where_none_are_taken():
    models = ends(lambda: Checkpointed(False))
    (x, y) = loader().dataset.tensors
    found = scan(models, measures=[]).evals.query("measure == 'loss' and alpha == 1")["value"].item()
    assert found == pytest.approx(nn.functional.cross_entropy(models[1](x), y).item(), rel=1e-6)


# --- second derivatives


class Once(torch.autograd.Function):
    """tanh, its backward constant to autograd."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - torch.tanh(x) ** 2)


def test_a_wrong_second_derivative_is_refused_where_it_is_wanted():
    models = ends(lambda: Middle(Once.apply))
    with pytest.raises(ModelError, match=r"Hessian is not symmetric, by .*\n  fix: .*m_sharpness"):
        scan(models)
    assert not scan(models, measures=["m_sharpness"]).layers.empty
    found = ss.verify(models[0], loader())
    assert not found[found["quantity"] == "symmetry"]["agrees"].item()


def product_asymmetry(model, x, y):
    net = network(model, "the model")
    weights = {**net.buffers, **net.parameters}
    point = Point(Objective(net.forward, cross_entropy, (Batch(x, y),)), weights, list(net.parameters))
    return asymmetry(point.product, point.gradient)


@pytest.mark.parametrize("width", [4, 2048])
def test_asymmetry_is_as_plain_in_a_wide_network(width):
    torch.manual_seed(0)
    (x, y) = loader().dataset.tensors
    assert product_asymmetry(Middle(Once.apply, width).eval(), x, y) > 0.03
    assert product_asymmetry(Middle(torch.tanh, width).eval(), x, y) < 3e-6


@pytest.mark.parametrize("kind", NETS)
def test_sound_networks_are_far_from_the_limit(kind):
    assert product_asymmetry(made(kind, dtype=torch.float32), *images(dtype=torch.float32)) < 3e-6
    point = Point(*objective(made(kind)))
    assert asymmetry(point.product, point.gradient) < 1e-13


def test_saturated_models_are_not_taken_for_broken_ones():
    """Of a loss of 1e-9 in float32 the Hessian is mostly rounding."""
    models = ends(lambda: nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3)))
    (x, _) = loader().dataset.tensors
    with torch.no_grad():
        for model in models:
            model[2].weight.mul_(100)
    certain = models[0](x).topk(2).values.diff().abs().flatten() > 15
    x = x[certain]
    data = DataLoader(TensorDataset(x, models[0](x).argmax(1)), batch_size=8)
    assert len(x) > 8
    assert product_asymmetry(models[0], x[:4], models[0](x[:4]).argmax(1)) > 1e-4
    assert not scan(models, data, measures=["directional"]).layers.empty


def distances(x):
    return torch.cdist(x[:, :, None], x[:, :, None].flip(1) + 0.1).sum(2)


@pytest.mark.parametrize(
    ("make", "data", "settings"),
    [
        (Bag, tokens(), {}),
        (lambda: Middle(distances), loader(), {}),
        (lambda: Middle(torch.tanh), loader(), {"loss": nn.MultiMarginLoss(reduction="sum")}),
    ],
    ids=["EmbeddingBag", "cdist", "MultiMarginLoss"],
)
@pytest.mark.parametrize("measure", ["trace", "gauss_newton_trace"])
def test_an_operation_without_a_second_derivative_is_named(make, data, settings, measure):
    models = ends(make)
    with pytest.raises(ModelError, match=r"no second derivative in torch: .*derivative.*\n  fix: .*m_sharpness"):
        scan(models, data, measures=[measure], **settings)
    assert not scan(models, data, measures=["m_sharpness"], **settings).layers.empty
    if not settings:
        with pytest.raises(ModelError, match="no second derivative in torch"):
            ss.verify(models[0], data)


def test_doctor_fails_a_device_without_second_derivatives_and_goes_on(monkeypatch):
    of, weights, _ = objective(made("mlp"))
    broken = Objective(of.forward, nn.MultiMarginLoss(reduction="sum"), of.batches)
    monkeypatch.setattr(doctor, "small_problem", lambda _: (broken, weights))
    (found,) = [check for check in doctor.examine() if check.name == "second derivatives on cpu"]
    assert found.passed is False
    assert "cannot be differentiated twice" in found.found


class Angles(nn.Module):
    """Cosines of features with those of classes, as a CLIP's."""

    def __init__(self):
        super().__init__()
        self.body, self.classes = nn.Sequential(nn.Linear(8, 12), nn.Tanh()), nn.Parameter(torch.randn(3, 12))

    def forward(self, x):
        return nn.functional.normalize(self.body(x), dim=1) @ nn.functional.normalize(self.classes, dim=1).T


def sharp(z, y):
    return nn.functional.cross_entropy(300 * z, y, reduction="sum")


class Called(nn.Sequential):
    def __call__(self, x):
        return self.forward(x)


class Factored(nn.Module):
    """A factor of a matrix that is positive definite at both ends, and not when its entries are moved at random."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(8, 3)
        self.square = nn.Parameter(torch.eye(8) + 0.995 * (1 - torch.eye(8)))

    def forward(self, x):
        return self.last(x @ torch.linalg.cholesky(self.square))


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (Angles, {"loss": sharp}),
        (lambda: Called(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3)), {}),
        (Factored, {}),
    ],
    ids=["a loss with a temperature", "a call of its own", "a matrix that must be positive"],
)
def test_sound_models_of_other_kinds_are_scanned(make, settings):
    models = ends(make)
    if make is Factored:
        models[1].square.data.copy_(models[0].square)
    if make is Angles:
        (x, _) = loader().dataset.tensors
        settings["loader"] = DataLoader(TensorDataset(x, models[0](x).argmax(1)), batch_size=8)
    data = settings.pop("loader", None)
    found = scan(models, *([data] if data else []), **settings)
    assert not found.layers.empty
