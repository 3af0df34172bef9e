"""Arguments that a stranger gives: taken where they are plainly meant, else refused in a sentence with a way out."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from test_scan_inputs import loader, network, scan
from torch import nn
from torch.nn.functional import cross_entropy

import sharpscope as ss
from sharpscope.curvature.estimate import Estimate
from sharpscope.curvature.trace import Trace
from sharpscope.errors import DataError, ModelError, OutputError, UsageError
from sharpscope.search import RecipeSearch

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


class Plain:
    """An own measure that forgot to be a dataclass."""

    name = "mine"

    def __call__(self, point, layers, seed):
        for layer in (*layers.layers, "model"):
            yield layer, Estimate(1.0, 0.0, 1, True, np.ones(1))


@dataclass(frozen=True)
class Own(Plain):
    name: str = "mine"


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({"alphas": np.int64(3)}, {"alphas": 3}),
        ({"alphas": np.linspace(0, 1, 3)}, {"alphas": 3}),
        ({"alphas": (alpha for alpha in (0, 1))}, {}),
        ({"limit": np.int64(9), "batch_size": np.int32(4), "seed": np.int64(0)}, {"limit": 9, "batch_size": 4}),
        ({"memory": np.int64(2**33)}, {"memory": 2**33}),
        ({"measures": Trace()}, {"measures": ["trace"]}),
        ({"recipes": None}, {}),
    ],
)
def test_what_is_plainly_meant_is_taken(settings, same, tmp_path):
    assert ss.open(scan(**settings).save(tmp_path)).layers.equals(scan(**same).layers)


def test_limits_of_numpy_are_taken_for_interventions(tmp_path):
    found = scan(ood={"far": loader(seed=6)}, interventions=True, intervention_limit=np.int64(9), out=tmp_path)
    assert set(found.interventions.query("split != 'ood mean'")["n"]) == {9}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        *(({"alphas": odd}, r"alphas=.*: needs a whole number of points, or") for odd in (3.0, None, "12", [0, None])),
        ({"alphas": 1}, r"alphas=1: needs a whole number, 2 or more\n  fix: a path has two ends"),
        ({"ood": [1]}, "ood is a list: needs loaders by name"),
        ({"ood": {1: loader()}}, "a set called 1: needs names in text"),
        ({"ood": {" ": loader()}}, "a set called ' ': needs names in text"),
        ({"patterns": ["0"]}, "patterns=.* needs layer ids with regular expressions"),
        ({"patterns": {"stem": 3}}, "the pattern 3 of 'stem' is no regular expression"),
        *(({name: 2.5}, f"{name}=2.5: needs a whole number") for name in ("limit", "batch_size", "seed", "chains")),
        *(({"seed": odd}, f"seed={odd}: needs a whole number, 0 or more") for odd in (None, True, -1)),
        ({"limit": 0}, r"limit=0: needs a whole number, 1 or more\n  fix: .*--limit all \(limit=None\)"),
        ({"memory": "1GiB"}, "memory='1GiB': needs a whole number"),
        ({"interventions": True, "intervention_limit": 9.5}, "intervention_limit=9.5: needs a whole number"),
        *(({"interventions": odd}, f"interventions={odd!r}: neither yes nor no") for odd in (3, 0, "no", "off")),
        *(({"recipes": odd}, f"recipes={odd!r}: neither yes nor no") for odd in (5, "no")),
        ({"loss": None}, "loss=None is no loss"),
        ({"loss": nn.CrossEntropyLoss}, r"is a class, no function\n  fix: .*CrossEntropyLoss\(reduction='sum'\)"),
        ({"loss": lambda z: z.sum()}, r"the loss fails on outputs \(.*, 3\) .* and class numbers .*: .*positional"),
        ({"loss": nn.BCEWithLogitsLoss(reduction="sum")}, r"the loss fails on .*: Target size .*\n  fix: .*one_hot"),
        ({"loss": lambda z, y: torch.zeros(())}, "the loss does not depend on the model's outputs"),
        (
            {"loss": lambda z, y: cross_entropy(z.detach(), y, reduction="sum")},
            "does not depend on the model's outputs",
        ),
        ({"measures": None}, r"measures=None\n  fix: measures=\[\]"),
        ({"measures": [3]}, "measure 3 is none: needs a name in text"),
        ({"measures": [Trace]}, r"measure <class .* is none: .*\n  fix: Trace\("),
        ({"measures": [Plain()]}, "measure 'mine' is no dataclass.*\n  fix: .* above class Plain"),
        *(({"measures": [Own(n)]}, f"{n!r} stands for an evaluation") for n in ("accuracy", "loss", "evaluation")),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_way_out(settings, said):
    with pytest.raises(UsageError, match=said):
        scan(**settings)


def test_a_measure_of_ones_own_is_measured():
    assert set(scan(measures=[Own()]).layers["measure"]) == {"mine"}


def test_a_recipe_search_tries_a_whole_number_of_recipes():
    assert RecipeSearch(np.int64(5)).evaluations == 5
    with pytest.raises(UsageError, match=r"evaluations=2.5: needs a whole number, 1 or more"):
        RecipeSearch(2.5)


@pytest.mark.parametrize("data", [3, "id", None])
def test_what_is_no_loader_is_named(data):
    with pytest.raises(DataError, match=f"'id' is a {type(data).__name__}, no loader\n  fix: a loader of batches"):
        ss.scan(network(0), network(1), data, progress=False)
    with pytest.raises(DataError, match=r"'data' is a .*, no loader"):
        ss.verify(network(0), data)


class Head(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.inner, self.change = network(0), change

    def forward(self, x):
        return self.change(self.inner(x))


WAYS = {
    "no parameters": (nn.Identity, r"\(Identity\) has no floating-point parameters\n  fix: a model with weights"),
    "no output": (partial(Head, lambda z: ()), "the model returned tuple"),
    "integers": (
        partial(Head, lambda z: z.round().long()),
        r"returned Tensor of shape .* torch.int64\n.*floating-point",
    ),
    "detached": (partial(Head, torch.Tensor.detach), "autograd sees no weight in the model's logits"),
    "DataParallel": (lambda: nn.DataParallel(network(0)), r"is a DataParallel: .*\n  fix: .* model\.module"),
    "scripted": (lambda: torch.jit.script(network(0)), r"is scripted .*\n  fix: the module before torch\.jit"),
    "compiled": (lambda: torch.compile(network(0)), r"is a OptimizedModule: .*\n  fix: .* before torch\.compile"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_cannot_be_measured_names_its_own_way_out(way):
    make, said = WAYS[way]
    with pytest.raises(ModelError, match=said):
        ss.scan(make().eval(), make().eval(), loader(), alphas=[0, 1], progress=False)
    with pytest.raises(ModelError, match=said):
        ss.verify(make().eval(), loader())


def test_verify_refuses_what_it_cannot_judge():
    for limit in (0, 2.5):
        with pytest.raises(UsageError, match=f"limit={limit}: needs a whole number"):
            ss.verify(network(0), loader(), limit=limit)
    with pytest.raises(DataError, match=r"'data' has labels 5\.\.7, the model has 3 outputs"):
        ss.verify(network(0), [(x, y + 5) for x, y in loader()])


def test_layers_of_no_model_are_refused():
    with pytest.raises(ModelError, match=r"the model is a NoneType\n  fix: a torch.nn.Module"):
        ss.layers(None)


def test_points_to_give_up_are_a_number():
    found = scan(alphas=3)
    assert found.recommend(keep_id=np.float32(-100)) == found.recommend(keep_id=-100)
    with pytest.raises(UsageError, match="keep_id is '1': points of ID accuracy"):
        found.recommend(keep_id="1")


def test_a_scan_is_saved_in_no_file(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(OutputError, match=r"notes is a file; a scan is a folder of files\n  fix: save\(FOLDER\)"):
        scan().save(tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_merge_of_modules_in_memory_names_a_way_that_works(tmp_path):
    recommended, zs, ft = scan(alphas=3).recommend(), tmp_path / "zs.pt", tmp_path / "ft.pt"
    with pytest.raises(UsageError, match=r"a file of its state dict, torch.save\(model.state_dict\(\), FILE\)"):
        recommended.merge(tmp_path / "new.pt")
    for place, seed in ((zs, 0), (ft, 1)):
        torch.save(network(seed).state_dict(), place)
    assert recommended.merge(tmp_path / "new.pt", zero_shot=zs, fine_tuned=ft).exists()


def normed(norm, seed):
    torch.manual_seed(seed)
    return nn.Sequential(norm(nn.Linear(8, 12)), nn.Linear(12, 3))


NORMS = {
    "spectral": (nn.utils.parametrizations.spectral_norm, "what was computed from the weights at the ends"),
    "old spectral": (nn.utils.spectral_norm, "what was computed from the weights at the ends"),
    "batch": (lambda linear: nn.Sequential(linear, nn.BatchNorm1d(12)), "batch-norm statistics are wrong"),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
def test_batch_norm_is_named_only_where_the_buffers_are_its_own(kind):
    norm, said = NORMS[kind]
    pair = [normed(norm, seed) for seed in (0, 1)]
    for model in pair:
        model(torch.randn(9, 8))  # moves the statistics
    found = ss.scan(*(m.eval() for m in pair), loader(), alphas=[0, 1], measures=[], progress=False)
    note = next(note for note in found.meta["warnings"] if "buffers differ" in note)
    assert said in note
    assert ("batch-norm" in note) == (kind == "batch")
