"""Webdatasets as CLIP_benchmark writes them, by tarfile alone."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image

Members = Iterable[tuple[str, bytes]]


def picture(shade: int, kind: str = "WEBP") -> bytes:
    """A grey picture, lossless."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade,) * 3).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


def tar(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


def samples(labels: Iterable[int], first: int = 0) -> list[tuple[str, bytes]]:
    """Members of grey pictures, sample i of shade i."""
    found = []
    for i, label in enumerate(labels, first):
        found += [(f"s{i:07d}.cls", str(label).encode()), (f"s{i:07d}.webp", picture(i))]
    return found


def webdataset(root: Path, shards: Mapping[str, Iterable[int]], classes: Iterable[str] = ("ape", "bee", "cat")) -> Path:
    """Split/number -> labels of its samples; shades count through the shards of a split."""
    counts: dict[str, int] = {}
    for name, labels in shards.items():
        split, labels = name.rpartition("/")[0], list(labels)
        tar(root / f"{name}.tar", samples(labels, counts.get(split, 0)))
        counts[split] = counts.get(split, 0) + len(labels)
    for split in counts:
        number = sum(name.rpartition("/")[0] == split for name in shards)
        (root / split / "nshards.txt").write_text(f"{number}\n")
    (root / "classnames.txt").write_text("\n".join(classes) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na sketch of the {c}\n")
    return root
