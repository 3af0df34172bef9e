"""Labelled data, read in one fixed order from any loader."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sharpscope.errors import DataError
from sharpscope.objective import Batch

IMAGE_KEYS = ("image", "images", "pixel_values")
LABEL_KEYS = ("label", "labels", "cls")
CACHE_BYTES = 2 << 30  # a loader that gives less than this is read once and kept


def as_batch(item: Any, name: str, index: int) -> Batch:
    """Return inputs and targets of what a loader gave: a pair or a mapping with the usual keys.

    Raises
    ------
    DataError
        If there is no label, the label is no integer, or the lengths differ.
    """
    where = f"batch {index} of {name!r}"
    if isinstance(item, Mapping):
        inputs = next((item[key] for key in IMAGE_KEYS if key in item), None)
        targets = next((item[key] for key in LABEL_KEYS if key in item), None)
        found = f"a mapping with keys {sorted(map(str, item))}"
    else:
        pair = item if isinstance(item, tuple | list) and len(item) == 2 else (None, None)
        inputs, targets = pair
        found = f"a {type(item).__name__}" + (f" of {len(item)}" if isinstance(item, tuple | list) else "")
    if inputs is None or targets is None:
        raise DataError(
            f"{where} is {found}, without labels",
            f"a loader of (x, y) pairs, or of dicts with one of {IMAGE_KEYS} and one of {LABEL_KEYS}",
        )
    x, y = torch.as_tensor(inputs), torch.as_tensor(targets)
    if y.is_floating_point() or y.ndim != 1 or len(x) != len(y):
        raise DataError(
            f"{where} has inputs {tuple(x.shape)} and targets {tuple(y.shape)} {y.dtype}",
            "one integer class per example: targets of shape (n,)",
        )
    return Batch(x, y.long())


class Split:
    """A labelled data set in a fixed order, readable many times.

    Parameters
    ----------
    loader
        Any iterable of batches (see :func:`as_batch`); one that fits in 2 GB, or that can be read once only, is kept
        in memory, any other is read anew each time and must give the same labels in the same order.
    name
        For rows and messages.
    classes
        Class names in the model's numbering, if known.
    columns
        Numbers of the classes that occur here, if fewer than the model knows.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        name: str,
        *,
        classes: Sequence[str] | None = None,
        columns: Sequence[int] | None = None,
    ) -> None:
        self.name = name
        self.classes = tuple(classes) if classes is not None else getattr(loader, "classes", None)
        self.columns = tuple(columns) if columns is not None else getattr(loader, "columns", None)
        self._loader = loader
        self._cache: list[Batch] | None = []
        self._first_pass()

    def _first_pass(self) -> None:
        one_shot = iter(self._loader) is self._loader
        digest, targets, size = hashlib.sha256(), [], 0
        for index, item in enumerate(self._loader):
            batch = as_batch(item, self.name, index)
            if not len(batch.targets):
                continue
            digest.update(batch.inputs.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            targets.append(batch.targets.cpu())
            size += batch.inputs.nbytes
            if self._cache is not None:
                self._cache.append(batch)
            if size > CACHE_BYTES and not one_shot:
                self._cache = None
        if not targets:
            raise DataError(f"{self.name!r} gave no example", "a loader with at least one labelled batch")
        self.targets = torch.cat(targets)
        digest.update(self.targets.numpy().tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the loader has to say about its data, e.g. which images could not be read."""
        return tuple(getattr(self._loader, "notes", ()))

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches in their order; ``DataError`` if the labels differ from those of the first pass."""
        if self._cache is not None:
            yield from self._cache
            return
        seen = 0
        for index, item in enumerate(self._loader):
            batch = as_batch(item, self.name, index)
            expected = self.targets[seen : seen + len(batch.targets)]
            seen += len(batch.targets)
            if not torch.equal(batch.targets.cpu(), expected):
                raise DataError(
                    f"batch {index} of {self.name!r} has other labels than when it was first read",
                    "a loader with a fixed order: DataLoader(..., shuffle=False)",
                )
            yield batch

    def check_labels(self, classes: int) -> None:
        """Raise if a label lies outside the model's outputs or outside ``columns``."""
        low, high = int(self.targets.min()), int(self.targets.max())
        if low < 0 or high >= classes:
            raise DataError(
                f"{self.name!r} has labels {low}..{high}, the model has {classes} outputs (0..{classes - 1})",
                "check that labels and model number the same classes",
            )
        if self.columns is not None and not set(self.targets.tolist()) <= set(self.columns):
            raise DataError(f"{self.name!r} has labels outside its own classes {self.columns}", "check the class map")

    def sample(self, limit: int | None, seed: int, batch_size: int) -> tuple[Batch, ...]:
        """Return at most ``limit`` examples, stratified by class, shuffled, in batches of ``batch_size``.

        The first n of a class-sorted folder would be one or two classes. The order is shuffled so that
        consecutive groups (m-sharpness) are mixed too.
        """
        chosen = stratified(self.targets.numpy(), limit, seed)
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


def as_split(loader: Any, name: str) -> Split:
    """Return the loader as a split, unchanged if it is one."""
    return loader if isinstance(loader, Split) else Split(loader, name)
