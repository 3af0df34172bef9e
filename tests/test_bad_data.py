"""Bad data at the command line: each ends in its sentence and exit code, before anything is written."""

from __future__ import annotations

import json
import os
import shutil
import sys

import archives
import clips
import numpy as np
import pytest
from PIL import Image

from sharpscope import cli

pytestmark = pytest.mark.filterwarnings("default::UserWarning")  # the command line shows them
CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return clips.pair(tmp_path_factory.mktemp("models"))


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Good ID and OOD folders and a good webdataset, for one thing to be broken."""
    clips.images(tmp_path / "id", each=2)
    clips.images(tmp_path / "ood", each=2)
    archives.webdataset(tmp_path / "wds", {"test/0": [0, 1, 2], "test/1": [2, 1]}, CLASSES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("loads", None)


def report(models, capsys, id_="id", ood="ood", *more):
    flags = ["--zero-shot", models[0], "--fine-tuned", models[1], "--id", id_, "--ood", f"ood={ood}", *more]
    flags += ["--alphas", "0,1", "--measures", "trace", "--limit", 4, "--out", "out"]
    with pytest.raises(SystemExit) as ended:
        cli.app(["report", *map(str, flags)], prog_name="sharpscope")
    return ended.value.code or 0, capsys.readouterr().err


def rename(old, new):
    def broken(root):
        (root / old).rename(root / new)

    return broken


def content(name, written):
    def broken(root):
        (root / name).write_bytes(written)

    return broken


def emptied(root):
    shutil.rmtree(root / "id" / "red")
    (root / "id" / "red").mkdir()


def flat(root):
    for place in (root / "ood").iterdir():
        for image in place.iterdir():
            image.rename(root / "ood" / f"{place.name}{image.name}")
        place.rmdir()


def truncated(root):
    os.truncate(root / "wds" / "test" / "1.tar", 1500)


def archive(*members):
    def broken(root):
        archives.tar(root / "wds" / "test" / "1.tar", members)

    return broken


def locked(root):
    (root / "ood" / "red").chmod(0)
    if os.geteuid() == 0:  # whom no mode keeps out
        pytest.skip("root reads everything")


# What is broken, or how; exit code; what is said.
FOLDERS = {
    "renamed class": (
        rename("ood/red", "ood/reed"),
        3,
        r"'ood': folder 'reed' is none of the 3 classes; the nearest is 'red'",
    ),
    "unknown classes": (
        lambda root: [rename(f"ood/{name}", f"ood/x{i}")(root) for i, name in enumerate(CLASSES)],
        3,
        "'ood': folder 'x0' is none of the 3 classes (3 of 3 folders are unknown)",
    ),
    "duplicate class": (lambda root: clips.images(root / "ood", ("Red",)), 3, "'red' and 'Red' are both class 'red'"),
    "empty class": (emptied, 3, "red holds no image (1 of 3 folders are empty)"),
    "corrupt image": (content("id/red/0000.png", b"no picture"), 3, "id/red/0000.png: cannot identify image"),
    "zero-byte image": (content("ood/red/0001.png", b""), 3, "ood/red/0001.png: 0 bytes), more than 0.01 of all 6"),
    "cut image": (
        lambda root: os.truncate(root / "id/red/0000.png", 300),
        3,
        "'id': 1 images cannot be read so far (id/red/0000.png: ",
    ),
    "no labels": (
        flat,
        3,
        "ood holds 6 images but no class folders: accuracy and loss are measured, which need",
    ),
    "no folder": (lambda root: shutil.rmtree(root / "ood"), 2, "there is no directory ood"),
    "unreadable folder": (locked, 3, "ood/red cannot be read: Permission denied"),
    "float of unknown white": (
        lambda root: Image.fromarray(np.full((20, 20), 7.5, np.float32)).save(root / "id/red/0002.tif"),
        3,
        "id/red/0002.tif: greyscale of float32 from 7.5 to 7.5, where 0 to 1 can be scaled",
    ),
}
WEBDATASETS = {
    "truncated tar": (truncated, 3, "wds/test/1.tar is truncated"),
    "missing tar": (lambda root: (root / "wds/test/0.tar").unlink(), 3, "says 2 shards, there are 1; 0.tar is missing"),
    "no .cls": (archive(("a.webp", archives.picture(1))), 3, "sample 'a' has no .cls (found .webp)"),
    "label of another kind": (archive(("a.webp", b""), ("a.cls", b"red")), 3, "a.cls holds 'red'"),
    "label out of range": (archive(("a.webp", b""), ("a.cls", b"3")), 3, "a.webp has label 3, there are names for 3"),
    "no class names": (lambda root: (root / "wds/classnames.txt").unlink(), 3, "there is no classnames.txt beside"),
    "unknown class": (content("wds/classnames.txt", b"blue\ngreen\nredd\n"), 3, "label '2' ('redd') is none of the 3"),
    "duplicate class name": (
        content("wds/classnames.txt", b"blue\nred\nred\n"),
        3,
        "'1' and '2' are both 'red'",
    ),
    "corrupt member": (archive(("a.webp", b"?"), ("a.cls", b"1")), 3, "wds/test/1.tar:a.webp: cannot identify"),
}
X = "X = torch.zeros(6, 3, 16, 16); Y = torch.arange(6) % 3"
LOADERS = {
    "shuffle": ("DataLoader(TensorDataset(X, Y), shuffle=True)", "'ood' is a DataLoader with shuffle=True"),
    "exhausted generator": ("(b for b in [])", "'ood' gave no example"),
    "NaN pixels": ("[(X / 0, Y)]", "batch 0 of 'ood' holds NaN or infinities in 6 of 6 examples"),
    "labels out of range": ("[(X, Y + 1)]", "'ood' has labels 1..3, the model has 3 outputs (0..2)"),
    "no label": ("[(X, Y * 0 - 1)]", "(-1 stands for 'no label' in many sets"),
    "float labels": ("[(X, Y.float())]", "targets (6,) torch.float32, no whole numbers by type"),
    "one-hot labels": ("[(X, torch.eye(6)[:, :3] + 0)]", "batch 0 of 'ood' has targets (6, 3) torch.float32, "),
    "unlabelled": ("[X]", "batch 0 of 'ood' is a Tensor, without labels; accuracy and loss are measured"),
    "augmentation": ("Random()", "batch 0 of 'ood' has the same labels but other values"),
    "wrong size": ("[(torch.zeros(6, 3, 20, 20), Y)]", "the images are (3, 20, 20), the model takes (3, 16, 16)"),
    "no batch": ("TensorDataset(X, Y)", "batch 0 of 'ood' has targets () torch.int64, a single example"),
}
RANDOM = "class Random:\n    def __iter__(self):\n        return iter([(torch.rand(6, 3, 16, 16), Y)])\n"


@pytest.mark.parametrize("fault", FOLDERS)
def test_bad_folders(models, world, capsys, fault):
    broken, expected, said = FOLDERS[fault]
    broken(world)
    code, err = report(models, capsys)
    assert (code, said in err, "Traceback" in err) == (expected, True, False), err
    assert not (world / "out").exists()


@pytest.mark.parametrize("fault", WEBDATASETS)
@pytest.mark.parametrize("role", ["id", "ood"])
def test_bad_webdatasets(models, world, capsys, fault, role):
    broken, expected, said = WEBDATASETS[fault]
    broken(world)
    if (fault, role) in {("unknown class", "id"), ("duplicate class name", "ood")}:
        pytest.skip("no fault in this role")
    code, err = report(models, capsys, *(("wds:wds", "id") if role == "id" else ("id", "wds:wds")))
    assert (code, said in err, "Traceback" in err) == (expected, True, False), err
    assert not (world / "out").exists()


@pytest.mark.parametrize("fault", LOADERS)
def test_bad_loaders(models, world, capsys, fault):
    source, said = LOADERS[fault]
    imports = "import torch\nfrom torch.utils.data import DataLoader, TensorDataset\n"
    (world / "loads.py").write_text(f"{imports}{X}\n{RANDOM}\ndef ood():\n    return {source}\n")
    code, err = report(models, capsys, "id", "py:loads:ood")
    assert (code, said in err, "Traceback" in err) == (3, True, False), err
    assert not (world / "out").exists()


def test_pictures_of_every_mode_are_measured_on(models, world, capsys):
    shades = {"L": 9, "LA": (9, 9), "P": 3, "CMYK": (1, 2, 3, 4), "RGBA": (9, 9, 9, 9), "I;16": 9, "1": 1}
    for mode, shade in shades.items():
        file = world / "ood" / "red" / f"{mode.replace(';', '')}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (20, 24), shade).save(file)
    code, err = report(models, capsys)
    assert code == 0, err
    assert len(np.load(world / "out" / "correct.npz")["0.0|ood"]) == 6 + len(shades)


def test_webdatasets_folders_and_factories_are_measured_on_together(models, world, capsys):
    (world / "loads.py").write_text(
        "import sharpscope\ndef again(model):\n    return 'ood'\n"
        "def ready(model):\n    return sharpscope.folder('ood', model, batch_size=2)\n"
    )
    more = ["--ood", "again=py:loads:again", "--ood", "ready=py:loads:ready", "--ood", "folder=id"]
    code, err = report(models, capsys, "wds:wds", "wds:wds/test/1.tar", *more)
    assert code == 0, err
    assert "the ID webdataset brings 2 templates, which are used" in err
    facts = json.loads((world / "out" / "scan.json").read_text())["splits"]
    assert {name: (fact["n"], fact["columns"]) for name, fact in facts.items()} == {
        "id": (5, None),
        "ood": (2, [1, 2]),
        "again": (6, None),
        "ready": (6, None),
        "folder": (6, None),
    }
    assert facts["again"]["fingerprint"] == facts["ready"]["fingerprint"]


def test_a_label_of_the_ood_set_is_not_read_as_that_of_the_id_set(models, world, capsys):
    """The same images under another order of class names: the same labels must come out."""
    archives.webdataset(world / "turned", {"test/0": [2, 1, 0], "test/1": [0, 1]}, CLASSES[::-1])
    code, err = report(models, capsys, "wds:wds", "wds:turned", "--ood", "same=wds:wds")
    assert code == 0, err
    found = np.load(world / "out" / "correct.npz")
    names = [name for name in found.files if "same" in name]
    assert names
    for name in names:
        assert (found[name] == found[name.replace("same", "ood")]).all()


@pytest.mark.parametrize(
    ("ref", "said"),
    [
        ("py:loads", "'py:loads' is not py:pkg.mod:factory"),
        ("py:nowhere.at.all:ood", "there is no module nowhere"),
        ("py:loads:absent", "module loads has no function 'absent'"),
    ],
)
def test_factories_that_are_not_there(models, world, capsys, ref, said):
    (world / "loads.py").write_text("absent = 3\n")
    code, err = report(models, capsys, "id", ref)
    assert (code, said in err) == (2, True), err


def test_a_fault_inside_a_factory_is_the_users_own(world):
    from sharpscope.factory import made

    (world / "loads.py").write_text("import nowhere_to_be_found\n")
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        made("py:loads:ood")


def test_images_bounds_every_set_and_is_even_over_classes(models, world, capsys):
    archives.webdataset(world / "wds", {"test/0": [0, 1, 2, 2], "test/1": [2, 1, 2, 2]}, CLASSES)
    code, err = report(models, capsys, "wds:wds", "ood", "--images", 3)
    assert code == 0, err
    facts = json.loads((world / "out" / "scan.json").read_text())["splits"]
    assert {name: fact["n"] for name, fact in facts.items()} == {"id": 3, "ood": 3}
    assert "images = 3" in (world / "out" / "config.resolved.toml").read_text()
    assert report(models, capsys, "id", "ood", "--images", 0)[0] == 2


def test_one_map_of_class_names_serves_folders_of_more_and_fewer_classes(models, world, capsys):
    for place in ("id", "ood"):
        for i, name in enumerate(CLASSES):
            (world / place / name).rename(world / place / f"n{i}")
    clips.images(world / "ood", ("n9",))
    (world / "map.csv").write_text("".join(f"n{i},{name}\n" for i, name in enumerate(CLASSES)))
    code, err = report(models, capsys, "id", "ood", "--classnames", "map.csv")
    assert (code, "no words for folder 'n9'" in err) == (2, True), err
    code, err = report(models, capsys, "id", "ood", "--classnames", "map.csv", "--subset")
    assert code == 0, err
    assert "warning: ood: 1 folders have no class name and are left out (n9)" in err
    assert json.loads((world / "out" / "scan.json").read_text())["splits"]["ood"]["classes"] == list(CLASSES)
