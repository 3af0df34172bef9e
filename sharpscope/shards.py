"""One tar archive of labelled images: where each sample lies in it, verified to its end mark."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import NamedTuple

from sharpscope.errors import DataError
from sharpscope.pictures import SUFFIXES

LABEL = "cls"
CAPTION = "txt"
_BLOCK = 512
_TAIL = 1 << 20  # bytes that are looked at after the last member


class Sample(NamedTuple):
    """An image in an archive, its label and its caption, as far as they were asked for."""

    member: str
    offset: int  # bytes from the start of the archive
    size: int
    label: int | None
    caption: str | None = None


def read_shard(path: Path, *, captions: bool = False) -> list[Sample]:
    """Return the samples of an archive in its order, without reading an image. Cost: one pass over the headers.

    With ``captions`` each sample needs one, and may lack a label.

    Raises
    ------
    DataError
        If the archive is truncated, damaged, packed or ends twice, a sample has no image or no label, or a member
        occurs twice.
    """
    members: dict[str, dict[str, tarfile.TarInfo]] = {}
    told: dict[str, dict[str, bytes]] = {LABEL: {}, CAPTION: {}}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                key, kind = _parts(member.name)
                if not member.isfile() or key is None:
                    continue
                if kind in members.setdefault(key, {}):
                    raise DataError(f"{path}: {member.name} occurs twice", "each sample once")
                members[key][kind] = member
                if kind == LABEL or (kind == CAPTION and captions):
                    told[kind][key] = archive.extractfile(member).read()  # type: ignore[union-attr]
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
    read = _captioned if captions else _labelled
    return [read(path, key, found, told) for key, found in members.items()]


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


_Members = dict[str, tarfile.TarInfo]
_Told = dict[str, dict[str, bytes]]  # label or caption -> key of the sample -> content


def _labelled(path: Path, key: str, found: _Members, told: _Told) -> Sample:
    if key not in told[LABEL]:
        only = ", only captions: a retrieval set?" if CAPTION in found else ""
        raise _incomplete(path, key, found, f"no .{LABEL}" if _images(found) else "no image", only)
    image = _image(path, key, found)
    return Sample(image.name, image.offset_data, image.size, _label(path, key, told[LABEL][key]))


def _captioned(path: Path, key: str, found: _Members, told: _Told) -> Sample:
    if key not in told[CAPTION]:
        raise _incomplete(path, key, found, f"no .{CAPTION}")
    image, label = _image(path, key, found), told[LABEL].get(key)
    try:
        lines = [line.strip() for line in told[CAPTION][key].decode().splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {key}.{CAPTION} is no text in UTF-8: {error}", "iconv -t utf-8") from error
    if not any(lines):
        raise DataError(f"{path}: {key}.{CAPTION} is empty", "a caption for each image")
    caption = next(line for line in lines if line)  # retrieval sets have several, a line each
    number = None if label is None else _label(path, key, label)
    return Sample(image.name, image.offset_data, image.size, number, caption)


def _images(found: _Members) -> list[str]:
    return [kind for kind in found if f".{kind}" in SUFFIXES]


def _image(path: Path, key: str, found: _Members) -> tarfile.TarInfo:
    kinds = _images(found)
    if len(kinds) != 1:
        raise _incomplete(path, key, found, "several images" if kinds else "no image")
    return found[kinds[0]]


def _incomplete(path: Path, key: str, found: _Members, lacks: str, more: str = "") -> DataError:
    return DataError(
        f"{path}: sample {key!r} has {lacks} (found {', '.join(f'.{kind}' for kind in found)}{more})",
        f"each sample one image and its class number: key.jpg + key.{LABEL}; with captions key.{CAPTION}",
    )


def _label(path: Path, key: str, content: bytes) -> int:
    text = content.decode("ascii", "replace").strip()
    if not text.isdigit():
        raise DataError(f"{path}: {key}.{LABEL} holds {text[:20]!r}", "a class number, 0 or more")
    return int(text)
