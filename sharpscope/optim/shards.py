"""Sharded parameters (DTensor, FSDP2): the part that lies on this rank, and sums over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sharpscope.errors import ModelError

Groups = tuple[Any, ...]  #: process groups over which a tensor is split; none if it is whole on every rank


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this is a DTensor."""
    # A plain run must not pay for importing torch.distributed.tensor; a DTensor has both attributes.
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """Return the part of the tensor on this rank, without copying; a plain tensor is its own."""
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor on every rank. Every rank must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def split_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return this rank's part of a tensor, plain or sharded, cut as the parameter is; every rank must call it."""
    if not is_sharded(parameter):
        return whole(tensor)
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    full = whole(tensor).detach().to(device=parameter.device, dtype=parameter.dtype)
    return local(distribute_tensor(full, mesh, placements))


def piece_of(part: Tensor, parameter: Tensor) -> Tensor:
    """Return this rank's part as what it is of a tensor cut as the parameter is, which a saved state must know."""
    if not is_sharded(parameter):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


def check(name: str, parameter: Tensor, *, by_row: bool) -> None:
    """Raise unless norms over all ranks can be had.

    Raises
    ------
    ModelError
        If the parameter is a flat piece of FSDP1 or a pending sum, or is sharded although ``by_row``.
    """
    if "_flat_param" in name:
        raise ModelError(
            f"parameter {name!r} is several tensors flattened into one (FSDP1): they have no norms of their own",
            "torch.distributed.fsdp.fully_shard (FSDP2)",
        )
    for placement in getattr(parameter, "placements", ()):
        if not (placement.is_replicate() or placement.is_shard()):
            raise ModelError(f"parameter {name!r} is placed as {placement}", "Shard or Replicate placements")
        if by_row and placement.is_shard():
            raise ModelError(f"parameter {name!r} is sharded, its rows have no norms here", "row_norms=False")


def groups(tensor: Tensor) -> Groups:
    """Return the process groups that norms of the tensor must be summed over."""
    if not is_sharded(tensor):
        return ()
    pairs = enumerate(tensor.placements)  # type: ignore[attr-defined]
    return tuple(tensor.device_mesh.get_group(axis) for axis, place in pairs if place.is_shard())  # type: ignore[attr-defined]


def check_gradient(name: str, parameter: Tensor, gradient: Tensor) -> None:
    """Raise unless the gradient is dense and lies on the ranks as its parameter does.

    Raises
    ------
    ModelError
        Naming the parameter.
    """
    if gradient.layout != torch.strided:
        raise ModelError(f"the gradient of {name!r} is sparse", "sparse=False in the embedding")
    if getattr(gradient, "placements", ()) != getattr(parameter, "placements", ()):
        raise ModelError(
            f"the gradient of {name!r} is placed as {getattr(gradient, 'placements', 'a plain tensor')}, "
            f"its weights as {getattr(parameter, 'placements', 'a plain tensor')}",
            "gradients that are reduced and sharded like their parameters",
        )


def summed(values: Tensor, places: Sequence[Groups]) -> Tensor:
    """Return ``values`` of shape ``(k, n)`` summed over the groups of each of the n tensors: one message per kind."""
    for kind in dict.fromkeys(places):
        columns = [i for i, place in enumerate(places) if place == kind]
        part = values[:, columns] if len(columns) < len(places) else values
        for group in kind:
            torch.distributed.all_reduce(part, group=group)
        if part is not values and kind:
            values[:, columns] = part
    return values
