"""No model is changed by being measured: what a forward would leave behind is put back, or refused by name."""

import copy

import pytest
import torch
from test_scan_inputs import loader
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

import sharpscope as ss
from sharpscope.errors import ModelError


def scan(models, data=None, **settings):
    known = {"alphas": [0, 1], "measures": ["trace"], "progress": False}
    return ss.scan(*models, data or loader(), **known | settings)


def ends(make):
    """Return a model in evaluation mode and a copy with all weights moved."""
    torch.manual_seed(0)
    first = make().eval()
    second = copy.deepcopy(first)
    with torch.no_grad():
        for tensor in second.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
    return first, second


def tokens(count=30):
    x = torch.randint(0, 10, (count, 4), generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, torch.arange(count) % 3), batch_size=16)


def test_attributes_that_are_computed_from_weights_stay_those_of_the_model():
    models = ends(lambda: nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 3)))
    for model in models:
        prune.l1_unstructured(model[0], "weight", 0.3)
        with torch.no_grad():
            model(torch.zeros(1, 8))
    before = [model[0].weight for model in models]
    scan(models)
    ss.verify(models[0], loader())
    assert all(model[0].weight is weight for model, weight in zip(models, before, strict=True))
    assert torch.equal(copy.deepcopy(models[1])[0].weight, before[1])


class Caching(nn.Module):
    """A linear layer that keeps what it found last, and of how many examples."""

    def __init__(self):
        super().__init__()
        self.linear, self.shift, self.length = nn.Linear(8, 3), None, 0

    def forward(self, x):
        if self.length < len(x):
            self.shift, self.length = torch.arange(float(len(x)))[:, None], len(x)
        self.seen = self.linear(x) + 0 * self.shift[: len(x)]
        return self.seen


class Remembering(nn.Module):
    """As LeViT does: in evaluation mode what was computed from weights is kept, here in one of four places."""

    def __init__(self, place, from_weights=True, graph=True):
        super().__init__()
        self.linear, self.bias = nn.Linear(8, 3), nn.Parameter(torch.zeros(6))
        self.held, self.kept, self.place, self.from_weights, self.graph = {}, None, place, from_weights, graph

    def train(self, mode=True):
        if mode:
            self.held, self.kept = {}, None
        return super().train(mode)

    def shift(self):
        with torch.set_grad_enabled(self.graph and torch.is_grad_enabled()):
            return self.bias[torch.tensor([0, 2, 4])] if self.from_weights else torch.randn(3)

    def forward(self, x):
        if self.place.startswith("dict"):
            if "shift" not in self.held:
                self.held["shift"] = self.shift() if self.place == "dict" else (self.shift(), 1)
            return self.linear(x) + (self.held["shift"] if self.place == "dict" else self.held["shift"][0])
        if self.kept is None:
            self.kept = self.shift() if self.place == "attribute" else (len(x), self.shift())
        return self.linear(x) + (self.kept if self.place == "attribute" else self.kept[1])


def called(models, which=(0, 1)):
    with torch.no_grad():
        for place in which:
            models[place](torch.zeros(2, 8))
    return models


@pytest.mark.parametrize("measures", [["trace"], []])
@pytest.mark.parametrize("place", ["dict", "attribute", "tuple", "dict of tuples"])
def test_what_an_earlier_call_computed_from_weights_is_not_measured_with(place, measures):
    models = called(ends(lambda: Remembering(place)))
    name = "held" if place.startswith("dict") else "kept"
    with pytest.raises(ModelError, match=rf"^{name} holds what an earlier call .*\n  fix: model.train\(\) and then"):
        scan(models, measures=measures)
    models[0].train().eval()
    found = scan(models, measures=measures)
    assert found.meta["unused"] == []
    (x, y) = loader().dataset.tensors
    expected = nn.functional.cross_entropy(models[1](x), y).item()
    assert found.evals.query("measure == 'loss' and alpha == 1")["value"].item() == pytest.approx(expected, rel=1e-6)


def test_nor_where_it_was_computed_without_gradients():
    models = ends(lambda: Remembering("dict", graph=False))
    with torch.no_grad():
        models[0].bias.add_(1.0)
    with pytest.raises(ModelError, match=r"^held holds"):
        scan(called(models))


def test_constants_and_random_draws_that_are_kept_do_no_harm():
    models = ends(lambda: Remembering("attribute", from_weights=False))
    called(models, [0])
    models[1].kept = models[0].kept
    drawn = models[0].kept
    assert not scan(models).layers.empty
    assert models[0].kept is drawn


def test_a_cache_and_the_number_that_goes_with_it_are_put_back_together():
    models = ends(Caching)
    kept = models[0](torch.zeros(2, 8)).detach()
    models[0].seen, shift = kept, models[0].shift
    scan(models)
    assert models[0].length == 2
    assert models[0].shift is shift
    assert models[0].seen is kept
    assert not hasattr(models[1], "seen")


class Bag(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.bag, self.last = nn.EmbeddingBag(10, 4, **settings), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.bag(x))


class Words(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.words, self.last = nn.Embedding(10, 4, **settings), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.words(x).mean(1))


def lazy():
    return nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, 3)).eval()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Words(max_norm=0.5), r"max_norm \('words'\), which overwrites its weights"),
        (lambda: Bag(max_norm=0.5), r"max_norm \('bag'\), which overwrites its weights"),
        (lambda: Words(sparse=True), r"sparse gradients \('words'\).*\n  fix: set .sparse = False"),
        (lazy, r"'0.weight' of no shape yet: .*\n  fix: run it once on a batch"),
        (lambda: nn.Linear(4, 3, device="meta"), r"'weight' on the meta device: it holds no numbers\n  fix: load"),
    ],
)
def test_weights_that_are_not_there_or_do_not_stay_are_named(make, said):
    model = make().eval()
    before = copy.deepcopy(model.state_dict()) if make is not lazy else {}
    for called in (lambda: ss.scan(model, model, tokens(), progress=False), lambda: ss.verify(model, tokens())):
        with pytest.raises(ModelError, match=rf"the (zero-shot )?model has .*{said}"):
            called()
    assert all(tensor.is_meta or torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
