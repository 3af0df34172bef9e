"""Classes by name: which class of one data set each folder or label of another is."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import NamedTuple

from sharpscope.errors import DataError


class Numbering(NamedTuple):
    """Class number of each folder or label that has one, and what must be said about how it was found."""

    numbers: dict[str, int]
    notes: tuple[str, ...]


def own_classes(title: str, words: Mapping[str, str], what: str = "folder") -> list[str]:
    """Return the words in order; two folders with the same words would be one class with two numbers."""
    seen: dict[str, str] = {}
    for found, word in words.items():
        if word in seen:
            raise DataError(
                f"{title!r}: {what}s {seen[word]!r} and {found!r} are both {word!r}",
                "give each class words of its own (classnames)",
            )
        seen[word] = found
    return list(seen)


def numbering(
    title: str, words: Mapping[str, str], known: Sequence[str], *, subset: bool = False, what: str = "folder"
) -> Numbering:
    """Return which of the known classes each folder or label is, by its words.

    Words that differ in case, ``_``, ``-`` or the Unicode form only are the same class if there is one such class
    and no other folder is it; this is said in the notes.

    Parameters
    ----------
    title
        The data set, for messages.
    words
        Folder (or label) -> its words.
    known
        Classes in the order of their numbers.
    subset
        Leave out what is no class instead of refusing it; said in the notes.
    what
        ``"folder"`` or ``"label"``.

    Raises
    ------
    DataError
        If a folder is no class, could be several, or none is one.
    """
    place = {word: number for number, word in enumerate(known)}
    numbers = {found: place[word] for found, word in words.items() if word in place}
    alike = _alike(title, {found: word for found, word in words.items() if found not in numbers}, known, numbers, what)
    numbers |= alike
    unknown = {found: word for found, word in words.items() if found not in numbers}
    if unknown and not subset:
        raise _unknown(title, unknown, known, len(words), what)
    if not numbers:
        raise DataError(
            f"{title!r}: no {what} is one of the {len(known)} classes ({_few(words.values())} against {_few(known)})",
            "map them with classnames",
        )
    notes = [f"{title}: {what} {found!r} is taken as class {known[number]!r}" for found, number in alike.items()]
    if unknown:
        notes.append(
            f"{title}: {len(unknown)} of {len(words)} {what}s are none of the {len(known)} classes and left out "
            f"({_few(unknown.values())})"
        )
    return Numbering({found: numbers[found] for found in words if found in numbers}, tuple(notes))


def normal(word: str) -> str:
    """Return the word without what file systems and people write differently.

    >>> normal("Golden_Retriever") == normal("golden retriever")
    True
    """
    return " ".join(re.sub(r"[_\-\s]+", " ", unicodedata.normalize("NFC", word)).casefold().split())


def _alike(
    title: str, words: Mapping[str, str], known: Sequence[str], taken: Mapping[str, int], what: str
) -> dict[str, int]:
    """Return the class of each folder that differs from it in case, underscores or Unicode form only."""
    places: dict[str, list[int]] = {}
    for number, word in enumerate(known):
        places.setdefault(normal(word), []).append(number)
    holders = {number: found for found, number in taken.items()}
    alike: dict[str, int] = {}
    for found, word in words.items():
        candidates = places.get(normal(word), [])
        if len(candidates) > 1:
            raise DataError(
                f"{title!r}: {what} {found!r} could be class {known[candidates[0]]!r} or {known[candidates[1]]!r}",
                "map it with classnames",
            )
        if candidates and candidates[0] in holders:
            raise DataError(
                f"{title!r}: {what}s {holders[candidates[0]]!r} and {found!r} are both class {known[candidates[0]]!r}, "
                "but for case or underscores",
                "rename one, or say with classnames that both are this class",
            )
        if candidates:
            alike[found] = candidates[0]
            holders[candidates[0]] = found
    return alike


def _unknown(title: str, unknown: Mapping[str, str], known: Sequence[str], total: int, what: str) -> DataError:
    found, word = next(iter(unknown.items()))
    near = get_close_matches(word, known, n=1)
    called = f" ({word!r})" if word != found else ""
    return DataError(
        f"{title!r}: {what} {found!r}{called} is none of the {len(known)} classes"
        + (f"; the nearest is {near[0]!r}" if near else "")
        + f" ({len(unknown)} of {total} {what}s are unknown)",
        f"rename it, map it with classnames, or leave such {what}s out: subset=True (--subset)",
    )


def _few(words: Iterable[str]) -> str:
    first = [repr(word) for word in words]
    return ", ".join(first[:3]) + (", ..." if len(first) > 3 else "")
