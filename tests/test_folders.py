"""Claims about folders of images: mapped by name, in one order, and what is damaged or empty is said."""

from __future__ import annotations

import json
import warnings

import clips
import numpy as np
import pytest
import torch
from PIL import Image

import sharpscope as ss
from sharpscope.errors import DataError, UsageError
from sharpscope.folders import ImageFolder, class_folders, folder


def mean_color(image):
    """A preprocessing whose result says which picture it was."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32)).mean(dim=(0, 1)) / 255


def shade(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value, value, value)).save(path)


@pytest.fixture
def data(tmp_path):
    """Three classes whose images, in sorted order, get lighter by one each."""
    value = 0
    for name in ("ape", "bee", "cat fish"):
        for i in range(4):
            shade(tmp_path / "id" / name.replace(" ", "_") / f"{i}.png", value)
            value += 1
    return tmp_path / "id"


def read(split):
    return torch.cat([batch.inputs for batch in split])[:, 0].mul(255).round().int().tolist()


def test_classes_are_folder_names_sorted_and_images_come_in_their_order(data):
    split = folder(data, mean_color, batch_size=5)
    assert split.name == "id"
    assert split.classes == ("ape", "bee", "cat fish")
    assert split.columns is None
    assert split.targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert read(split) == list(range(12))
    assert [len(batch.targets) for batch in split] == [5, 5, 2]


def test_the_order_does_not_depend_on_when_files_were_made(data, tmp_path):
    for path in sorted(data.rglob("*.png"), reverse=True):
        shade(tmp_path / "again" / path.parent.name / path.name, Image.open(path).getpixel((0, 0))[0])
    first, second = folder(data, mean_color), folder(tmp_path / "again", mean_color)
    assert first.fingerprint == second.fingerprint


def test_a_subset_of_the_classes_is_mapped_by_name_and_the_absent_are_masked(data, tmp_path):
    shade(tmp_path / "sketch" / "bee" / "x.png", 9)
    shade(tmp_path / "sketch" / "cat_fish" / "x.png", 8)
    split = folder(tmp_path / "sketch", mean_color, classes=folder(data, mean_color).classes)
    assert split.targets.tolist() == [1, 2]  # the ID numbers, not 0 and 1
    assert split.columns == (1, 2)
    assert split.classes == ("ape", "bee", "cat fish")


def test_an_unknown_class_is_refused_by_name_and_left_out_if_asked(data, tmp_path):
    shade(tmp_path / "more" / "bees" / "x.png", 9)
    shade(tmp_path / "more" / "bee" / "x.png", 8)
    classes = folder(data, mean_color).classes
    with pytest.raises(DataError, match=r"folder 'bees' is none of the 3 classes; the nearest is 'bee'"):
        folder(tmp_path / "more", mean_color, classes=classes)
    split = folder(tmp_path / "more", mean_color, classes=classes, subset=True)
    assert (read(split), split.targets.tolist(), split.columns) == ([8], [1], (1,))


def test_a_set_without_any_known_class_is_refused(data, tmp_path):
    shade(tmp_path / "other" / "zebra" / "x.png", 9)
    with pytest.raises(DataError, match="no folder is one of the 3 classes"):
        folder(tmp_path / "other", mean_color, classes=["ape", "bee", "cat"], subset=True)


def test_class_names_from_lines_json_and_mapping_are_the_same(data, tmp_path):
    names = {"ape": "a great ape", "bee": "honey bee", "cat_fish": "cat fish"}
    (tmp_path / "names.txt").write_text("\n".join(names.values()) + "\n")
    (tmp_path / "names.json").write_text(json.dumps(names | {"dog": "dog"}))
    for source in (tmp_path / "names.txt", tmp_path / "names.json", names):
        assert folder(data, mean_color, classnames=source).classes == tuple(names.values())


def test_folders_are_mapped_by_their_words_not_by_their_names(data, tmp_path):
    shade(tmp_path / "sketch" / "n02" / "x.png", 9)
    split = folder(tmp_path / "sketch", mean_color, classes=["ape", "honey bee"], classnames={"n02": "honey bee"})
    assert split.targets.tolist() == [1]


@pytest.mark.parametrize(
    ("content", "suffix", "said"),
    [
        ("a\nb\n", ".txt", "has 2 lines for 3 class folders"),
        ("cat_fish\nape\nbee\n", ".txt", "not in sorted order: its first line 'cat_fish' would name folder 'ape'"),
        ('{"ape": "ape"}', ".json", r"no words for folder 'bee' \(2 of 3"),
        ('["ape"]', ".json", "does not map folders to words"),
        ("{", ".json", "is no JSON"),
        (None, ".txt", "no file of class names at"),
    ],
)
def test_class_names_that_cannot_be_meant_are_refused(data, tmp_path, content, suffix, said):
    file = tmp_path / f"names{suffix}"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=said):
        folder(data, mean_color, classnames=file)


def test_two_folders_with_the_same_words_are_refused(data):
    with pytest.raises(DataError, match="folders 'ape' and 'bee' are both 'animal'"):
        folder(data, mean_color, classnames={"ape": "animal", "bee": "animal", "cat_fish": "fish"})


def test_a_limit_is_even_over_classes_and_always_the_same_images(data):
    split = folder(data, mean_color, limit=6)
    assert torch.bincount(split.targets).tolist() == [2, 2, 2]
    assert read(split) == sorted(read(split)) == read(folder(data, mean_color, limit=6))


def test_a_damaged_image_is_left_out_and_named(tmp_path):
    clips.images(tmp_path / "id", each=50, size=4)
    (tmp_path / "id" / "green" / "0007.png").write_bytes(b"not a picture")
    with pytest.warns(UserWarning, match=r"id: 1 of 150 images could not be read .*0007.png: cannot identify"):
        split = folder(tmp_path / "id", mean_color)
    assert torch.bincount(split.targets).tolist() == [50, 49, 50]
    again = [batch.targets for batch in split]  # a second pass agrees with the first
    assert torch.equal(torch.cat(again), split.targets)


def test_a_truncated_image_counts_as_damaged(tmp_path):
    clips.images(tmp_path / "id", each=40, size=40)
    file = tmp_path / "id" / "green" / "0007.png"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.warns(UserWarning, match=r"1 of 120 images could not be read .*0007.png"):
        folder(tmp_path / "id", mean_color)


def test_more_than_one_percent_damaged_is_fatal(tmp_path):
    clips.images(tmp_path / "id", each=50, size=4)
    for i in (3, 7):
        (tmp_path / "id" / "red" / f"{i:04d}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"0007.png cannot be read .*more than 1% of 150 images"):
        folder(tmp_path / "id", mean_color)


def test_a_fault_of_the_preprocessing_is_not_taken_for_a_damaged_image(data):
    def broken(image):
        raise ValueError("my own mistake")

    with pytest.raises(ValueError, match="my own mistake"):
        folder(data, broken)


def test_images_of_different_sizes_are_refused_by_name(tmp_path):
    clips.images(tmp_path / "id", ("red",), each=2, size=4)
    clips.images(tmp_path / "id", ("tall",), each=1, size=6)
    with pytest.raises(DataError, match=r"tall.0000.png is \(6, 6, 3\) after preprocessing"):
        folder(tmp_path / "id", lambda image: torch.from_numpy(np.array(image)))


def test_empty_missing_and_flat_folders_end_in_sentences(tmp_path):
    with pytest.raises(UsageError, match=r"there is no directory .*nowhere\n  fix: one folder per class"):
        folder(tmp_path / "nowhere", mean_color)
    with pytest.raises(DataError, match="neither class folders nor images"):
        folder(tmp_path, mean_color)
    shade(tmp_path / "flat" / "1.png", 1)
    with pytest.raises(DataError, match="holds 1 images but no class folders"):
        folder(tmp_path / "flat", mean_color)
    shade(tmp_path / "half" / "ape" / "1.png", 1)
    (tmp_path / "half" / "bee").mkdir()
    with pytest.raises(DataError, match=r"half.bee holds no image \(1 of 2 folders"):
        folder(tmp_path / "half", mean_color)


def test_hidden_files_and_other_files_are_left_out_and_suffixes_may_be_upper_case(tmp_path):
    shade(tmp_path / "ape" / "1.PNG", 1)
    shade(tmp_path / "ape" / "deep" / "2.jpg", 2)
    shade(tmp_path / "ape" / "._1.png", 3)
    shade(tmp_path / ".ipynb_checkpoints" / "x.png", 4)
    (tmp_path / "ape" / "notes.txt").write_text("no picture")
    assert [path.name for path in class_folders(tmp_path)["ape"]] == ["1.PNG", "2.jpg"]


def test_a_loader_keeps_no_image(data):
    samples = [(path, 0) for path in sorted(data.rglob("*.png"))]
    seen = []
    loader = ImageFolder(samples, lambda image: seen.append(1) or mean_color(image), "id", 4)
    assert [sum(len(batch.targets) for batch in loader) for _ in range(2)] == [12, 12]
    assert len(seen) == 24  # decoded in each pass


def test_the_models_own_preprocessing_is_applied(tmp_path):
    model = ss.load(clips.save(tmp_path / "base", clips.network()))
    clips.images(tmp_path / "id", each=1)
    split = ss.folder(tmp_path / "id", model)
    expected = [model.preprocess(Image.open(path)) for path in sorted((tmp_path / "id").rglob("*.png"))]
    assert torch.equal(next(iter(split)).inputs, torch.stack(expected))


def test_no_warning_without_damage(data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder(data, mean_color)
