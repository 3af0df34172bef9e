"""What a scan is asked for in ways that look right: it measures what was meant, or says what it needs."""

import os
import subprocess
import sys
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import sharpscope as ss
from sharpscope.criticality import criticality
from sharpscope.errors import DataError, MismatchError, ModelError, UsageError
from sharpscope.finetune import Schedule
from sharpscope.losses import code_of


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 3)).eval()


def loader(count=30, seed=5):
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, torch.arange(count) % 3), batch_size=16)


def scan(data=None, **settings):
    known = {"alphas": [0, 1], "measures": ["directional"], "limit": None, "progress": False}
    return ss.scan(network(0), network(1), data or loader(), **known | settings)


# --- names of sets


def test_sharpness_on_other_data_of_a_sets_name_is_refused_before_anything_is_measured(tmp_path):
    for sets in ({}, {"ood": {"val": loader(seed=6)}}):
        first = ss.Split(loader(), "id" if sets else "val")
        with pytest.raises(UsageError, match="'val' is used twice"):
            scan(first, sharpness_on=ss.Split(loader(seed=7), "val"), out=tmp_path, **sets)
    assert not list(tmp_path.iterdir())


def test_sharpness_on_a_sets_own_data_is_on_that_set():
    found = scan(ood={"far": loader(seed=6)}, sharpness_on=ss.Split(loader(seed=6), "far"))
    assert (found.id_split, list(found.ood_splits), found.meta["curvature_split"]) == ("id", ["far"], "far")


class Tied(nn.Module):
    def __init__(self, *, tied):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)
        if tied:
            self.second.weight = self.first.weight
        self.prompt = nn.Parameter(torch.zeros(0, 8))  # of no token

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()) + self.prompt.sum(0))


@pytest.mark.parametrize("order", [1, -1])
def test_weights_that_are_tied_in_one_model_only_are_named(order):
    roles = ("the zero-shot model", "the fine-tuned model")[::order]
    said = f"'second.weight' is tied to 'first.weight' in {roles[0]} and has weights of its own in {roles[1]}"
    with pytest.raises(MismatchError, match=rf"{said}\n  fix: tie it in both or in neither"):
        ss.scan(*[Tied(tied=tied).eval() for tied in (True, False)][::order], loader(), progress=False)


def test_a_parameter_without_entries_has_no_sharpness_and_stops_no_measure():
    ends = [Tied(tied=True).eval() for _ in range(2)]
    found = ss.scan(*ends, loader(), alphas=[0, 1], interventions=True, ood={"far": loader(seed=6)}, progress=False)
    assert set(found.layers["layer"]) == {"first", "head", "model"}


@pytest.mark.parametrize("name", ["mean OOD", "ood mean"])
def test_no_set_is_called_as_the_mean_over_sets(name):
    with pytest.raises(UsageError, match=f"{name!r} stands for the mean over OOD sets"):
        scan(ood={name: loader()})


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, pixel_values, pixel_mask=None, train=False):
        return self.linear(pixel_values if pixel_mask is None else pixel_values * pixel_mask)


@pytest.mark.parametrize("form", ["mapping", "pair"])
def test_a_mask_that_the_forward_takes_is_not_left_out_silently(form):
    x, y = next(iter(loader()))
    inputs = {
        "pixel_values": x,
        "pixel_mask": torch.zeros_like(x),
        "path": ["?"] * len(x),
        "head_mask": None,
        "train": False,
    }
    data = [{**inputs, "labels": y} if form == "mapping" else (inputs, y)]
    net = Masked().eval()
    calls = (
        lambda: ss.scan(net, net, [(x, y)], ood={"far": data}, alphas=[0], measures=[], progress=False),
        lambda: ss.verify(net, data),
        lambda: criticality(net, net, data),
    )
    for called, name in zip(calls, ("far", "data", "id"), strict=True):
        with pytest.raises(DataError, match=f"'{name}' gives 'pixel_mask' beside the images.*\n  fix: .*one tensor"):
            called()
    assert not ss.verify(network(0), data).empty  # of which no forward takes a mask


# --- losses of one's own


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (cross_entropy, "it is no sum over examples"),
        (nn.CrossEntropyLoss(), "it is no sum over examples"),
        (partial(cross_entropy, reduction="none"), r"a tensor of shape \(30,\), not a tensor of one number"),
        (lambda z, t: cross_entropy(z, t, reduction="sum").item(), "is float, not a tensor of one number"),
    ],
)
def test_a_loss_that_is_no_sum_over_examples_is_refused(loss, said):
    with pytest.raises(UsageError, match=said):
        scan(loss=loss)


@pytest.mark.parametrize("by", [1e-9, 0.0])
def test_a_mean_is_refused_however_small_its_values(by):
    """As where a model is saturated; with zeros what the loss does with other outputs tells."""

    def loss(z, t):
        if by:
            return by * cross_entropy(z, t)
        return (cross_entropy(z, t, reduction="none") * (z.abs().amax(1) > 0.9)).mean()

    with pytest.raises(UsageError, match="it is no sum over examples"):
        scan(loss=loss)
    scan(loss=lambda z, t: 1e-9 * cross_entropy(z, t, reduction="sum"))


def test_saturated_models_in_float32_are_warned_of_and_a_second_run_keeps_the_warning(tmp_path):
    def sure(dtype):
        data = loader()
        x = torch.nn.functional.one_hot(data.dataset.tensors[1], 8).to(dtype)
        nets = [nn.Sequential(nn.Linear(8, 3, bias=False)).eval() for _ in range(2)]
        for net, by in zip(nets, (1.0, 30.0), strict=True):
            net[0].weight = nn.Parameter(by * torch.eye(3, 8))
            net.to(dtype)
        settings = {"alphas": [0, 1], "measures": ["directional"], "progress": False, "out": tmp_path / str(dtype)}
        return ss.scan(*nets, [(x, data.dataset.tensors[1])], **settings).meta["warnings"]

    said = sure(torch.float32)
    assert [text for text in said if "below 1e-06 (at alpha 1" in text] == said
    assert sure(torch.float32) == said
    assert sure(torch.float64) == []


def test_a_sum_of_ones_own_gives_the_numbers_of_the_named_loss_in_batches_of_any_size():
    values = [
        scan(loss=loss, batch_size=size).layers["value"].to_numpy()
        for loss, size in (("cross_entropy", 30), (nn.CrossEntropyLoss(reduction="sum"), 30), ("cross_entropy", 7))
    ]
    for value in values[1:]:
        np.testing.assert_allclose(value, values[0], rtol=1e-4)


def test_smoothing_beside_a_loss_of_ones_own_is_refused():
    with pytest.raises(UsageError, match=r"label_smoothing=0\.1 beside a loss of your own"):
        scan(loss=partial(cross_entropy, reduction="sum"), label_smoothing=0.1)


def test_a_loss_that_was_edited_is_another_plan(tmp_path):
    def tempered(by):
        def loss(z, t):
            return cross_entropy(z / by, t, reduction="sum")

        return loss

    first = scan(loss=tempered(1.0), out=tmp_path)
    assert scan(loss=tempered(1.0), out=tmp_path).layers.equals(first.layers)
    with pytest.raises(UsageError, match="loss_code differ"):
        scan(loss=tempered(4.0), out=tmp_path)


def written(source, **known):
    """A loss as a notebook's cell defines it, among globals."""
    there = {"cross_entropy": cross_entropy, "nn": nn, "__name__": "__main__", **known}
    exec(source, there)
    return there["loss"]


A_GLOBAL = "def loss(z, t): return by * cross_entropy(z, t, reduction='sum')"
A_HELPER = """
def scaled(z): return z / {by}
def loss(z, t): return sum(cross_entropy(scaled(z), t, reduction='sum') for _ in range(1))
"""
A_CLASS = """
class Loss:
    def __call__(self, z, t): return {by} * cross_entropy(z, t, reduction='sum')
loss = Loss()
"""
A_METHOD = A_CLASS.replace("__call__", "of") + "loss = loss.of"
A_MODEL = """
teacher = nn.Linear(2, 2).requires_grad_(False)
teacher.weight.copy_(nn.init.constant_(teacher.weight, {by}))
def loss(z, t): return cross_entropy(z, t, reduction='sum') + 0 * teacher.weight.sum()
"""


WRITTEN = {"global": A_GLOBAL, "helper": A_HELPER, "class": A_CLASS, "method": A_METHOD, "model": A_MODEL}


@pytest.mark.parametrize("source", WRITTEN.values(), ids=WRITTEN)
def test_what_a_loss_reads_and_calls_is_part_of_its_code(source):
    def of(by):
        torch.manual_seed(0)
        return code_of(written(source.format(by=by), by=by))

    assert of(1.0) == of(1.0)
    assert of(1.0) != of(2.0)


def test_other_globals_than_a_loss_reads_are_not_part_of_its_code():
    source = "def loss(z, t): return cross_entropy(z, t, reduction='none').sum()"
    assert code_of(written(source, sum=3)) == code_of(written(source, sum=4, other=5))


def test_the_code_of_a_loss_is_known_but_for_named_ones():
    marks = [code_of(loss) for loss in (nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(), cross_entropy)]
    assert len(set(marks)) == 3
    assert code_of(nn.CrossEntropyLoss()) == marks[1]
    assert "loss_code" not in scan().meta["plan"]


IN_A_PROCESS = """
from functools import partial
from sharpscope.losses import code_of, name_of
import torch.nn.functional as F
class Scaled:
    def __init__(self): self.by, self.classes = object(), {"cat", "dog", "newt"}
    def __call__(self, z, t): return F.cross_entropy(z, t, reduction="sum")
def captured(by):
    return lambda z, t: F.cross_entropy(z, t, reduction="sum") if by not in {"cat", "dog", "newt"} else z.sum()
for loss in (Scaled(), captured("newt"), captured(Scaled), partial(captured(3), t=Scaled.__call__)):
    print(name_of(loss), code_of(loss))
"""


def test_names_and_code_of_losses_are_the_same_in_every_process():
    said = [
        subprocess.run(
            [sys.executable, "-c", IN_A_PROCESS], env={**os.environ, "PYTHONHASHSEED": seed}, check=True,
            capture_output=True, text=True,
        ).stdout
        for seed in ("1", "2", "3")
    ]  # fmt: skip
    assert said[0] == said[1] == said[2]
    assert len(set(said[0].splitlines())) == 4


# --- the rest


def test_classes_that_a_set_is_judged_by_are_part_of_the_plan(tmp_path):
    labelled = [(x, y % 2) for x, y in loader()]
    scan(ood={"far": ss.Split(labelled, "far")}, out=tmp_path)
    with pytest.raises(UsageError, match=r"data\.far differ"):
        scan(ood={"far": ss.Split(labelled, "far", columns=[0, 1])}, out=tmp_path)


@pytest.mark.parametrize("name", ["medium", "hihg"])
def test_no_other_precision_is_taken(name):
    with pytest.raises(UsageError, match=f"precision={name!r}"):
        scan(precision=name)


def test_points_of_linspace_are_those_of_their_number():
    assert scan(alphas=np.linspace(0, 1, 11)).meta["alphas"] == scan(alphas=11).meta["alphas"]


def test_a_pattern_that_is_none_and_a_layer_that_is_not_there_are_named():
    with pytest.raises(UsageError, match=r"the pattern '\(' of 'mixers' is no regular expression"):
        scan(patterns={"mixers": "("})
    with pytest.raises(UsageError, match="there is no layer 'zz'"):
        ss.verify(network(0), loader(), layer="zz")


def test_clipping_everything_away_is_refused():
    with pytest.raises(UsageError, match="clip above 0"):
        Schedule(steps=20, clip=0)


# --- models and what is around a call


class TwoNames(nn.Module):
    """Its head is a layer of its body."""

    def __init__(self, seed):
        super().__init__()
        self.body = network(seed)
        self.head = self.body[2]

    def forward(self, x):
        return self.head(self.body[1](self.body[0](x))) + self.body(x)


def test_submodules_with_two_names_get_their_tensors_back():
    models = [TwoNames(seed).eval() for seed in (0, 1)]
    before = [dict(model.named_parameters(remove_duplicate=False)) for model in models]
    first, again = (ss.scan(*models, loader(), alphas=3, measures=["trace"], progress=False) for _ in range(2))
    ss.verify(models[0], loader())
    for model, known in zip(models, before, strict=True):
        now = dict(model.named_parameters(remove_duplicate=False))
        assert list(now) == list(known)
        assert all(now[name] is known[name] for name in known)
    assert first.layers.equals(again.layers)
    (x, y), ends = next(iter(DataLoader(loader().dataset, batch_size=30))), first.evals.query("measure == 'loss'")
    for model, alpha in zip(models, (0, 1), strict=True):
        found = ends["value"][ends["alpha"] == alpha].item()
        assert found == pytest.approx(cross_entropy(model(x), y).item(), rel=1e-6)


class Called(nn.Module):
    """A layer of a given name, and a head."""

    def __init__(self, seed, name):
        super().__init__()
        torch.manual_seed(seed)
        self.name = name
        self.add_module(name, nn.Linear(8, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(getattr(self, self.name)(x)))


def test_a_layer_that_is_called_model_is_not_taken_for_the_whole_network():
    found = {}
    for name in ("body", "model"):
        models = [Called(seed, name).eval() for seed in (0, 1)]
        result = ss.scan(*models, loader(), alphas=3, measures=["lambda_max", "directional"], progress=False)
        layers = result.layers.replace({"layer": {"body": "model_"}})
        found[name] = layers.sort_values(["alpha", "measure", "layer"]).reset_index(drop=True)
    assert set(found["model"]["layer"]) == {"model_", "head", "model"}
    columns = ["alpha", "measure", "layer"]
    assert found["model"][columns].equals(found["body"][columns])
    same = found["model"]["measure"] == "directional"  # random start vectors go by the names of tensors
    np.testing.assert_allclose(found["model"]["value"][same], found["body"]["value"][same], rtol=1e-6)
    np.testing.assert_allclose(found["model"]["value"], found["body"]["value"], rtol=0.02)
    with pytest.raises(UsageError, match="a layer of patterns is called 'model'"):
        scan(patterns={"model": "0"})


class Several(nn.Module):
    """Gives a tuple: logits, or features first."""

    def __init__(self, kind, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head, self.kind = nn.Linear(8, 6), nn.Linear(6, 3), kind

    def forward(self, x):
        features = self.body(x)
        return {
            "states": lambda: (self.head(features), features[:, None], None, x.long()),  # as transformers' tuples
            "features": lambda: (features, self.head(features)),
            "teacher": lambda: (self.head(features), self.head(features) + 1),  # as of distilled ones in evaluation
            "headless": lambda: features,
        }[self.kind]()


def test_of_logits_of_one_shape_the_first_are_judged():
    ends = [Several("teacher", seed).eval() for seed in (0, 1)]
    (x, y) = loader().dataset.tensors
    found = ss.scan(*ends, loader(), alphas=2, measures=[], progress=False).evals.query(
        "measure == 'loss' and alpha == 1"
    )
    assert found["value"].item() == pytest.approx(cross_entropy(ends[1](x)[0], y).item(), rel=1e-6)


def test_a_tuple_with_features_beside_the_logits_is_refused():
    ends = [Several("features", seed).eval() for seed in (0, 1)]
    said = r"returned a tuple with 2 matrices, of shapes \(\d+, 6\), \(\d+, 3\).*\n  fix: .*the logits alone"
    for called in (lambda: ss.scan(*ends, loader(), progress=False), lambda: ss.verify(ends[0], loader())):
        with pytest.raises(ModelError, match=said):
            called()


def test_the_only_matrix_at_the_head_of_a_tuple_is_the_logits():
    ends = [Several("states", seed).eval() for seed in (0, 1)]
    found = ss.scan(*ends, loader(), alphas=[0], measures=[], progress=False).evals
    (x, y) = loader().dataset.tensors
    expected = cross_entropy(ends[0](x)[0], y).item()
    assert found.loc[found["measure"] == "loss", "value"].item() == pytest.approx(expected, rel=1e-6)


def test_layers_that_differ_and_do_not_touch_the_outputs_are_warned_of():
    def warned(first, second):
        return ss.scan(first.eval(), second.eval(), loader(), alphas=2, measures=["trace"], progress=False).meta

    meta = warned(Several("headless"), Several("headless", 1))
    assert meta["unused"] == ["head"]
    (said,) = meta["warnings"]
    assert said == (
        "the outputs do not depend on 1 of the layers that differ between the models (head): nothing is measured there"
    )
    same = Several("headless", 1)
    same.head = Several("headless").head
    assert warned(Several("headless"), same)["warnings"] == []


class Permuted(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.linear = nn.Linear(8, 3)
        self.register_buffer("order", torch.tensor(order))

    def forward(self, x):
        return self.linear(x)[:, self.order]


class Factor(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.linear, self.by = nn.Linear(8, 3), by

    def forward(self, x):
        return self.by * self.linear(x)


class Cut(Factor):
    def forward(self, x):
        if self.by == 0:
            raise RuntimeError("a tensor lies\non another device")
        return super().forward(x)[:, : self.by]


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ((Cut(3), Cut(2)), "code or attributes differ"),
        ((Permuted([0, 1, 2]), Permuted([2, 0, 1])), "'order' differs and is no floating-point tensor"),
        ((Factor(1.0), Factor(1.01)), "code or attributes differ"),
    ],
)
def test_ends_that_differ_in_more_than_weights_are_refused(ends, said):
    with pytest.raises(MismatchError, match=said):
        ss.scan(*(end.eval() for end in ends), loader(), progress=False)
    torch.manual_seed(4711)  # no weights that were drawn when this file was read
    alike = [ends[0].eval(), type(ends[0])(getattr(ends[0], "by", [0, 1, 2])).eval()]
    assert ss.scan(*alike, loader(), alphas=2, measures=["directional"], progress=False).meta["warnings"] == []


def test_an_end_that_cannot_be_run_where_the_other_is_is_said():
    result = ss.scan(Cut(3).eval(), Cut(0).eval(), loader(), alphas=2, measures=["directional"], progress=False)
    (said,) = result.meta["warnings"]
    assert said.endswith("was not compared with the zero-shot model's: a tensor lies on another device")


class Counting(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.body = network(seed)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return self.body(x)


def test_a_buffer_that_a_forward_writes_to_stays_as_it_was():
    models = [Counting(seed).eval() for seed in (0, 1)]
    ss.scan(*models, loader(), alphas=2, measures=["directional"], progress=False)
    ss.verify(models[0], loader())
    assert [model.calls.item() for model in models] == [0, 0]


def test_autocast_around_a_scan_changes_nothing():
    plain = scan(measures=["trace", "m_sharpness_average"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = scan(measures=["trace", "m_sharpness_average"])
        assert torch.is_autocast_enabled("cpu")
        verified = ss.verify(network(0), loader())
    assert mixed.layers.equals(plain.layers)
    assert mixed.evals.equals(plain.evals)
    assert verified.equals(ss.verify(network(0), loader()))


def test_inference_mode_is_refused_and_what_was_made_in_it():
    data = loader()
    with torch.inference_mode():
        made = network(0)
        for called in (scan, lambda: ss.verify(network(0), data), lambda: criticality(made, made, data)):
            with pytest.raises(UsageError, match="inference_mode"):
                called()
    with pytest.raises(ModelError, match=r"the zero-shot model was made in torch\.inference_mode.*'0\.weight'"):
        ss.scan(made, network(1), data, progress=False)
    ss.scan(deepcopy(made), network(1), data, alphas=2, measures=["directional"], progress=False)


# --- what a scan cost


def test_the_cost_is_that_of_all_cells_however_often_the_scan_is_run(tmp_path):
    first = scan(out=tmp_path)
    again = scan(out=tmp_path)
    assert again == first == ss.open(tmp_path)
    assert again.meta["cost"] == first.meta["cost"]
    assert "cells_found_before" not in first.meta["cost"]
    more = scan(out=tmp_path, interventions=True)
    assert len(more.cells) > len(first.cells)
    assert more.meta["cost"]["gradients"] >= first.meta["cost"]["gradients"]
    assert more.meta["cost"]["seconds"] > first.meta["cost"]["seconds"]


def test_after_an_interruption_the_cost_says_how_many_cells_it_leaves_out(tmp_path):
    whole = scan(out=tmp_path)
    (tmp_path / "scan.json").unlink()
    lines = (tmp_path / "cells.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cells.jsonl").write_bytes(b"".join(lines[:3]))  # the header and two cells
    resumed = scan(out=tmp_path)
    assert resumed.layers.equals(whole.layers)
    assert resumed.meta["cost"]["cells_found_before"] == 2
    assert scan(out=tmp_path).meta["cost"] == resumed.meta["cost"]
