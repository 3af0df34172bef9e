"""What a loader is, as far as it can be seen before and while it is read: shuffled, single-use, with class names."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from sharpscope.errors import DataError
from sharpscope.objective import Batch

_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def check_iterable(loader: Any, name: str) -> None:
    """Raise if nothing can be read from the loader."""
    if not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")) or isinstance(loader, str | type):
        raise DataError(
            f"{name!r} is a {type(loader).__name__}, no loader",
            "a loader of batches (x, y): DataLoader(dataset, batch_size=64), sharpscope.folder(DIR, model)",
        )


def check_order(loader: Any, name: str) -> None:
    """Raise if a ``DataLoader`` draws its examples at random: each reading, and each later scan, would differ."""
    samplers = (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None))
    drawn = next((type(sampler).__name__ for sampler in samplers if isinstance(sampler, _RANDOM)), None)
    if drawn is not None:
        raise DataError(
            f"{name!r} is a DataLoader with shuffle=True or a {drawn}; its order changes with every reading",
            "DataLoader(dataset, batch_size=..., shuffle=False); the images that sharpness is measured on are drawn by "
            "class with the seed anyway",
        )


def class_names(loader: Any) -> tuple[str, ...] | None:
    """Return the ``classes`` of a loader, or of the data set inside it as torchvision's have them; None without."""
    for _ in range(4):  # DataLoader -> Subset -> data set
        names = getattr(loader, "classes", None)
        if isinstance(names, list | tuple) and names and all(isinstance(word, str) for word in names):
            return tuple(names)
        loader = getattr(loader, "dataset", None)
    return None


def is_one_shot(loader: Any) -> bool:
    """Return whether the loader is a generator or another iterator, which can be read once only."""
    return hasattr(loader, "__next__")


def notes(loader: Any, name: str) -> tuple[str, ...]:
    """Return what the loader has to say about its data: its own ``notes``, and examples that ``drop_last`` drops."""
    found = tuple(getattr(loader, "notes", ()))
    size = getattr(loader, "batch_size", None)
    if getattr(loader, "drop_last", False) and size and hasattr(loader.dataset, "__len__"):
        lost = len(loader.dataset) % size
        found += (f"{name}: drop_last=True leaves out {lost} of {len(loader.dataset)} examples",) if lost else ()
    return found


class Draws:
    """torch's random state as a loader has it to itself: a ``DataLoader`` draws a seed whenever it is read.

    It starts as it stands, and goes on from reading to reading: what a loader augments at random then still differs.
    """

    def __init__(self) -> None:
        self._state = torch.get_rng_state()

    def of(self, loader: Any) -> Iterator[Any]:
        """Yield what the loader gives; outside of it the random state stays."""
        items = None
        while True:
            outside = torch.get_rng_state()
            torch.set_rng_state(self._state)
            try:
                items = iter(loader) if items is None else items
                item = next(items)
            except StopIteration:
                return
            finally:
                self._state = torch.get_rng_state()
                torch.set_rng_state(outside)
            yield item


def mark(inputs: Tensor) -> int:
    """Return a checksum of a batch's values, equal for equal bits."""
    return zlib.crc32(raw_bytes(inputs))


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the values of a tensor as bytes."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def check_same(batch: Batch, targets: Tensor, expected: int | None, where: str) -> None:
    """Raise unless a batch holds the labels and the values it held when it was first read."""
    if not torch.equal(batch.targets.cpu(), targets):
        raise DataError(
            f"{where} has other labels than when it was first read",
            "a loader with a fixed order: DataLoader(..., shuffle=False)",
        )
    if mark(batch.inputs) != expected:
        raise DataError(
            f"{where} has the same labels but other values than when it was first read: a random augmentation?",
            "the preprocessing of evaluation: resize, crop at the centre, normalise",
        )


def check_shared_out(loader: Any, marks: list[int], name: str) -> None:
    """Raise if several workers of a ``DataLoader`` each read a whole ``IterableDataset``."""
    workers = loader.num_workers if isinstance(loader, DataLoader) else 0
    if workers > 1 and isinstance(loader.dataset, IterableDataset) and len(set(marks)) < len(marks):
        raise DataError(
            f"{name!r} gives {len(marks) - len(set(marks))} of {len(marks)} batches twice: each of its {workers} "
            "workers reads the whole IterableDataset",
            "num_workers=1, or share the data out by torch.utils.data.get_worker_info()",
        )
