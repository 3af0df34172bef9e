"""Claims about folders of images: mapped by name, in one order, and what is damaged or empty is said."""

from __future__ import annotations

import json
import warnings

import clips
import numpy as np
import pytest
import torch
from PIL import Image, features

import sharpscope as ss
from sharpscope.errors import DataError, UsageError
from sharpscope.folders import class_folders, folder


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
    with pytest.warns(UserWarning, match="left out"):
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
    (tmp_path / "index.json").write_text(json.dumps({str(i): list(pair) for i, pair in enumerate(names.items())}))
    (tmp_path / "names.csv").write_text("folder,name\nbee,honey bee\nape,a great ape\n" + 'cat_fish,"cat fish"\n')
    (tmp_path / "names.tsv").write_text("\n".join("\t".join(pair) for pair in names.items()), encoding="utf-8-sig")
    files = [tmp_path / name for name in ("names.txt", "names.json", "index.json", "names.csv", "names.tsv")]
    for source in (*files, names):
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
        ("ape,great ape\nbee\n", ".csv", "a line of 1 columns: 'bee'"),
        ("ape,great ape\nape,small ape\n", ".csv", "calls 'ape' both 'great ape' and 'small ape'"),
        (
            '{"apes": "ape", "bee": "bee", "cat_fish": "fish"}',
            ".json",
            "no words for folder 'ape' .*they have is 'apes'",
        ),
        ("{", ".json", "is no JSON"),
        (None, ".txt", "no file of class names at"),
        ("ape\nbee\ncaf\udce9\n", ".txt", "is no text in UTF-8: .*byte 0xe9"),
    ],
)
def test_class_names_that_cannot_be_meant_are_refused(data, tmp_path, content, suffix, said):
    file = tmp_path / f"names{suffix}"
    if content is not None:
        file.write_text(content, errors="surrogateescape")
    with pytest.raises(UsageError, match=said):
        folder(data, mean_color, classnames=file)


def test_two_folders_with_the_same_words_are_refused(data):
    with pytest.raises(DataError, match="folders 'ape' and 'bee' are both 'animal'"):
        folder(data, mean_color, classnames={"ape": "animal", "bee": "animal", "cat_fish": "fish"})


def test_a_limit_is_even_over_classes_and_always_the_same_images(data):
    split = folder(data, mean_color, limit=6)
    assert torch.bincount(split.targets).tolist() == [2, 2, 2]
    assert read(split) == sorted(read(split)) == read(folder(data, mean_color, limit=6))
    others = {tuple(read(folder(data, mean_color, limit=6, seed=seed))) for seed in range(4)}
    assert len(others) > 1
    with pytest.raises(UsageError, match="limit=0: needs a number of images"):
        folder(data, mean_color, limit=0)


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
    with pytest.raises(
        DataError,
        match=r"2 images cannot be read so far \(.*0003.png: 0 bytes; .*0007.png: 0 bytes\), "
        r"more than 0.01 of all 150\n  fix: ",
    ):
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


def test_a_class_folder_whose_name_is_no_text_is_refused(tmp_path):
    try:
        shade(tmp_path / "data" / "r\udcffd" / "a.png", 1)
    except (OSError, UnicodeError):
        pytest.skip("no such names here")
    with pytest.raises(DataError, match=r"data/r.*d' is no UTF-8, and names of classes are text\n  fix: rename"):
        class_folders(tmp_path / "data")


def test_hidden_files_and_other_files_are_left_out_and_suffixes_may_be_upper_case(tmp_path):
    shade(tmp_path / "ape" / "1.PNG", 1)
    shade(tmp_path / "ape" / "deep" / "2.jpg", 2)
    shade(tmp_path / "ape" / "._1.png", 3)
    shade(tmp_path / ".ipynb_checkpoints" / "x.png", 4)
    (tmp_path / "ape" / "notes.txt").write_text("no picture")
    found = class_folders(tmp_path)
    assert [path.name for path in found.images["ape"]] == ["1.PNG", "2.jpg"]
    assert found.hidden == 2
    with pytest.warns(UserWarning, match=r"pets: 1 files that are no images are left out \(notes.txt\), and 2 hidden"):
        assert len(folder(tmp_path, mean_color, name="pets")) == 2


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


# --- names that nearly agree


def test_names_that_differ_in_case_or_underscores_are_the_same_class_and_this_is_said(data, tmp_path):
    shade(tmp_path / "sketch" / "Cat-Fish" / "x.png", 9)
    shade(tmp_path / "sketch" / "BEE" / "x.png", 8)
    with pytest.warns(UserWarning, match="sketch: folder '(Cat-Fish|BEE)' is taken as class '(cat fish|bee)'") as said:
        split = folder(tmp_path / "sketch", mean_color, classes=folder(data, mean_color).classes)
    assert len(said) == 2
    assert split.targets.tolist() == [1, 2]
    assert split.notes == tuple(str(warning.message) for warning in said)


def test_one_name_in_two_unicode_forms_is_one_class(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    shade(tmp_path / "id" / composed / "x.png", 1)
    shade(tmp_path / "mac" / decomposed / "x.png", 2)
    shade(tmp_path / "id" / "\u72ac" / "\u5199\u771f.png", 3)
    classes = folder(tmp_path / "id", mean_color).classes
    assert classes == (composed, "\u72ac")
    with pytest.warns(UserWarning, match="is taken as class"):
        assert folder(tmp_path / "mac", mean_color, classes=classes).targets.tolist() == [0]


def test_a_name_that_could_be_two_classes_is_refused_but_an_exact_one_is_taken(tmp_path):
    shade(tmp_path / "letters" / "a" / "x.png", 1)
    assert folder(tmp_path / "letters", mean_color, classes=["A", "a"]).targets.tolist() == [1]
    with pytest.raises(DataError, match="folder 'a' could be class 'A' or ' a '"):
        folder(tmp_path / "letters", mean_color, classes=["A", " a "])


def test_two_folders_that_nearly_agree_on_a_class_are_refused(tmp_path):
    shade(tmp_path / "two" / "bee" / "x.png", 1)
    shade(tmp_path / "two" / "Bee" / "x.png", 2)
    with pytest.raises(DataError, match="folders 'bee' and 'Bee' are both class 'bee', but for case or underscores"):
        folder(tmp_path / "two", mean_color, classes=["ape", "bee"])
    both = folder(tmp_path / "two", mean_color, classes=["ape", "bee"], classnames={"bee": "bee", "Bee": "bee"})
    assert both.targets.tolist() == [1, 1]


def test_what_a_subset_leaves_out_is_said(data, tmp_path):
    for name in ("bee", "zebra", "yak"):
        shade(tmp_path / "more" / name / "x.png", 9)
    with pytest.warns(
        UserWarning, match=r"more: 2 of 3 folders are none of the 3 classes and left out \('yak', 'zebra'\)"
    ):
        folder(tmp_path / "more", mean_color, classes=["ape", "bee", "cat"], subset=True)
    words = {"bee": "honey bee", "yak": "ox"}
    with pytest.raises(UsageError, match="no words for folder 'zebra'"):
        folder(tmp_path / "more", mean_color, classes=["honey bee"], classnames=words)
    with pytest.warns(UserWarning, match=r"more: 1 folders have no class name and are left out \(zebra\)"):
        split = folder(tmp_path / "more", mean_color, classes=["honey bee", "ox"], classnames=words, subset=True)
    assert split.targets.tolist() == [0, 1]


def test_lines_of_wordnet_ids_and_words_are_a_map(tmp_path):
    for name in ("n01440764", "n01443537"):
        shade(tmp_path / "id" / name / "x.png", 9)
    (tmp_path / "synsets.txt").write_text("n01443537 goldfish\nn01440764 tench, Tinca tinca\n")
    assert folder(tmp_path / "id", mean_color, classnames=tmp_path / "synsets.txt").classes == (
        "tench, Tinca tinca",
        "goldfish",
    )


# --- file systems


def test_links_are_followed_but_not_in_circles_and_a_broken_one_is_an_unreadable_image(tmp_path):
    shade(tmp_path / "id" / "ape" / "1.png", 1)
    shade(tmp_path / "elsewhere" / "more" / "2.png", 2)
    (tmp_path / "id" / "ape" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "id" / "ape" / "up").symlink_to(tmp_path / "id")
    (tmp_path / "id" / "ape" / "itself").symlink_to(tmp_path / "id" / "ape" / "itself")
    (tmp_path / "id" / "bee").symlink_to(tmp_path / "elsewhere")
    found = class_folders(tmp_path / "id").images
    assert {name: [path.name for path in paths] for name, paths in found.items()} == {
        "ape": ["1.png", "2.png"],
        "bee": ["2.png"],
    }
    (tmp_path / "id" / "ape" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"1 images cannot be read so far \(.*gone.png: .*No such file"):
        folder(tmp_path / "id", mean_color)


def test_the_order_is_that_of_names_whatever_the_file_system_says(data, monkeypatch):
    straight = read(folder(data, mean_color))
    import os

    listed = os.scandir

    class Backwards:
        def __init__(self, path):
            with listed(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert read(folder(data, mean_color)) == straight


def test_a_folder_of_splits_is_not_taken_for_classes(tmp_path):
    for split in ("train", "val"):
        shade(tmp_path / "data" / split / "ape" / "1.png", 1)
    with pytest.raises(
        DataError, match=r"data holds the folders train, val, which are splits, not classes\n  fix: .*val"
    ):
        folder(tmp_path / "data", mean_color)


def test_an_unreadable_folder_ends_in_a_sentence(data, monkeypatch):
    import os

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DataError, match=r"ape cannot be read: Permission denied"):
        folder(data, mean_color)


def test_images_by_their_rarer_names_are_read_and_what_pillow_cannot_read_is_counted(tmp_path):
    clips.images(tmp_path / "id", ["red"], each=2, size=8)
    image = Image.open(tmp_path / "id" / "red" / "0000.png")
    image.save(tmp_path / "id" / "red" / "a.jfif", "JPEG")
    image.save(tmp_path / "id" / "red" / "a.JPE", "JPEG")
    (tmp_path / "id" / "red" / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    with pytest.raises(
        DataError, match=r"1 images cannot be read so far \(.*phone.heic: .*\n  fix: .*convert or remove"
    ):
        folder(tmp_path / "id", mean_color)
    with pytest.warns(UserWarning, match=r"1 of 5 images could not be read and are left out \(.*phone.heic"):
        assert len(folder(tmp_path / "id", mean_color, max_unreadable=0.3)) == 4


@pytest.mark.skipif(not features.check("avif"), reason="Pillow was built without AVIF")
def test_avif_is_an_image(tmp_path):
    clips.images(tmp_path / "id", ["red"], each=1, size=8)
    Image.open(tmp_path / "id" / "red" / "0000.png").save(tmp_path / "id" / "red" / "a.avif")
    assert len(folder(tmp_path / "id", mean_color)) == 2


def test_more_damage_can_be_allowed(tmp_path):
    clips.images(tmp_path / "id", each=4, size=4)
    (tmp_path / "id" / "red" / "0000.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"1 of 12 images could not be read and are left out \(.*0000.png: 0 bytes\)"):
        assert len(folder(tmp_path / "id", mean_color, max_unreadable=0.1)) == 11
    with pytest.raises(UsageError, match=r"max_unreadable=1\.5"):
        folder(tmp_path / "id", mean_color, max_unreadable=1.5)


def test_a_random_augmentation_in_the_preprocessing_is_refused(data):
    with pytest.raises(DataError, match=r"batch 0 of 'id' has the same labels but other values .*random augmentation"):
        folder(data, lambda image: mean_color(image) + torch.rand(1))


def test_a_model_without_preprocessing_is_refused(data):
    with pytest.raises(UsageError, match="a Linear has no preprocessing of images"):
        folder(data, torch.nn.Linear(2, 2))
