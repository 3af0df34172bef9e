"""Webdatasets in the layout of CLIP_benchmark: each sample once, nothing extracted, what is missing named."""

from __future__ import annotations

import gc
import gzip
import os

import archives
import numpy as np
import pytest
import torch
from optional import needs

import sharpscope
from sharpscope.errors import DataError, UsageError
from sharpscope.webdataset import archive, archive_templates

LABELS = {"test/0": [2, 0, 1], "test/1": [0, 0], "test/2": [1, 2, 2, 0]}


def shade(image):
    return torch.tensor([float(np.asarray(image)[0, 0, 0])])


def read(root, **options):
    return sharpscope.images(f"wds:{root}", shade, **options)


def shades(split):
    return torch.cat([batch.inputs for batch in split])[:, 0].int().tolist()


@pytest.fixture
def root(tmp_path):
    return archives.webdataset(tmp_path / "pets", LABELS)


def test_every_sample_comes_once_in_the_order_of_shards_with_the_names_of_its_labels(root):
    split = read(root, batch_size=4)
    assert shades(split) == list(range(9))
    assert split.targets.tolist() == [2, 0, 1, 0, 0, 1, 2, 2, 0]
    assert (split.classes, split.columns, split.name) == (("ape", "bee", "cat"), None, "pets")
    assert shades(read(root, limit=3)) == sorted(shades(read(root, limit=3)))
    assert sorted(read(root, limit=3).targets.tolist()) == [0, 1, 2]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the library leaves its files open
def test_it_agrees_with_the_webdataset_library(root):
    library = needs("webdataset")
    urls = [str(root / f"{name}.tar") for name in LABELS]
    pairs = library.WebDataset(urls, shardshuffle=False, empty_check=False).decode("pil").to_tuple("webp", "cls")
    expected = [(int(shade(image)), label) for image, label in pairs]
    split = read(root)
    assert list(zip(shades(split), split.targets.tolist(), strict=True)) == expected
    gc.collect()


def test_shards_are_counted_not_spelt(tmp_path):
    root = archives.webdataset(tmp_path / "many", {f"test/{i}": [0] for i in range(12)})
    assert shades(read(root)) == list(range(12))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("test/{0..1}.tar", [0, 1, 2, 3, 4]),
        ("test/{2,0}.tar", [5, 6, 7, 8, 0, 1, 2]),
        ("test/1.tar", [3, 4]),
        ("test/*.tar", list(range(9))),
        ("test", list(range(9))),
        ("{test,test}/1.tar", [3, 4]),  # a shard named twice is read once
    ],
)
def test_patterns_name_shards(root, pattern, expected):
    assert shades(read(root / pattern)) == expected


def test_the_test_split_is_taken_where_there_are_several_and_this_is_said(tmp_path):
    root = archives.webdataset(tmp_path / "pets", {"test/0": [0, 1, 2], "train/0": [0] * 5})
    with pytest.warns(UserWarning, match="pets: split 'test' of test, train"):
        assert len(read(root)) == 3
    assert len(read(root / "train")) == 5
    (root / "test").rename(root / "val")
    with pytest.raises(UsageError, match=r"pets holds the splits train, val\n  fix: one of them: wds:.*train"):
        read(root)


def test_classes_are_matched_by_name_with_those_of_a_folder(root):
    split = read(root, classes=["cat", "dog", "ape", "bee"])
    assert split.targets.tolist() == [0, 2, 3, 2, 2, 3, 0, 0, 2]
    assert split.columns == (0, 2, 3)
    with pytest.raises(DataError, match=r"label '0' \('ape'\) is none of the 3 classes; the nearest is 'apes'"):
        read(root, classes=["cat", "apes", "bee"])
    with pytest.warns(UserWarning, match="1 of 3 labels are none of the 2 classes"):
        assert read(root, classes=["cat", "bee"], subset=True).targets.tolist() == [0, 1, 1, 0, 0]


def test_class_names_may_come_from_elsewhere(root, tmp_path):
    assert read(root, classnames={"0": "a", "1": "b", "2": "c"}).classes == ("a", "b", "c")
    (root / "classnames.txt").unlink()
    with pytest.raises(DataError, match=r"there is no classnames.txt beside .*0.tar or one folder above"):
        read(root)
    (tmp_path / "mine.txt").write_text("x\ny\nz\nw\n")
    assert read(root, classnames=tmp_path / "mine.txt").classes == ("x", "y", "z", "w")
    with pytest.raises(UsageError, match="'ape' in the place of a class number"):
        read(root, classnames={"ape": "ape"})


def test_the_templates_that_it_brings_are_read(root):
    assert archive_templates(root) == ("a photo of a {}.", "a sketch of the {}")
    (root / "zeroshot_classification_templates.txt").unlink()
    assert archive_templates(root) is None


def test_texts_of_another_encoding_are_refused_by_name(root):
    (root / "zeroshot_classification_templates.txt").write_bytes(b"a sch\xf6ne {c}\n")
    with pytest.raises(UsageError, match=r"zeroshot_classification_templates.txt is no text in UTF-8"):
        archive_templates(root)
    (root / "test" / "nshards.txt").write_bytes(b"3\xff")
    with pytest.raises(UsageError, match=r"nshards.txt is no text in UTF-8"):
        read(root)


def test_nothing_is_written_beside_the_archives(root):
    before = sorted(root.rglob("*"))
    read(root)
    assert sorted(root.rglob("*")) == before


def test_names_as_clip_benchmark_writes_them_when_it_copies_files_are_read(tmp_path):
    members = [
        ("s0..png", archives.picture(7, "PNG")),
        ("s0.cls", b"1\n"),
        ("sub/s1.JPEG", archives.picture(9, "JPEG")),
    ]
    root = archives.webdataset(tmp_path / "pets", {"test/0": []})
    archives.tar(root / "test/0.tar", [*members, ("sub/s1.cls", b"0"), ("._s0.png", b"x"), ("s0.json", b"{}")])
    split = read(root)
    assert (shades(split), split.targets.tolist()) == ([7, 9], [1, 0])


def test_a_damaged_image_is_named_by_archive_and_member(tmp_path):
    members = archives.samples([0, 1] * 60)
    members[5] = (members[5][0], b"")
    root = archives.webdataset(tmp_path / "pets", {"test/0": []})
    archives.tar(root / "test/0.tar", members)
    with pytest.warns(UserWarning, match=r"pets: 1 of 120 images could not be read .*0.tar:s0000002.webp: 0 bytes"):
        assert len(read(root)) == 119


# --- what is missing or damaged


def cut(path, size):
    os.truncate(path, size)


def without_end(path):
    """Cut exactly behind the last member: no program would notice a missing one."""
    content = path.read_bytes()
    cut(path, len(content.rstrip(b"\0")) + (-len(content.rstrip(b"\0"))) % 512)


def doubled(path):
    path.write_bytes(path.read_bytes() * 2)


def zipped(path):
    path.write_bytes(gzip.compress(path.read_bytes()))


def scribbled(path):
    content = bytearray(path.read_bytes())
    content[1024:1034] = b"\xff" * 10
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: cut(path, 2000), r"1.tar is truncated"),
        (lambda path: cut(path, 700), r"1.tar is truncated"),
        (without_end, r"1.tar is truncated: it ends at byte \d+ without an end mark\n  fix: copy it anew"),
        (lambda path: cut(path, 0), r"1.tar is truncated or no tar archive: empty file"),
        (doubled, r"1.tar goes on after its end mark"),
        (zipped, r"1.tar is truncated or no tar archive: .*\n  fix: .*unpack .tar.gz"),
        (scribbled, r"1.tar is damaged at byte 1024: no member begins there"),
        (lambda path: path.unlink(), r"nshards.txt says 3 shards, there are 2; 1.tar is missing"),
        (lambda path: path.with_name("nshards.txt").write_text("three"), r"nshards.txt holds 'three'"),
        (lambda path: path.with_name("nshards.txt").write_text("4"), r"says 4 shards, there are 3; 3.tar is missing"),
        (
            lambda path: (path.unlink(), path.with_name("nshards.txt").unlink()),
            r"test has 2 shards up to 2.tar; 1.tar is missing",
        ),
        (
            lambda path: path.write_bytes(path.with_name("0.tar").read_bytes()),
            r"1.tar holds the same 3 samples as 0.tar\n  fix: remove the copy",
        ),
    ],
    ids=[
        *("in a member", "in a header", "at a boundary", "empty", "two in one", "gzip", "scribbled", "missing"),
        *("odd count", "more counted", "gap", "copy"),
    ],
)
def test_damaged_and_missing_archives_are_refused_by_name(root, damage, said):
    damage(root / "test" / "1.tar")
    with pytest.raises(DataError, match=said):
        read(root)


IMAGE = archives.picture(3)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("a.webp", IMAGE)], r"sample 'a' has no .cls \(found .webp\)\n  fix: .*key.jpg \+ key.cls"),
        ([("a.webp", IMAGE), ("a.txt", b"an ape")], r"no .cls \(found .webp, .txt, only captions: a retrieval set\?\)"),
        ([("a.cls", b"1"), ("a.npy", b"1")], r"sample 'a' has no image \(found .cls, .npy\)"),
        ([("a.cls", b"1"), ("a.png", IMAGE), ("a.jpg", IMAGE)], r"sample 'a' has several images"),
        ([("a.cls", b"ape"), ("a.png", IMAGE)], r"a.cls holds 'ape'\n  fix: a class number"),
        ([("a.cls", b"-1"), ("a.png", IMAGE)], r"a.cls holds '-1'"),
        ([("a.cls", b"3"), ("a.png", IMAGE)], r"a.png has label 3, there are names for 3 classes \('0' to '2'\)"),
        ([("a.cls", b"1"), ("a.png", IMAGE), ("a.cls", b"1")], r"a.cls occurs twice"),
        ([], "hold no sample"),
    ],
)
def test_incomplete_samples_are_refused_by_name(tmp_path, members, said):
    root = archives.webdataset(tmp_path / "pets", {"test/0": []})
    archives.tar(root / "test/0.tar", members)
    with pytest.raises(DataError, match=said):
        read(root)


def test_places_without_archives_end_in_sentences(root, tmp_path):
    with pytest.raises(UsageError, match=r"there is no archive .*nowhere"):
        read(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"there is no archive .*3.tar"):
        archive(root / "test" / "{0..3}.tar")
    with pytest.raises(UsageError, match=r"no archive matches .*x"):
        archive(root / "x*.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no \.tar file\n"):
        archive(tmp_path / "empty")
    (tmp_path / "empty" / "0.tar.gz").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"no .tar file, but 0.tar.gz: a packed archive cannot be read in place\n  fix: gunzip"
    ):
        archive(tmp_path / "empty")
