"""One tar archive of labelled images: where each sample lies in it, verified to its end mark."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import NamedTuple

from sharpscope.errors import DataError
from sharpscope.pictures import SUFFIXES

LABEL = "cls"
_BLOCK = 512
_TAIL = 1 << 20  # bytes that are looked at after the last member


class Sample(NamedTuple):
    """An image in an archive, and its label."""

    member: str
    offset: int  # bytes from the start of the archive
    size: int
    label: int


def read_shard(path: Path) -> list[Sample]:
    """Return the samples of an archive in its order, without reading an image. Cost: one pass over the headers.

    Raises
    ------
    DataError
        If the archive is truncated, damaged, packed or ends twice, a sample has no image or no label, or a member
        occurs twice.
    """
    members: dict[str, dict[str, tarfile.TarInfo]] = {}
    labels: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                key, kind = _parts(member.name)
                if not member.isfile() or key is None:
                    continue
                if kind in members.setdefault(key, {}):
                    raise DataError(f"{path}: {member.name} occurs twice", "each sample once")
                members[key][kind] = member
                if kind == LABEL:
                    labels[key] = archive.extractfile(member).read()  # type: ignore[union-attr]
            last = archive.getmembers()[-1:]
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{path} is truncated or no tar archive: {error}", "copy it anew; unpack .tar.gz first"
        ) from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}", "check the file and its permissions"
        ) from error
    _check_end(path, max((member.offset_data + -(-member.size // _BLOCK) * _BLOCK for member in last), default=0))
    return [_sample(path, key, found, labels) for key, found in members.items()]


def _parts(name: str) -> tuple[str | None, str]:
    """Return key and extension of a member as webdataset splits them, at the first dot; no key for hidden files."""
    folder, slash, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    # CLIP_benchmark writes "s0000000..jpg" where it copied files.
    return (folder + slash + stem if stem else None), kind.lstrip(".").lower()


def _check_end(path: Path, end: int) -> None:
    """Raise unless zeros follow the last member, as tar's end mark; without it members may be missing."""
    with path.open("rb") as file:
        file.seek(end)
        rest = file.read(_TAIL)
    if len(rest) < _BLOCK:
        raise DataError(f"{path} is truncated: it ends at byte {end + len(rest)} without an end mark", "copy it anew")
    if any(rest[:_BLOCK]):
        raise DataError(f"{path} is damaged at byte {end}: no member begins there", "copy it anew")
    if any(rest):
        raise DataError(
            f"{path} goes on after its end mark, e.g. as two archives put together do", "one archive a file"
        )


def _sample(path: Path, key: str, found: dict[str, tarfile.TarInfo], labels: dict[str, bytes]) -> Sample:
    images = [kind for kind in found if f".{kind}" in SUFFIXES]
    if len(images) != 1 or key not in labels:
        lacks = f"no .{LABEL}" if images else "no image"
        captions = ", only captions: a retrieval set?" if "txt" in found and key not in labels else ""
        raise DataError(
            f"{path}: sample {key!r} has {lacks if len(images) < 2 else 'several images'} "
            f"(found {', '.join(f'.{kind}' for kind in found)}{captions})",
            "each sample one image and its class number: key.jpg + key.cls",
        )
    text = labels[key].decode("ascii", "replace").strip()
    if not text.isdigit():
        raise DataError(f"{path}: {key}.{LABEL} holds {text[:20]!r}", "a class number, 0 or more")
    image = found[images[0]]
    return Sample(image.name, image.offset_data, image.size, int(text))
