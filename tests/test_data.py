"""Loaders of every usual form, read in one fixed order; what cannot be measured on is refused by name."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import sharpscope.data as data
from sharpscope.data import Split, stratified
from sharpscope.errors import DataError

X, Y = torch.arange(20.0).view(10, 2), torch.tensor([0, 1] * 5)
SET = TensorDataset(X, Y)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(SET, batch_size=4),
        [(X[:7], Y[:7]), (X[7:], Y[7:])],
        [[X.numpy(), Y.numpy()]],
        [{"image": X, "cls": Y}],
        [{"pixel_values": X, "labels": Y, "path": ["?"] * 10}],
        ((X[i : i + 1], Y[i : i + 1]) for i in range(10)),
    ],
    ids=["DataLoader", "list", "numpy", "webdataset", "transformers", "generator"],
)
def test_any_loader_gives_the_same_examples_again_and_again(loader):
    split = Split(loader, "id")
    for _ in range(2):
        assert torch.equal(torch.cat([b.inputs for b in split]), X)
    assert torch.equal(split.targets, Y)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "'id' gave no example"),
        ([X], "batch 0 of 'id' is a Tensor, without labels"),
        ([(X,)], "a tuple of 1, without labels"),
        ([{"image": X}], r"mapping with keys \['image'\], without labels"),
        ([(X, Y.float())], "one integer class per example"),
        ([(X, Y), (X, Y[:3])], r"batch 1 of 'id' has inputs \(10, 2\) and targets \(3,\)"),
    ],
)
def test_data_without_usable_labels_is_refused(loader, message):
    with pytest.raises(DataError, match=message):
        Split(loader, "id")


def test_a_large_shuffling_loader_is_caught_when_its_order_changes(monkeypatch):
    monkeypatch.setattr(data, "CACHE_BYTES", 0)
    torch.manual_seed(0)
    shuffled = Split(DataLoader(SET, batch_size=5, shuffle=True), "id")
    with pytest.raises(DataError, match="shuffle=False"):
        [list(shuffled) for _ in range(20)]
    assert len(list(Split(DataLoader(SET, batch_size=5), "id"))) == 2


@pytest.mark.parametrize("cache", [0, 1 << 20])
def test_a_sample_holds_matching_pairs_and_every_class_evenly(monkeypatch, cache):
    monkeypatch.setattr(data, "CACHE_BYTES", cache)
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    split = Split([(labels[i : i + 7, None] * 10.0, labels[i : i + 7]) for i in range(0, 100, 7)], "id")
    batches = split.sample(24, seed=0, batch_size=10)
    assert [len(b.targets) for b in batches] == [10, 10, 4]
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.equal(inputs[:, 0], targets * 10.0)
    assert torch.bincount(targets).tolist() == [8, 8, 8]
    assert len(set(targets[:10].tolist())) == 3  # shuffled, so that groups of consecutive examples are mixed


def test_a_limit_above_the_size_takes_everything_once():
    assert sorted(stratified(np.array([3, 3, 1]), 99, seed=0).tolist()) == [0, 1, 2]
    assert sorted(stratified(np.array([3, 3, 1]), None, seed=0).tolist()) == [0, 1, 2]


def test_labels_out_of_range_name_the_range():
    with pytest.raises(DataError, match=r"'id' has labels 0\.\.1, the model has 1 outputs"):
        Split([(X, Y)], "id").check_labels(1)
    with pytest.raises(DataError, match="labels outside its own classes"):
        Split([(X, Y)], "id", columns=[0, 3]).check_labels(5)


def test_the_fingerprint_depends_on_pixels_and_labels_not_on_batching():
    marks = [
        Split(loader, "id").fingerprint
        for loader in ([(X, Y)], [(X[:3], Y[:3]), (X[3:], Y[3:])], [(X + 1, Y)], [(X, 1 - Y)])
    ]
    assert marks[0] == marks[1]
    assert len(set(marks)) == 3
