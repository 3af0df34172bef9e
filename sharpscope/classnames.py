"""Words of class folders, from the forms of file in which they are passed around."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sharpscope.errors import UsageError
from sharpscope.home import at_home

ClassNames = Mapping[str, str] | str | Path
_WNID = re.compile(r"n\d{8}\s")
_FORMS = 'JSON {"n01440764": "tench"}, CSV lines n01440764,tench, or a line per folder in sorted order'


def read_classnames(source: ClassNames, folders: Sequence[str], *, partial: bool = False) -> dict[str, str]:
    """Return the words of each folder.

    Parameters
    ----------
    source
        Folder -> words; or a file of that: JSON, CSV or TSV with two columns, or lines ``n01440764 tench``; or a
        text file with a line per folder, in sorted order.
    folders
        Sorted folder names.
    partial
        Leave out folders without words instead of refusing them.

    Raises
    ------
    UsageError
        If the file is missing or of another form, names too few folders, or the number of lines is not that of the
        folders.
    """
    found = source if isinstance(source, Mapping) else _from_file(at_home(source), folders)
    missing = [folder for folder in folders if folder not in found]
    if len(missing) == len(folders) or (missing and not partial):
        near = get_close_matches(missing[0], [*found], n=1)
        raise UsageError(
            f"the class names have no words for folder {missing[0]!r} ({len(missing)} of {len(folders)} are missing)"
            + (f"; the nearest they have is {near[0]!r}" if near else ""),
            "a file that names every folder: " + _FORMS,
        )
    return {folder: found[folder] for folder in folders if folder in found}


def read_label_names(source: ClassNames) -> dict[str, str]:
    """Return the words of each class number, as text, in the order of the numbers.

    Parameters
    ----------
    source
        Number -> words; or a JSON, CSV or TSV file of that, or a text file with a line per class from 0 on.

    Raises
    ------
    UsageError
        If the file is missing or of another form.
    """
    found = source if isinstance(source, Mapping) else _from_file(at_home(source), None)
    if odd := next((label for label in found if not str(label).isdigit()), None):
        raise UsageError(f"the class names have {odd!r} in the place of a class number", 'e.g. {"0": "tench"}')
    return {str(label): found[label] for label in sorted(found, key=int)}


def _from_file(path: Path, folders: Sequence[str] | None) -> Mapping[str, str]:
    if not path.is_file():
        raise UsageError(f"there is no file of class names at {path}", _FORMS)
    text = read_text(path)
    if path.suffix == ".json":
        return _from_json(path, text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if path.suffix == ".csv":
        return _from_pairs(path, [*csv.reader(lines, skipinitialspace=True)])
    if lines and all("\t" in line for line in lines):
        return _from_pairs(path, [line.split("\t") for line in lines])
    if lines and all(_WNID.match(line) for line in lines):
        return _from_pairs(path, [line.split(maxsplit=1) for line in lines])
    if folders is None:
        return {str(number): line for number, line in enumerate(lines)}
    return _from_lines(path, lines, folders)


def read_text(path: Path) -> str:
    """Return the text of a file, without the mark that some editors begin it with; ``UsageError`` if it is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text in UTF-8: {error}", "iconv -t utf-8") from error


def _from_json(path: Path, text: str) -> dict[str, str]:
    try:
        stored: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is no JSON: {error}", 'e.g. {"n01440764": "tench"}') from error
    rows = [*stored.values()] if isinstance(stored, dict) else []
    if rows and all(isinstance(row, list) and [type(cell) for cell in row] == [str, str] for row in rows):
        return _from_pairs(path, rows)  # Keras' imagenet_class_index.json: {"0": ["n01440764", "tench"]}
    if not isinstance(stored, dict) or not all(isinstance(words, str) for words in stored.values()):
        raise UsageError(f"{path} does not map folders to words", 'e.g. {"n01440764": "tench"}')
    return stored


def _from_pairs(path: Path, rows: Sequence[Sequence[str]]) -> dict[str, str]:
    if bad := next((row for row in rows if len(row) != 2), None):
        raise UsageError(f"{path} has a line of {len(bad)} columns: {','.join(bad)!r}", 'two: n01440764,"tench"')
    found: dict[str, str] = {}
    for folder, words in rows:
        if found.get(folder, words) != words:
            raise UsageError(f"{path} calls {folder!r} both {found[folder]!r} and {words!r}", "a line per folder")
        found[folder] = words
    return found


def _from_lines(path: Path, lines: list[str], folders: Sequence[str]) -> dict[str, str]:
    if len(lines) != len(folders):
        raise UsageError(
            f"{path} has {len(lines)} lines for {len(folders)} class folders",
            "a line per folder in sorted order, or a JSON or CSV file folder -> words, which also serves subsets",
        )
    if sorted(lines) == list(folders) != lines:
        raise UsageError(
            f"{path} lists the folders themselves, but not in sorted order: its first line {lines[0]!r} would name "
            f"folder {folders[0]!r}",
            "no class names are needed where folders carry them; else a JSON file {folder: words}",
        )
    return dict(zip(folders, lines, strict=True))
