"""Data sets of Hugging Face: by their columns, with names for labels, images as they are stored."""

from __future__ import annotations

import io

import archives
import numpy as np
import pytest
import torch
from optional import needs
from PIL import Image

import sharpscope
from sharpscope import rows
from sharpscope.errors import DataError, UsageError


def shade(image):
    return torch.tensor([float(np.asarray(image)[0, 0, 0])])


def read(dataset, **options):
    split = sharpscope.images(dataset, shade, **options)
    return torch.cat([batch.inputs for batch in split])[:, 0].int().tolist(), split


class ClassLabel:
    def __init__(self, *names):
        self.names = list(names)


class Value:
    pass


class Table:
    """The least that is asked of a data set."""

    def __init__(self, features, records):
        self.features, self.records = features, records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, key):
        return [record[key] for record in self.records] if isinstance(key, str) else self.records[key]


class Stream:
    def __init__(self, table):
        self.features, self.records = table.features, table.records

    def __iter__(self):
        return iter(self.records)


def records(labels, **more):
    return [{"image": Image.new("RGB", (2, 2), (i,) * 3), "label": label, **more} for i, label in enumerate(labels)]


FEATURES = {"image": Value(), "label": ClassLabel("ape", "honey_bee", "cat")}


@pytest.mark.parametrize("kind", [Table, lambda *parts: Stream(Table(*parts))], ids=["table", "stream"])
def test_rows_keep_their_order_and_labels_their_names(kind):
    found, split = read(kind(FEATURES, records([2, 0, 1, 1])), name="pets", batch_size=3)
    assert found == [0, 1, 2, 3]
    assert (split.name, split.classes, split.targets.tolist()) == ("pets", ("ape", "honey bee", "cat"), [2, 0, 1, 1])


def test_images_may_be_bytes_paths_or_pictures(tmp_path):
    (tmp_path / "9.webp").write_bytes(archives.picture(9))
    cells = [{"bytes": archives.picture(7), "path": None}, {"bytes": None, "path": str(tmp_path / "9.webp")}]
    cells.append(Image.new("L", (3, 3), 11))
    table = Table(FEATURES, [{"image": cell, "label": 0} for cell in cells])
    assert read(table)[0] == [7, 9, 11]


def test_labels_are_matched_by_name_with_other_data():
    with pytest.warns(UserWarning, match="pets: label '1' is taken as class 'Honey Bee'"):
        _, split = read(Table(FEATURES, records([2, 0, 1])), classes=["Honey Bee", "dog", "cat", "ape"], name="pets")
    assert (split.targets.tolist(), split.columns) == ([2, 3, 0], (0, 2, 3))


def test_texts_are_labels_and_numbers_without_names_need_them():
    features = {"img": Value(), "cls": Value(), "image": Value()}
    texts = Table(features, [{"image": r["image"], "cls": r["label"]} for r in records(["dog", "ape", "dog"])])
    assert read(texts)[1].classes == ("ape", "dog")
    bare = Table({"image": Value(), "label": Value()}, records([1, 0]))
    with pytest.raises(DataError, match=r"'data': the labels have no names, .*\n  fix: classnames=.*ClassLabel"):
        read(bare)
    assert read(bare, classnames={"0": "ape", "1": "bee"})[1].classes == ("ape", "bee")


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        (
            {"train": Table(FEATURES, []), "test": Table(FEATURES, [])},
            r"holds the splits train, test\n.*data\['train'\]",
        ),
        (Table({"image": Value()}, records([0])), "no label column among image; accuracy and loss .* need labels"),
        (Table({"picture": Value(), "label": Value()}, []), "no image column among picture, label\n.*rename_column"),
        (
            Table({"image": Value(), "fine": ClassLabel("a"), "coarse": ClassLabel("b")}, []),
            r"several label columns: fine, coarse\n  fix: dataset.remove_columns\(\['coarse'\]\)",
        ),
        (Table(None, []), "does not say what its columns are\n.*streaming"),
    ],
    ids=["splits", "no labels", "no images", "two labels", "no features"],
)
def test_tables_of_other_columns_are_refused(dataset, said):
    with pytest.raises(UsageError, match=said):
        read(dataset)


def test_a_split_without_labels_is_refused():
    with pytest.raises(
        DataError, match=r"2 rows have the label -1 \(-1 and None stand for 'no label'.*names for 3 classes"
    ):
        read(Table(FEATURES, records([-1, 0, -1])))
    with pytest.raises(DataError, match=r"1 rows have the label None"):
        read(Table(FEATURES, records([0, None])))
    with pytest.raises(DataError, match=r"1 rows have the label 3, there are names for 3 classes"):
        read(Table(FEATURES, records([0, 3])))
    with pytest.raises(DataError, match="'data' gave no example"):
        read(Table(FEATURES, []))


def test_a_damaged_cell_is_named_by_its_row():
    table = Table(FEATURES, [*records([0] * 3), {"image": {"bytes": b"?", "path": None}, "label": 0}])
    with pytest.warns(UserWarning, match=r"1 of 4 images could not be read .*pets row 3: cannot identify"):
        assert read(table, name="pets", max_unreadable=0.3)[0] == [0, 1, 2]
    table.records[3]["image"] = 17
    with pytest.raises(DataError, match=r"pets row 3: a int in the place of an image"):
        read(table, name="pets")


def test_a_stream_is_kept_encoded_up_to_a_limit(monkeypatch):
    cells = [{"image": {"bytes": archives.picture(i), "path": None}, "label": 0} for i in range(3)]
    monkeypatch.setattr(rows, "STREAM_BYTES", 2 * len(archives.picture(0)) + 9)
    assert read(Stream(Table(FEATURES, cells[:2])))[0] == [0, 1]
    with pytest.raises(DataError, match=r"streamed and holds more than the .* GB that are kept"):
        read(Stream(Table(FEATURES, cells)))


# --- the real library


@pytest.fixture
def library():
    return needs("datasets")


@pytest.fixture
def pets(library):
    def encoded(i):
        file = io.BytesIO()
        picture = np.full((3, 3), 257 * i, np.uint16)
        picture[2, 2] = 65535  # else all is dark, which is warned of
        Image.fromarray(picture).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    features = library.Features(
        {"img": library.Image(), "label": library.ClassLabel(names=["ape", "bee", "cat"]), "id": library.Value("int64")}
    )
    table = {"img": [encoded(i) for i in range(9)], "label": [0, 1, 2] * 3, "id": [*range(9)]}
    return library.Dataset.from_dict(table, features=features)


def test_a_real_data_set_is_read_as_stored_whatever_its_format(pets):
    for dataset in (
        pets,
        pets.with_format("torch"),
        pets.with_transform(lambda rows: 1 / 0),
        pets.to_iterable_dataset(),
    ):
        found, split = read(dataset, name="pets")
        assert found == [*range(9)]  # 16 bits, scaled
        assert (split.classes, split.targets.tolist()) == (("ape", "bee", "cat"), [0, 1, 2] * 3)


def test_real_data_sets_are_drawn_from_mapped_and_selected(library, pets):
    found, split = read(pets.shuffle(seed=1).select(range(6)), limit=3, classes=["cat", "bee", "ape"])
    assert len(found) == 3
    assert [i % 3 for i in found] == [2 - target for target in split.targets.tolist()]
    with pytest.raises(UsageError, match="holds the splits train, test"):
        read(library.DatasetDict({"train": pets, "test": pets}))


def test_a_real_data_set_given_as_a_loader_names_the_way(pets):
    with pytest.raises(DataError, match=r"batch 0 of 'id' is of keys \['id', 'img', 'label'\], no image"):
        sharpscope.Split(pets, "id")
    with pytest.raises(DataError, match=r"images of type .*make no tensor\n  fix: .*sharpscope.images"):
        sharpscope.Split(pets.rename_column("img", "image"), "id")


def test_a_torch_loader_of_a_real_data_set_is_a_loader(pets):
    ready = pets.map(lambda row: {"pixel_values": [float(row["id"])]}, remove_columns=["img"]).with_format("torch")
    split = sharpscope.Split(torch.utils.data.DataLoader(ready, batch_size=4), "id")
    assert torch.cat([b.inputs for b in split])[:, 0].tolist() == [*range(9)]
