"""Loaders of every usual form, read in one fixed order; what cannot be measured on is refused by name."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset, WeightedRandomSampler

import sharpscope
import sharpscope.data as data
from sharpscope.data import Split, stratified
from sharpscope.errors import DataError
from sharpscope.optim.sharpness import SharpnessProbe


class Restless:
    """A loader whose batches may depend on how often it was read."""

    def __init__(self, batches):
        self.batches, self.readings = batches, 0

    def __iter__(self):
        self.readings += 1
        return iter(self.batches(self.readings - 1))


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
        ([(X, Y, Y)], r"a tuple of 3; which of them are .* is not known\n  fix: .*i\[:2\] for i in items"),
        ([{"image": X}], r"mapping with keys \['image'\], without labels"),
        (
            [{"input_ids": X.long(), "attention_mask": X.long(), "labels": Y}],
            r"of keys \['attention_mask', 'input_ids', 'labels'\], no image among them\n  fix: .*one tensor",
        ),
        (
            [({"ids": X.long(), "mask": X.long()}, Y)],
            r"of keys \['ids', 'mask'\], no image .*\n  fix: .*wrapper",
        ),
        ([(X, Y.float())], r"targets \(10,\) torch.float32, no whole numbers by type\n  fix: one integer class"),
        ([(X, torch.eye(10))], r"targets \(10, 10\) torch.float32, one-hot\n  fix: class numbers: y.argmax\(dim=1\)"),
        ([(X, torch.ones(10, 3).long())], r"targets \(10, 3\) torch.int64, several labels an image"),
        ([(X, Y[:, None])], r"a column\n  fix: .*y.squeeze\(1\)"),
        ([(X, Y.view(2, 5, 1))], "too many axes"),
        ([(X[0], Y[0])], r"a single example\n  fix: batches: DataLoader"),
        ([(X, ["cat"] * 10)], r"labels of type str, which make no tensor\n  fix: .*classes=\["),
        ([(Image.new("RGB", (2, 2)), 1)], r"images of type Image, which make no tensor\n  fix: .*sharpscope.images"),
        ([([Image.new("RGB", (2, 2))], [1])], "images of type Image"),
        ([(torch.where(X == 5, torch.nan, X), Y)], r"NaN or infinities in 1 of 10 examples, the first at place 2\n"),
        ([(X, Y), (X, Y[:3])], r"batch 1 of 'id' has inputs \(10, 2\) and targets \(3,\)"),
    ],
)
def test_data_without_usable_labels_is_refused(loader, message):
    with pytest.raises(DataError, match=message):
        Split(loader, "id")


def test_a_large_shuffling_loader_is_caught_when_its_order_changes(monkeypatch):
    monkeypatch.setattr(data, "CACHE_BYTES", 0)
    calm = Split(Restless(batches=lambda reading: [(X[:5], Y[:5]), (X[5:], Y[5:])] * 2), "id")
    assert len(list(calm)) == 4
    late = Split(Restless(lambda reading: [(X, Y), (X, Y), (X, Y if reading < 2 else 1 - Y)]), "id")
    with pytest.raises(DataError, match=r"batch 2 of 'id' has other labels .*\n  fix: .*shuffle=False"):
        list(late)


@pytest.mark.parametrize("cache", [0, 1 << 20])
def test_reading_leaves_the_random_state_to_the_caller(monkeypatch, cache):
    """A DataLoader draws a seed at every reading; what was drawn between batches stays drawn."""
    monkeypatch.setattr(data, "CACHE_BYTES", cache)
    torch.manual_seed(0)
    expected = torch.rand(5)
    torch.manual_seed(0)
    split = Split(DataLoader(SET, batch_size=4), "id")
    SharpnessProbe(DataLoader(SET, batch_size=4))
    found = [torch.rand(1) for _ in split]
    split.sample(4, 0, 2)
    assert torch.equal(torch.cat([*found, *(torch.rand(1) for _ in range(2))]), expected)


def test_values_drawn_at_random_differ_from_reading_to_reading_though_the_callers_state_stays():
    with pytest.raises(DataError, match="other values"):
        Split(Restless(lambda _: [(X + torch.rand(()), Y)]), "id")


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


def test_names_of_fewer_classes_than_outputs_are_refused_unless_they_say_which_they_are():
    """An ImageNet head on a folder of 100 classes: numbers that fit, and every label wrong."""
    split = Split(DataLoader(named(["ape", "bee", "cat"], [0, 1, 2]), batch_size=3), "id")
    with pytest.raises(DataError, match=r"the model has 10 outputs, 'id' names 3 classes.*\n  fix: .*a name for each"):
        split.check_labels(10)
    models = torch.nn.Linear(1, 10).eval(), torch.nn.Linear(1, 10).eval()
    with pytest.raises(DataError, match="the model has 10 outputs, 'id' names 3 classes"):
        sharpscope.scan(*models, DataLoader(named(["ape", "bee", "cat"], [0, 1, 2]), batch_size=3), measures=[])
    outputs = ["cat", "ape", "dog", "bee"]
    split.numbered_as(outputs).check_labels(4)  # masked: which of the outputs they are is known
    Split(DataLoader(named(["ape", "bee"], [0, 1]), batch_size=2), "id", classes=outputs).check_labels(4)  # said


def test_labels_that_do_not_follow_the_names_are_taken_as_they_are():
    moved = [(torch.zeros(2, 1), torch.tensor([1, 7]))]  # as a target_transform does
    Split(moved, "id", classes=["n01", "n02"]).check_labels(10)
    Split(DataLoader(named(["ape", "bee", "cat"], [0, 1]), batch_size=2), "the first two of three").check_labels(2)
    Split([(X, Y)], "without names").check_labels(10)


def test_the_fingerprint_depends_on_pixels_and_labels_not_on_batching():
    marks = [
        Split(loader, "id").fingerprint
        for loader in ([(X, Y)], [(X[:3], Y[:3]), (X[3:], Y[3:])], [(X + 1, Y)], [(X, 1 - Y)])
    ]
    assert marks[0] == marks[1]
    assert len(set(marks)) == 3


# --- loaders that are not what they seem


@pytest.mark.parametrize("memory", [0, 1 << 30], ids=["read anew", "kept"])
def test_random_augmentation_and_unfixed_order_are_seen_at_the_first_reading(monkeypatch, memory):
    monkeypatch.setattr(data, "CACHE_BYTES", memory)
    with pytest.raises(DataError, match=r"batch 0 of 'id' has the same labels but other values .*random augmentation"):
        Split(Restless(lambda reading: [(X + reading, Y)]), "id")
    with pytest.raises(DataError, match="batch 0 of 'id' has other labels than when it was first read"):
        Split(Restless(lambda reading: [(X, Y if reading else 1 - Y)]), "id")


@pytest.mark.parametrize(
    "options",
    [
        {"shuffle": True, "batch_size": 5},
        {"sampler": WeightedRandomSampler([1.0] * 10, 10), "batch_size": 5},
        {"batch_sampler": torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(SET), 5, False)},
    ],
    ids=["shuffle", "weighted", "batch sampler"],
)
def test_a_loader_that_shuffles_is_refused_before_it_is_read(options):
    with pytest.raises(
        DataError, match=r"'id' is a DataLoader with .*RandomSampler; its order.*\n  fix: .*shuffle=False"
    ):
        Split(DataLoader(SET, **options), "id")


def test_a_loader_that_ends_early_the_second_time_is_refused(monkeypatch):
    monkeypatch.setattr(data, "CACHE_BYTES", 0)
    split = Split(Restless(lambda reading: [(X, Y)] * (3 if reading < 2 else 2)), "id")
    with pytest.raises(DataError, match="gave 30 examples when it was first read, now 20"):
        list(split)


def test_a_loader_that_is_empty_the_second_time_is_refused_at_once():
    with pytest.raises(DataError, match="gave 10 examples when it was first read, now 0"):
        Split(Restless(lambda reading: [] if reading else [(X, Y)]), "id")


def test_a_generator_is_kept_and_this_is_said_but_an_empty_or_huge_one_is_refused(monkeypatch):
    generator = ((X, Y) for _ in range(2))
    split = Split(generator, "id")
    assert split.notes == ("id: can be read once only, its 20 examples are kept in memory",)
    with pytest.raises(DataError, match=r"'again' gave no example\n  fix: a generator that was read before is empty"):
        Split(generator, "again")
    monkeypatch.setattr(data, "CACHE_BYTES", X.nbytes)
    with pytest.raises(
        DataError, match=r"'id' is a generator, which can be read once only, and holds more than the .* GB"
    ):
        Split(((X, Y) for _ in range(2)), "id")


class Stream(IterableDataset):
    def __iter__(self):
        return zip(X, Y, strict=True)


def test_workers_that_each_read_a_whole_stream_are_found_out():
    assert torch.equal(Split(DataLoader(Stream(), batch_size=5, num_workers=1), "id").targets, Y)
    with pytest.raises(DataError, match=r"'id' gives 2 of 4 batches twice: each of its 2 workers reads the whole"):
        Split(DataLoader(Stream(), batch_size=5, num_workers=2), "id")


def test_examples_that_drop_last_drops_are_said():
    split = Split(DataLoader(SET, batch_size=4, drop_last=True), "id")
    assert split.notes == ("id: drop_last=True leaves out 2 of 10 examples",)
    assert len(split) == 8


def test_labels_that_stand_for_none_are_explained():
    with pytest.raises(DataError, match=r"'test' has labels -1..-1, the model has 3 outputs .*stands for 'no label'"):
        Split([(X, Y * 0 - 1)], "test").check_labels(3)
    with pytest.raises(DataError, match=r"labels -100..0, .*-100 stands for 'no label' in torch's losses.*leave out"):
        Split([(X, torch.where(Y == 1, -100, Y))], "test").check_labels(3)


# --- classes


class Named(TensorDataset):
    classes: list[str]


def named(classes, labels):
    """A data set whose images carry the name of their class in their only value."""
    codes = torch.tensor([float(sum(map(ord, classes[label]))) for label in labels])
    found = Named(codes[:, None], torch.tensor(labels))
    found.classes = classes
    return found


def test_class_names_are_those_of_the_data_set_inside_a_loader():
    inside = named(["ape", "bee"], [0, 1, 1])
    assert Split(DataLoader(Subset(inside, [0, 2]), batch_size=2), "id").classes == ("ape", "bee")
    assert Split(DataLoader(SET, batch_size=2), "id").classes is None


@pytest.mark.parametrize("memory", [0, 1 << 30], ids=["read anew", "kept"])
def test_labels_of_another_order_of_classes_are_mapped_by_name(monkeypatch, memory):
    monkeypatch.setattr(data, "CACHE_BYTES", memory)
    id_classes = ("ape", "bee", "cat", "dog")
    split = Split(DataLoader(named(["dog", "bee", "fox"], [1, 0, 0, 1]), batch_size=3), "sketch")
    there = split.numbered_as(id_classes)
    assert there.targets.tolist() == torch.cat([b.targets for b in there]).tolist() == [1, 3, 3, 1]
    for inputs, targets in [*there, *there.sample(None, seed=0, batch_size=4)]:
        assert inputs[:, 0].tolist() == [sum(map(ord, id_classes[t])) for t in targets]
    assert (there.columns, there.classes) == ((1, 3), id_classes)
    assert split.targets.tolist() == [1, 0, 0, 1]
    assert there.fingerprint != split.fingerprint
    assert split.numbered_as(None) is split.numbered_as(["dog", "bee", "fox"]) is split


def test_classes_in_another_order_mask_nothing_and_a_list_of_fewer_masks_the_others():
    turned = Split(DataLoader(named(["cat", "bee", "ape"], [1, 0]), batch_size=2), "turned")
    assert turned.numbered_as(["ape", "bee", "cat"]).columns is None
    assert turned.numbered_as(["ape", "bee", "cat", "dog"]).columns == (0, 1, 2)
    narrow = Split(DataLoader(named(["cat", "bee", "ape"], [1, 0]), batch_size=2), "narrow", columns=[0, 1])
    assert narrow.numbered_as(["ape", "bee", "cat"]).columns == (1, 2)


def test_a_loader_with_a_class_that_the_id_data_lack_is_refused_by_name():
    split = Split(DataLoader(named(["dog", "bees"], [1, 0]), batch_size=2), "sketch")
    with pytest.raises(
        DataError, match=r"'sketch': label '1' \('bees'\) is none of the 2 classes; the nearest is 'bee'"
    ):
        split.numbered_as(["bee", "dog"])


def test_a_scan_maps_ood_labels_by_name():
    torch.manual_seed(0)
    models = torch.nn.Linear(1, 3).eval(), torch.nn.Linear(1, 3).eval()
    id_ = DataLoader(named(["ape", "bee", "cat"], [0, 1, 2] * 4), batch_size=4)
    ood = {
        "same": DataLoader(named(["ape", "bee", "cat"], [0, 1, 2, 2]), batch_size=2),
        "other": DataLoader(named(["cat", "ape", "bee"], [1, 2, 0, 0]), batch_size=2),
    }
    r = sharpscope.scan(*models, id_, ood=ood, alphas=2, measures=[], progress=False)
    by_split = {name: rows.drop(columns="split").reset_index(drop=True) for name, rows in r.evals.groupby("split")}
    assert by_split["same"].equals(by_split["other"])
