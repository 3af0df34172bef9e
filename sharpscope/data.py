"""Labelled data, read in one fixed order from any loader."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpscope import loaders
from sharpscope.batches import Item, as_item, check_range
from sharpscope.classes import numbering
from sharpscope.errors import DataError
from sharpscope.objective import Batch
from sharpscope.progress import reading

CACHE_BYTES = 2 << 30  # a loader that gives less than this is read once and kept
LOOKED_AT_TWICE = 32  # examples that are read again at once, to see whether they are the same


class Split:
    """A labelled data set in a fixed order, readable many times.

    Parameters
    ----------
    loader
        Any iterable of batches (see :func:`sharpscope.batches.as_batch`); one that fits in 2 GB is kept in memory,
        any other is read anew each time and must give the same batches in the same order. A generator, which can be
        read once only, must fit.
    name
        For rows and messages.
    classes
        Class names in the model's numbering; default those of the loader or its data set, if they have ``classes``.
    columns
        Numbers of the classes that occur here, if fewer than the model knows.
    progress
        False: no bar while a long reading goes on.

    Attributes
    ----------
    targets
        Class numbers (n,).
    captions
        A text for each image, None if there are none.
    labelled
        Whether there are labels; without, there must be captions, and ``targets`` are zero.
    unread
        Keys of what batches hold beside images and labels.
    fingerprint
        SHA-256 of all inputs as the model gets them, labels and captions; the same for any batching. It changes
        with the preprocessing too. Cost: the first reading, with about a second per GB on top.

    Raises
    ------
    DataError
        If the loader is none, shuffles, gives no example, other batches when read again, or batches that cannot be
        meant.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        name: str,
        *,
        classes: Sequence[str] | None = None,
        columns: Sequence[int] | None = None,
        progress: bool | None = None,
    ) -> None:
        self.name = name
        self.classes = tuple(classes) if classes is not None else loaders.class_names(loader)
        self.columns = tuple(columns) if columns is not None else getattr(loader, "columns", None)
        self._loader, self._draws = loader, loaders.Draws()
        self._cache: list[Batch] | None = []
        self._marks: list[int] = []
        self._numbers: Tensor | None = None
        self._said: tuple[str, ...] = ()
        loaders.check_iterable(loader, name)
        loaders.check_order(loader, name)
        self._first_pass(progress)
        self._second_look()

    def _first_pass(self, progress: bool | None) -> None:
        digest, targets, size = hashlib.sha256(), [], 0
        captions, labelled, unread = list[str](), set[bool](), set[str]()
        for batch, texts, has_labels, left in reading(self._items(), self.name, self._length(), progress):
            captions += texts or ()
            labelled.add(has_labels)
            unread |= left
            digest.update(loaders.raw_bytes(batch.inputs))
            self._marks.append(loaders.mark(batch.inputs))
            targets.append(batch.targets.cpu())
            size += batch.inputs.nbytes
            self._keep(batch, size)
        if not targets:
            again = "a generator that was read before is empty; " if loaders.is_one_shot(self._loader) else ""
            raise DataError(
                f"{self.name!r} gave no example",
                again + "a loader with at least one labelled batch, such as a DataLoader",
            )
        loaders.check_shared_out(self._loader, self._marks, self.name)
        self.targets = torch.cat(targets)
        self.labelled, self.unread = labelled == {True}, frozenset(unread)
        if len(labelled) > 1 or len(captions) not in (0, len(self)):
            raise DataError(f"some batches of {self.name!r} have labels or captions, others not", "the same in each")
        self.captions = tuple(captions) if captions else None
        digest.update(loaders.raw_bytes(self.targets))
        digest.update("\0".join(captions).encode())
        self.fingerprint = digest.hexdigest()
        if loaders.is_one_shot(self._loader):
            self._said = (f"{self.name}: can be read once only, its {len(self)} examples are kept in memory",)

    def _items(self) -> Iterator[Item]:
        """Yield what the loader gives, batches of no example left out."""
        found = (as_item(item, self.name, index) for index, item in enumerate(self._draws.of(self._loader)))
        return (item for item in found if len(item.batch.targets))

    def _batches(self) -> Iterator[Batch]:
        return (item.batch for item in self._items())

    def _length(self) -> int | None:
        try:
            return len(self._loader)  # type: ignore[arg-type]
        except TypeError:  # a DataLoader of an IterableDataset has __len__, which fails
            return None

    def _keep(self, batch: Batch, size: int) -> None:
        """Keep a batch while all so far fit."""
        if size > CACHE_BYTES and loaders.is_one_shot(self._loader):
            raise DataError(
                f"{self.name!r} is a {type(self._loader).__name__}, which can be read once only, and holds more than "
                f"the {CACHE_BYTES / 2**30:.3g} GB that are kept in memory",
                "a loader that can be read again: a DataLoader, or an object with __iter__",
            )
        if size > CACHE_BYTES:
            self._cache = None
        elif self._cache is not None:
            self._cache.append(batch)

    def _second_look(self) -> None:
        """Read the first batches again: shuffling and random augmentation show at once, kept in memory or not."""
        seen = len(self) if loaders.is_one_shot(self._loader) else 0
        again = self._again()
        while seen < min(LOOKED_AT_TWICE, len(self)):
            seen += len(next(again).targets)

    def _again(self) -> Iterator[Batch]:
        """Yield the batches anew; ``DataError`` where they differ from those of the first pass."""
        seen = 0
        for index, batch in enumerate(self._batches()):
            expected = self.targets[seen : seen + len(batch.targets)]
            seen += len(batch.targets)
            mark = self._marks[index] if index < len(self._marks) else None
            loaders.check_same(self._numbered(batch), expected, mark, f"batch {index} of {self.name!r}")
            yield self._numbered(batch)
        if seen < len(self):
            raise DataError(
                f"{self.name!r} gave {len(self)} examples when it was first read, now {seen}",
                "a loader that can be read again: a DataLoader, or an object with __iter__",
            )

    def _numbered(self, batch: Batch) -> Batch:
        return batch if self._numbers is None else Batch(batch.inputs, self._numbers[batch.targets.cpu()])

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def batch_count(self) -> int:
        """Number of batches that the loader gives."""
        return len(self._marks)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a result must say about these data, e.g. which images could not be read."""
        return (*loaders.notes(self._loader, self.name), *self._said)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches in their order; ``DataError`` if they differ from those of the first pass."""
        return self._again() if self._cache is None else map(self._numbered, self._cache)

    def named(self, name: str) -> Split:
        """Return these data under another name; the same if it is theirs."""
        if name == self.name:
            return self
        other = copy.copy(self)
        other.name = name
        return other

    def numbered_as(self, classes: Sequence[str] | None) -> Split:
        """Return these data with the labels of other classes, matched by name; the same if there is nothing to match.

        Classes that the other data have and these do not list are masked.

        Raises
        ------
        DataError
            If a class that occurs here is none of them.
        """
        if classes is None or self.classes is None or self.classes == tuple(classes) or not self.labelled:
            return self
        self.check_labels(len(self.classes))
        listed = range(len(self.classes)) if self.columns is None else self.columns
        occurring = set(self.targets.tolist())
        wanted = (number for number in listed if number in occurring or self.classes[number] in classes)
        words = {str(number): self.classes[number] for number in wanted}
        found, said = numbering(self.name, words, classes, what="label")
        other = copy.copy(self)
        other._numbers = torch.full((len(self.classes),), -1)
        other._numbers[[int(label) for label in found]] = torch.tensor([*found.values()])
        other.targets = other._numbers[self.targets]
        other.classes = tuple(classes)
        columns = sorted(set(found.values()))
        other.columns = tuple(columns) if len(columns) < len(classes) else None
        other._said = (*self._said, *said)
        other.fingerprint = hashlib.sha256(f"{self.fingerprint} {found}".encode()).hexdigest()
        return other

    def check_labels(self, classes: int) -> None:
        """Raise if there are no labels, or one lies outside the model's outputs or outside ``columns``."""
        if not self.labelled:
            raise DataError(
                f"{self.name!r} has captions but no labels; accuracy and loss are measured, which need them",
                "labelled images; captions alone serve as sharpness_on with objective='contrastive'",
            )
        check_range(self.targets, classes, self.name)
        self._check_names(classes, int(self.targets.max()))
        if self.columns is not None and not set(self.targets.tolist()) <= set(self.columns):
            raise DataError(f"{self.name!r} has labels outside its own classes {self.columns}", "check the class map")

    def _check_names(self, classes: int, high: int) -> None:
        """Raise if the names are those of fewer classes than the model has outputs: which ones, no number tells.

        Labels beyond the names are those of another numbering, e.g. by a ``target_transform``, and taken as they are.
        More names than outputs are a set of which only the first classes were kept.
        """
        if self.classes is None or self.columns is not None or not high < len(self.classes) < classes:
            return
        raise DataError(
            f"the model has {classes} outputs, {self.name!r} names {len(self.classes)} classes; which outputs these "
            "are is not known",
            "sharpscope.folder(path, model, classes=[...]), or Split(loader, name, classes=[...]): a name for each "
            "output, in order (at a shell: a function that returns it, --id py:MODULE:FUNCTION); or the names in the "
            "model's config.json (id2label of transformers, label_names of timm)",
        )

    def sample(self, limit: int | None, seed: int, batch_size: int) -> tuple[Batch, ...]:
        """Return at most ``limit`` examples, stratified by class, shuffled, in batches of ``batch_size``.

        The first n of a class-sorted folder would be one or two classes. The order is shuffled so that
        consecutive groups (m-sharpness) are mixed too.
        """
        return self.batches_of(stratified(self.targets.numpy(), limit, seed), batch_size)

    def batches_of(self, chosen: np.ndarray, batch_size: int) -> tuple[Batch, ...]:
        """Return the examples at the positions, in their order, in batches of ``batch_size``."""
        wanted = torch.zeros(len(self), dtype=torch.bool)
        wanted[chosen] = True
        kept, seen = [], 0
        for inputs, targets in self:
            mask = wanted[seen : seen + len(targets)]
            seen += len(targets)
            kept.append(inputs[mask.to(inputs.device)])
        inputs = torch.cat(kept)
        place = torch.searchsorted(wanted.nonzero()[:, 0], torch.as_tensor(chosen))
        inputs = inputs[place.to(inputs.device)]
        pairs = zip(torch.split(inputs, batch_size), torch.split(self.targets[chosen], batch_size), strict=True)
        return tuple(Batch(x, y) for x, y in pairs)


def stratified(targets: np.ndarray, limit: int | None, seed: int) -> np.ndarray:
    """Return shuffled positions of at most ``limit`` examples, classes represented as evenly as they allow.

    >>> sorted(np.array([7, 7, 7, 7, 9, 9])[stratified(np.array([7, 7, 7, 7, 9, 9]), 4, seed=0)].tolist())
    [7, 7, 9, 9]
    """
    random = np.random.default_rng(seed)
    order = random.permutation(len(targets))
    rank = np.empty(len(targets), dtype=np.int64)
    for label in np.unique(targets):
        mine = order[targets[order] == label]
        rank[mine] = np.arange(len(mine))
    # Round by round through the classes; within a round in random order.
    chosen = order[np.argsort(rank[order], kind="stable")][:limit]
    return np.asarray(random.permutation(chosen))


def as_split(loader: Any, name: str, *, progress: bool | None = None) -> Split:
    """Return the loader as a split, unchanged if it is one."""
    return loader if isinstance(loader, Split) else Split(loader, name, progress=progress)
