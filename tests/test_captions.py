"""Images with captions, from archives and data sets, up to a report of a contrastive objective."""

from __future__ import annotations

import archives
import clips
import numpy as np
import pytest
import torch
from optional import needs
from PIL import Image
from test_rows import ClassLabel, Table, Value, records, shade
from typer.testing import CliRunner

import sharpscope
from sharpscope.cli import app
from sharpscope.config import settings
from sharpscope.errors import DataError, UsageError
from sharpscope.saved import open_result


def archive(root, members):
    """A webdataset of one shard; members are pairs of ending and content for each sample."""
    found = [(f"s{i}.{kind}", content) for i, sample in enumerate(members) for kind, content in sample]
    archives.tar(root / "0.tar", found)
    return f"wds:{root}"


def sample(i, text, label=None):
    told = [("webp", archives.picture(i)), ("txt", text)]
    return [*told, ("cls", str(label).encode())] if label is not None else told


def captioned(source, **options):
    split = sharpscope.images(source, shade, captions=True, **options)
    return torch.cat([batch.inputs for batch in split])[:, 0].int().tolist(), split


def test_captions_of_an_archive_lie_beside_their_images_in_order(tmp_path):
    place = archive(tmp_path, [sample(i, f"shade {i}\n".encode()) for i in (3, 1, 2)])
    shades, split = captioned(place, name="web")
    assert shades == [3, 1, 2]
    assert (split.captions, split.labelled, split.classes) == (("shade 3", "shade 1", "shade 2"), False, None)


def test_of_several_captions_the_first_is_taken_and_a_sample_drawn_keeps_its_own(tmp_path):
    members = [sample(i, f"\n shade {i} \nanother\n".encode()) for i in range(9)]
    shades, split = captioned(archive(tmp_path, members), limit=4, seed=3)
    assert len(shades) == 4
    assert split.captions == tuple(f"shade {i}" for i in shades)


def test_labels_and_captions_are_read_together(tmp_path):
    place = archive(tmp_path, [sample(i, b"it", label) for i, label in enumerate([2, 0, 1])])
    (tmp_path / "classnames.txt").write_text("ape\nbee\ncat\n")
    _, split = captioned(place, classes=["cat", "bee", "ape"])
    assert (split.labelled, split.targets.tolist(), split.captions) == (True, [0, 2, 1], ("it",) * 3)
    assert sharpscope.images(place, shade).captions is None  # not asked for


def test_captions_are_part_of_what_the_data_are(tmp_path):
    marks = [captioned(archive(tmp_path / t, [sample(1, t.encode())]))[1].fingerprint for t in ("one", "two")]
    assert marks[0] != marks[1]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([[("webp", archives.picture(1)), ("cls", b"0")]], r"sample 's0' has no .txt \(found .webp, .cls\)"),
        ([[("txt", b"an ape")]], r"sample 's0' has no image \(found .txt\)"),
        ([sample(1, b" \n")], "s0.txt is empty\n  fix: a caption for each image"),
        ([sample(1, b"\xff\xfe")], r"s0.txt is no text in UTF-8: .*\n  fix: iconv"),
        ([sample(1, b"a", 0), sample(2, b"b")], "s1.webp has no label, others have\n  fix: labels for all or for none"),
    ],
)
def test_samples_without_a_usable_caption_are_named(tmp_path, members, message):
    (tmp_path / "classnames.txt").write_text("ape\n")
    with pytest.raises(DataError, match=message):
        captioned(archive(tmp_path, members))


FEATURES = {"image": Value(), "text": Value()}


def rows(texts):
    return [{"image": Image.new("RGB", (2, 2), (i,) * 3), "text": text} for i, text in enumerate(texts)]


def test_a_column_of_texts_is_captions_with_a_label_column_or_without():
    shades, split = captioned(Table(FEATURES, rows(["a", ["b", "c"], "d"])))
    assert (shades, split.captions, split.labelled) == ([0, 1, 2], ("a", "b", "d"), False)
    both = Table({**FEATURES, "label": ClassLabel("ape", "bee")}, records([1, 0], text="it"))
    _, split = captioned(both)
    assert (split.captions, split.classes, split.targets.tolist()) == (("it", "it"), ("ape", "bee"), [1, 0])


@pytest.mark.parametrize(
    ("features", "texts", "message"),
    [
        ({"image": Value()}, ["a"], "no caption column among image\n  fix: dataset.rename_column"),
        ({**FEATURES, "caption": Value()}, ["a"], "several caption columns: caption, text"),
        (FEATURES, ["a", None], "row 1 has None in the place of a caption"),
        (FEATURES, ["a", []], r"row 1 has \[\] in the place of a caption"),
        (FEATURES, [7], "row 0 has 7 in the place of a caption"),
    ],
)
def test_columns_without_a_usable_caption_are_named(features, texts, message):
    with pytest.raises((UsageError, DataError), match=message):
        captioned(Table(features, rows(texts)))


def test_a_real_data_set_gives_its_captions():
    library = needs("datasets")
    features = library.Features({"image": library.Image(), "caption": library.Value("string")})
    cells = [{"bytes": archives.picture(i), "path": None} for i in range(3)]
    table = library.Dataset.from_dict({"image": cells, "caption": ["x", "y", "z"]}, features=features)
    for dataset in (table, table.to_iterable_dataset(), table.with_format("torch")):
        assert captioned(dataset)[1].captions == ("x", "y", "z")


def test_a_folder_has_no_captions(tmp_path):
    with pytest.raises(UsageError, match="is a folder of images, which have no captions"):
        captioned(str(clips.images(tmp_path)))


# --- at a shell


def test_captions_without_a_contrastive_objective_are_refused():
    with pytest.raises(UsageError, match="--captions: captions are read for --objective contrastive only"):
        settings({"zero_shot": "a", "fine_tuned": "b", "id": "c", "captions": True})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    clips.pair(root)
    clips.images(root / "id", each=4)
    generator, pictures = np.random.default_rng(0), []
    for i in range(10):
        pixels = generator.integers(0, 255, (20, 20, 3), dtype=np.uint8)
        place = root / f"{i}.png"
        Image.fromarray(pixels).save(place)
        pictures.append([("png", place.read_bytes()), ("txt", f"thing number {i}".encode())])
    archive(root / "web", pictures)
    return root


def run(world, *more):
    flags = ["--zero-shot", world / "base", "--fine-tuned", world / "tuned", "--id", world / "id", "--quiet"]
    return CliRunner().invoke(app, ["report", *map(str, (*flags, "--alphas", "0,1", "--measures", "trace", *more))])


def test_a_report_of_a_contrastive_objective_on_captions(world, tmp_path):
    web = ("--objective", "contrastive", "--captions", "--sharpness-on", f"wds:{world / 'web'}", "--batch-size", "4")
    done = run(world, *web, "--tolerance", "20", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    result = open_result(tmp_path / "out")
    assert set(result.layers["split"]) == {"sharpness"}
    assert "text.block.00" in set(result.layers["layer"])
    page = (tmp_path / "out" / "index.html").read_text()
    assert "2 batches of 4 pairs, images with their captions" in page
    assert "contrastive, batches of 4" in page
    resolved = (tmp_path / "out" / "config.resolved.toml").read_text()
    assert 'objective = "contrastive"' in resolved
    assert "captions = true" in resolved


def test_a_dry_run_says_what_a_contrastive_batch_needs(world):
    done = run(world, "--objective", "contrastive", "--dry-run")
    assert done.exit_code == 3
    assert "'id' gives 12 images, a contrastive batch has 64" in done.output
    assert "--batch-size 12" in done.output
