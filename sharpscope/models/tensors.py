"""Weights on disk as a mapping from names, without what wrappers put around them, to tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sharpscope.errors import ModelError
from sharpscope.models.weights import Weights, weights_at
from sharpscope.models.wrappers import HEAD, peeled


class Tensors(Mapping[str, Tensor]):
    """Tensors of a checkpoint, each read when it is asked for, by their names without what wrappers put before them.

    Attributes
    ----------
    where
        The directory or file.
    """

    def __init__(self, weights: Weights) -> None:
        self.where = weights.root
        self._weights = weights
        self._keys = {name: key for key, name in weights.names.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._weights.tensor(self._keys[name])

    def fitting(self, own: Collection[str]) -> Mapping[str, Tensor]:
        """Return the tensors with no more taken off their names than these, of a network, ask for.

        A module of one's own may itself have all its weights in a ``backbone.`` or ``model.``.

        Raises
        ------
        ModelError
            If they stand deeper, beside others: the network inside a training module.
        """
        for names in peeled(self._weights.keys):
            if set(own) <= set(names.values()):
                return Renamed(self, {name: self._weights.names[key] for key, name in names.items()})
        if found := self._weights.inside(own):
            raise ModelError(*found)
        return self

    @property
    def notes(self) -> tuple[str, ...]:
        """What must be said of the choice of these weights among others in the same file."""
        return self._weights.notes

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor without reading it."""
        return self._weights.spec(self._keys[name]).dtype

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __contains__(self, name: object) -> bool:
        return name in self._keys

    def __len__(self) -> int:
        return len(self._keys)


class Renamed(Mapping[str, Tensor]):
    """Some tensors of a mapping under other names, still read one at a time.

    Parameters
    ----------
    tensors
        Where they are.
    names
        New name -> name there.
    """

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __len__(self) -> int:
        return len(self._names)


def without_head(tensors: Mapping[str, Tensor]) -> Renamed:
    """Return the tensors without a WiSE-FT head."""
    return Renamed(tensors, {name: name for name in tensors if not name.startswith(HEAD)})


def stored_head(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None] | None:
    """Return weight and bias of a WiSE-FT head, None if there is none."""
    return (tensors[f"{HEAD}weight"], tensors.get(f"{HEAD}bias")) if f"{HEAD}weight" in tensors else None


def read_tensors(where: Path, *, first: str = "") -> Tensors:
    """Return the tensors of a directory or file; see :func:`~sharpscope.models.weights.weights_at`."""
    return Tensors(weights_at(where, first=first))
