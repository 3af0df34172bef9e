"""What a scan is asked for in ways that look right: it measures what was meant, or says what it needs."""

import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import sharpscope as ss
from sharpscope.errors import UsageError
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


@pytest.mark.parametrize("name", ["mean OOD", "ood mean"])
def test_no_set_is_called_as_the_mean_over_sets(name):
    with pytest.raises(UsageError, match=f"{name!r} stands for the mean over OOD sets"):
        scan(ood={name: loader()})


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
