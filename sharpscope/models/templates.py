"""Sentences that a class name is put into."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from sharpscope.classnames import read_text
from sharpscope.errors import UsageError
from sharpscope.home import at_home

DEFAULT = ("a photo of a {}.",)
_FIX = "one sentence per line with {} where the class name goes, e.g. 'a photo of a {}.'"


def checked_templates(templates: Iterable[str]) -> tuple[str, ...]:
    """Return the templates; ``UsageError`` if there is none, or one has not exactly one ``{}``."""
    found = (templates,) if isinstance(templates, str) else tuple(templates)
    if not found:
        raise UsageError("there is no template", _FIX)
    if wrong := [template for template in found if template.count("{}") != 1]:
        raise UsageError(f"template {wrong[0]!r} has {wrong[0].count('{}')} places for the class name, not one", _FIX)
    return found


def prompted(classes: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """Return the sentences of each class.

    >>> prompted(["cat"], ["a {}.", "the {}"])
    [['a cat.', 'the cat']]
    """
    return [[template.replace("{}", name) for template in templates] for name in classes]


def read_templates(path: str | Path) -> tuple[str, ...]:
    """Return the templates of a file: a line each, or a JSON list.

    Raises
    ------
    UsageError
        If there is no such file, it is no UTF-8, or a line is no template.
    """
    file = at_home(path)
    if not file.is_file():
        raise UsageError(f"there is no file of templates at {file}", _FIX)
    text = read_text(file)
    try:
        lines = json.loads(text) if file.suffix == ".json" else [line for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise UsageError(f"{file} is no JSON: {error}", "a JSON list of templates, or a text file") from error
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise UsageError(f"{file} holds no list of sentences", _FIX)
    return checked_templates(lines)
