"""One function for images wherever they are."""

from __future__ import annotations

import sys

import clips
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import sharpscope
from sharpscope.data import Split
from sharpscope.errors import DataError, UsageError
from sharpscope.factory import made

X, Y = torch.arange(12.0).view(6, 2), torch.arange(6) % 3


def mean_color(image):
    return torch.from_numpy(np.asarray(image, dtype=np.float32)).mean(dim=(0, 1))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("mine", None)


def test_a_directory_gives_what_folder_gives(here):
    clips.images(here / "id")
    assert sharpscope.images("id", mean_color).fingerprint == sharpscope.folder(here / "id", mean_color).fingerprint


def test_a_factory_of_the_working_directory_is_called_with_the_model_if_it_takes_one(here):
    clips.images(here / "id")
    before = list(sys.path)
    (here / "mine.py").write_text(
        "import torch\n"
        "def loader():\n    return [(torch.zeros(2, 1), torch.tensor([0, 1]))]\n"
        "def directory(model, size=3):\n    return 'id' if callable(model) else None\n"
    )
    assert sharpscope.images("py:mine:loader", mean_color).name == "loader"
    assert sharpscope.images("py:mine:directory", mean_color, name="x").classes == ("blue", "green", "red")
    assert made("py:os.path:join", "a", "b") == "a"  # it requires one
    assert sys.path == before


def test_a_loader_is_taken_as_it_is(here):
    split = sharpscope.images(DataLoader(TensorDataset(X, Y), batch_size=4), None, name="mine")
    assert (split.name, len(split)) == ("mine", 6)
    ready = Split([(X, Y)], "own", classes=["a", "b", "c"])
    assert sharpscope.images(ready, None).name == "own"
    renamed = sharpscope.images(ready, None, name="other", classes=["c", "b", "a"])
    assert (renamed.name, renamed.targets.tolist(), ready.name) == ("other", [2, 1, 0, 2, 1, 0], "own")
    with pytest.raises(UsageError, match="limit=3 chooses among pictures"):
        sharpscope.images(ready, None, limit=3)


def test_a_split_goes_by_the_name_that_the_scan_gives_it():
    torch.manual_seed(0)
    models = torch.nn.Linear(2, 3).eval(), torch.nn.Linear(2, 3).eval()
    ood = {"sketch": Split([(X, Y)], "another")}
    result = sharpscope.scan(*models, [(X, Y)], ood=ood, alphas=2, measures=[], progress=False)
    assert set(result.evals["split"]) == {"id", "sketch"}


def test_an_ood_set_that_sharpness_is_measured_on_stays_an_ood_set():
    models = torch.nn.Linear(2, 3).eval(), torch.nn.Linear(2, 3).eval()
    sketch = Split([(X, Y)], "sketch")
    options = {"ood": {"sketch": sketch}, "sharpness_on": sketch, "alphas": 2, "measures": [], "progress": False}
    facts = sharpscope.scan(*models, [(X, Y)], **options).meta["splits"]
    assert {name: fact["role"] for name, fact in facts.items()} == {"id": "id", "sketch": "ood"}


def test_an_ood_set_that_the_model_cannot_take_is_refused_before_anything_is_written(tmp_path):
    models = torch.nn.Linear(2, 3).eval(), torch.nn.Linear(2, 3).eval()
    with pytest.raises(
        sharpscope.errors.ModelError, match=r"fails on inputs of 'wide' of shape \(1, 3\) torch.float32"
    ):
        sharpscope.scan(*models, [(X, Y)], ood={"wide": [(X.view(4, 3), Y[:4])]}, out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("classes", "said"), [("cat", "classes='cat': needs a list"), ([], r"classes=\[\]: needs a list of class names")]
)
def test_classes_that_are_no_list_are_refused(here, classes, said):
    clips.images(here / "id")
    with pytest.raises(UsageError, match=said):
        sharpscope.images("id", mean_color, classes=classes)


class Items:
    """A data set as torchvision's are: a picture and a number, by index."""

    def __init__(self, labels, classes=("ape", "honey_bee", "cat"), targets=None):
        self.labels, self.classes = labels, list(classes)
        if targets is not None:
            self.targets = targets

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return Image.new("RGB", (2, 2), (index,) * 3), self.labels[index]


@pytest.mark.parametrize("targets", [None, [2, 0, 1, 1], torch.tensor([2, 0, 1, 1])], ids=["read", "list", "tensor"])
def test_a_data_set_of_pictures_and_numbers_is_read_with_its_class_names(targets):
    split = sharpscope.images(Items([2, 0, 1, 1], targets=targets), mean_color, name="pets")
    assert torch.cat([batch.inputs for batch in split])[:, 0].tolist() == [0, 1, 2, 3]
    assert (split.name, split.classes, split.targets.tolist()) == ("pets", ("ape", "honey bee", "cat"), [2, 0, 1, 1])
    other = sharpscope.images(Items([2, 0, 1, 1]), mean_color, classes=["cat", "ape", "honey bee"], limit=3)
    assert len(other) == 3


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (Items([0, "ape"]), "has the label 'ape'\n  fix: class numbers"),
        (Items([0, -1]), "has the label -1"),
        (Items([0, 3]), "has the label 3, there are names for 3 classes"),
        (Items([0, 1], classes=()), "the labels have no names"),
    ],
)
def test_a_data_set_of_pictures_without_usable_labels_is_named(items, message):
    with pytest.raises(DataError, match=message):
        sharpscope.images(items, mean_color)
    if items.classes == []:
        assert sharpscope.images(items, mean_color, classnames={"0": "ape", "1": "bee"}).classes == ("ape", "bee")


def test_a_folder_of_archives_names_the_prefix(tmp_path):
    import archives

    root = archives.webdataset(tmp_path / "wds", {"test/0": [0, 1]})
    for place in (root, root / "test"):
        with pytest.raises(DataError, match=r"holds archives \(0.tar\) and no class folders\n  fix: wds:"):
            sharpscope.images(str(place), mean_color)
