"""Webdatasets in the layout of CLIP_benchmark, read in place: no member is ever extracted to disk.

``DIR/{split}/0.tar, 1.tar, ...`` with ``nshards.txt`` beside them; ``classnames.txt`` and
``zeroshot_classification_templates.txt`` there or one folder above; samples ``key.jpg`` (png, webp, ...) + ``key.cls``.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from sharpscope.classnames import ClassNames, read_label_names, read_text
from sharpscope.collection import Collection
from sharpscope.errors import DataError, UsageError
from sharpscope.home import at_home
from sharpscope.pictures import UNLABELLED, Picture
from sharpscope.shards import Sample, read_shard

CLASSNAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
DEFAULT_SPLIT = "test"
_LAYOUT = "DIR/test/0.tar, 1.tar, ..., as CLIP_benchmark writes them; or a pattern DIR/test/{0..3}.tar"
_BRACES = re.compile(r"\{([^{}]*)\}")


class Archive(NamedTuple):
    """The shards of a reference, in order."""

    shards: list[Path]
    note: str | None = None  # which split was taken, where there are several

    def beside(self, name: str) -> Path | None:
        """Return the file of that name beside the shards or one folder above, None if there is none."""
        here = self.shards[0].parent
        return next((place / name for place in (here, here.parent) if (place / name).is_file()), None)


def archive(place: str | Path) -> Archive:
    """Return the shards of a directory, a tar file, or a pattern with ``{0..3}``, ``{a,b}``, ``*``.

    Raises
    ------
    UsageError
        If there is nothing at the place.
    DataError
        If shards are missing: by ``nshards.txt``, or by a gap in their numbers.
    """
    path = at_home(place)
    if path.is_dir():
        return _directory(path)
    names = expanded(str(path))
    shards = [shard for name in names for shard in _globbed(Path(name))]
    if missing := next((shard for shard in shards if not shard.is_file()), None):
        raise UsageError(f"there is no archive {missing}", _LAYOUT)
    if not shards:
        raise UsageError(f"no archive matches {place}", _LAYOUT)
    return Archive(list(dict.fromkeys(shards)))


def expanded(pattern: str) -> list[str]:
    """Return what a pattern with braces stands for.

    >>> expanded("{08..10}.tar"), expanded("{a,b}/0.tar")
    (['08.tar', '09.tar', '10.tar'], ['a/0.tar', 'b/0.tar'])
    """
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    first, dots, last = found[1].partition("..")
    if dots and first.isdigit() and last.isdigit():
        words = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        words = found[1].split(",")
    parts = [expanded(pattern[: found.start()] + word + pattern[found.end() :]) for word in words]
    return list(itertools.chain(*parts))


def _globbed(path: Path) -> list[Path]:
    return sorted(path.parent.glob(path.name), key=_in_order) if set(path.name) & set("*?[") else [path]


def _in_order(shard: Path) -> tuple[int, str]:
    """Return a key that puts 10.tar after 9.tar."""
    number = re.search(r"(\d+)$", shard.stem)
    return (int(number[1]) if number else -1, shard.name)


def _directory(root: Path) -> Archive:
    if shards := _globbed(root / "*.tar"):
        _check_complete(shards)
        return Archive(shards)
    splits = sorted({shard.parent.name for shard in root.glob("*/*.tar")})
    if not splits:
        packed = next(root.rglob("*.t*gz"), None)
        but = f", but {packed.name}: a packed archive cannot be read in place" if packed else ""
        raise DataError(f"{root} holds no .tar file{but}", "gunzip it" if packed else _LAYOUT)
    if len(splits) > 1 and DEFAULT_SPLIT not in splits:
        raise UsageError(f"{root} holds the splits {', '.join(splits)}", f"one of them: wds:{root / splits[0]}")
    chosen = DEFAULT_SPLIT if DEFAULT_SPLIT in splits else splits[0]
    note = f"split {chosen!r} of {', '.join(splits)}" if len(splits) > 1 else None
    return Archive(_directory(root / chosen).shards, note)


def _check_complete(shards: Sequence[Path]) -> None:
    """Raise if ``nshards.txt`` or the numbers of the shards say that one is missing."""
    stated = shards[0].with_name("nshards.txt")
    text = read_text(stated).strip() if stated.is_file() else ""
    if stated.is_file() and not text.isdigit():
        raise DataError(f"{stated} holds {text[:20]!r}", "the number of .tar files")
    if text and int(text) != len(shards):
        raise DataError(
            f"{stated} says {text} shards, there are {len(shards)}" + _gap(shards, int(text)),
            "fetch the missing ones; or name those to read: wds:DIR/{0..3}.tar",
        )
    numbers = [int(shard.stem) for shard in shards if shard.stem.isdigit()]
    if len(numbers) == len(shards) and numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise DataError(
            f"{shards[0].parent} has {len(shards)} shards up to {shards[-1].name}" + _gap(shards, numbers[-1] + 1),
            "fetch the missing ones; or name those to read: wds:DIR/{0..3}.tar",
        )


def _gap(shards: Sequence[Path], total: int) -> str:
    there = {shard.stem for shard in shards}
    missing = [str(number) for number in range(total) if str(number) not in there]
    return f"; {missing[0]}.tar is missing" if missing else ""


def webdataset_collection(
    place: str | Path, name: str | None, classnames: ClassNames | None, *, captions: bool = False
) -> Collection:
    """Return the samples of a webdataset, each once, in the order of shards and members, and the words of its labels.

    Parameters
    ----------
    place
        See :func:`archive`.
    name
        For rows and messages; default the name of the folder.
    classnames
        Label -> words, a file of that, or a text file with a line per class in the order of labels. Default:
        ``classnames.txt`` of the webdataset.
    captions
        Read ``key.txt``, too, of several lines the first; then no sample, or each, has a label.
    """
    found = archive(place)
    title = name or _title(found.shards[0])
    samples = {shard: read_shard(shard, captions=captions) for shard in found.shards}
    _check_distinct(samples)
    empty = [shard for shard, members in samples.items() if not members]
    if empty and len(empty) < len(samples):
        raise DataError(f"{empty[0]} holds no sample, other shards do", "copy it anew, or remove it from all shards")
    labelled = any(sample.label is not None for members in samples.values() for sample in members) or not captions
    words = label_words(found, classnames) if labelled else {}
    pictures = [
        Picture(
            f"{shard}:{sample.member}",
            _checked_label(sample, shard, words) if labelled else UNLABELLED,
            partial(_bytes, shard, sample),
            sample.caption,
        )
        for shard, members in samples.items()
        for sample in members
    ]
    if not pictures:
        raise DataError(f"{title!r}: {len(samples)} archives hold no sample", "samples key.jpg + key.cls")
    notes = () if found.note is None else (f"{title}: {found.note}",)
    return Collection(title, pictures, words, what="label", notes=notes)


def _title(shard: Path) -> str:
    above = shard.resolve().parent
    return above.parent.name if above.name in {"train", "test", "val", "validation"} else above.name


def _bytes(shard: Path, sample: Sample) -> io.BytesIO:
    with shard.open("rb") as file:
        file.seek(sample.offset)
        return io.BytesIO(file.read(sample.size))


def _check_distinct(samples: dict[Path, list[Sample]]) -> None:
    """Raise if two shards hold the same samples: a copy under another name would count them twice."""
    seen: dict[tuple[tuple[str, int], ...], Path] = {}
    for shard, members in samples.items():
        content = tuple((sample.member, sample.size) for sample in members)
        if content and content in seen:
            raise DataError(
                f"{shard.name} holds the same {len(content)} samples as {seen[content].name}", "remove the copy"
            )
        seen[content] = shard


def _checked_label(sample: Sample, shard: Path, words: dict[str, str]) -> str:
    if sample.label is None:
        raise DataError(f"{shard}:{sample.member} has no label, others have", "labels for all or for none")
    if str(sample.label) not in words:
        raise DataError(
            f"{shard}:{sample.member} has label {sample.label}, there are names for {len(words)} classes "
            f"({min(words)!r} to {max(words, key=int)!r})",
            f"a line per class in {CLASSNAMES}, the first for label 0",
        )
    return str(sample.label)


def label_words(found: Archive, classnames: ClassNames | None) -> dict[str, str]:
    """Return label -> words, in the order of the labels."""
    source = found.beside(CLASSNAMES) if classnames is None else classnames
    if source is None:
        raise DataError(
            f"there is no {CLASSNAMES} beside {found.shards[0]} or one folder above",
            "write it, a line per class in the order of labels; or --classnames FILE",
        )
    return read_label_names(source)


def archive_templates(place: str | Path) -> tuple[str, ...] | None:
    """Return the templates of a webdataset with ``{}`` for the class name, None if it has none."""
    file = archive(place).beside(TEMPLATES)
    if file is None:
        return None
    lines = [line.strip() for line in read_text(file).splitlines()]
    return tuple(line.replace("{c}", "{}") for line in lines if line)
