"""Tensors of which each process holds some rows, and whole ones made of them: both ways, differentiable twice.

A shard is torch's ``DTensor``, as ``fully_shard`` (FSDP2) leaves them in a module: rows along the first axis over the
processes of a one-dimensional mesh, or whole in every process where a tensor has no rows to share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def all_gather(found: Tensor, own: Tensor, group: Any = None) -> None:
    """Fill ``found`` with every process's tensor, one after the other along the first axis."""
    # As torch 2.13 calls it, or as those before it did.
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    gather(found, own, group=group)


def _reduce_scatter(found: Tensor, every: Tensor, group: Any) -> None:
    scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    scatter(found, every, group=group)


def is_shard(tensor: Tensor) -> bool:
    """Return whether this process may hold a part of the tensor only."""
    return hasattr(tensor, "device_mesh")


def mesh_of(tensors: Iterable[Tensor]) -> Any:
    """Return the mesh of the first shard, None if there is none."""
    return next((tensor.device_mesh for tensor in tensors if is_shard(tensor)), None)  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, without history."""
    return tensor._local_tensor if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def _split(shard: DTensor) -> bool:
    return bool(shard.placements[0].is_shard())


def _rows(count: int, shard: DTensor) -> tuple[slice, int]:
    """Return which of so many rows this process holds, and how many each but the last ones does."""
    each = -(-count // shard.device_mesh.size())
    rank = shard.device_mesh.get_local_rank()
    return slice(min(rank * each, count), min((rank + 1) * each, count)), each


def cut(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor, which every process has, in shards as those of ``like`` if that is in shards."""
    if not is_shard(like):
        return tensor
    own = tensor[_rows(len(tensor), like)[0]] if _split(like) else tensor  # type: ignore[arg-type]
    return shard_of(own, like)


def shard_of(own: Tensor, like: Tensor) -> Tensor:
    """Return the shard whose part in this process is given; its shape and processes are those of ``like``."""
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=like.shape, stride=_stride(like.shape))


def _stride(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def whole(shard: Tensor) -> Tensor:
    """Return the tensor that all processes' shards make; differentiable twice. Collective."""
    return _Whole.apply(shard) if is_shard(shard) else shard  # type: ignore[no-untyped-call]


def totals(parts: Iterable[Tensor]) -> float:
    """Return the sum of all entries of the tensors, accumulated in float64; with shards among them collective."""
    sums, mesh = [], None
    for part in parts:
        mesh = getattr(part, "device_mesh", mesh)
        sums.append(torch.sum(row(part), dtype=torch.float64))
    return float(over_ranks(torch.stack(sums).sum(), mesh)) if sums else 0.0


def over_ranks(own: Tensor, mesh: Any) -> Tensor:
    """Return the sum of what every process of the mesh has, numbers of one shape; without a mesh what there is."""
    if mesh is None:
        return own
    every = own.new_empty(mesh.size() * own.numel())
    # Gathered and added here in the order of the ranks, so that all have the same bits and take the same turns.
    all_gather(every, own.reshape(-1), group=mesh.get_group())
    return every.view(mesh.size(), *own.shape).sum(0)


def row(tensor: Tensor) -> Tensor:
    """Return the entries of a tensor in a row, of shards each in one process only."""
    own = local(tensor).detach().reshape(-1)
    if not is_shard(tensor) or _split(tensor) or tensor.device_mesh.get_local_rank() == 0:  # type: ignore[arg-type, attr-defined]
        return own
    return own[:0]


def from_row(entries: Tensor, like: Tensor) -> Tensor:
    """Return the tensor, or shard, of which :func:`row` gave the entries; collective for one that every process has."""
    if not is_shard(like):
        return entries.view(like.shape).to(like.dtype)
    own = entries.to(like.dtype)
    if not _split(like):  # type: ignore[arg-type]
        own = own if len(own) else own.new_empty(like.numel())
        dist.broadcast(own, 0, group=like.device_mesh.get_group())  # type: ignore[attr-defined]
    return shard_of(own.view(local(like).shape), like)


class _Whole(torch.autograd.Function):
    """Shards -> the whole tensor; the derivative sums over processes what each adds to its rows."""

    @staticmethod
    def forward(ctx: Any, shard: DTensor) -> Tensor:
        ctx.like = shard.detach()
        own = local(shard)
        if not _split(shard):
            return own.clone()
        each = _rows(shard.shape[0], shard)[1]
        found = own.new_empty((each * shard.device_mesh.size(), *own.shape[1:]))
        all_gather(found, _padded(own, each), group=shard.device_mesh.get_group())
        return found[: shard.shape[0]]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Parts.apply(gradient, ctx.like)  # type: ignore[no-untyped-call, no-any-return]


class _Parts(torch.autograd.Function):
    """A tensor per process -> the sum over processes, in shards: the transpose of `_Whole`."""

    @staticmethod
    def forward(_ctx: Any, gradient: Tensor, like: DTensor) -> Tensor:
        group, gradient = like.device_mesh.get_group(), gradient.contiguous()
        if not _split(like):
            total = gradient.clone()
            dist.all_reduce(total, group=group)
            return shard_of(total, like)
        own, each = _rows(len(gradient), like)
        found = gradient.new_empty((each, *gradient.shape[1:]))
        _reduce_scatter(found, _padded(gradient, each * like.device_mesh.size()), group=group)
        return shard_of(found[: own.stop - own.start], like)

    @staticmethod
    def backward(_ctx: Any, bent: Tensor) -> tuple[Tensor, None]:
        return whole(bent), None


def _padded(tensor: Tensor, rows: int) -> Tensor:
    missing = rows - len(tensor)
    return torch.cat([tensor, tensor.new_zeros((missing, *tensor.shape[1:]))]) if missing else tensor.contiguous()


class Examples:
    """The processes of a mesh share the examples of a batch: each takes some rows and all have all outputs."""

    def __init__(self, mesh: Any) -> None:
        self._mesh = mesh

    def own(self, inputs: Any) -> Any:
        """Return this process's rows, as many as any other's: the last row is repeated where there are too few."""
        if isinstance(inputs, Mapping):
            return {name: self.own(tensor) for name, tensor in inputs.items()}
        each, rank = -(-len(inputs) // self._mesh.size()), self._mesh.get_local_rank()
        rows = torch.arange(rank * each, (rank + 1) * each, device=inputs.device).clamp(max=len(inputs) - 1)
        return inputs[rows]

    def all(self, own: Tensor, count: int) -> Tensor:
        """Return the outputs of all ``count`` rows; differentiable twice where all go on alike."""
        return _AllRows.apply(own, count, self._mesh)  # type: ignore[no-untyped-call, no-any-return]


class _AllRows(torch.autograd.Function):
    """Rows of each process -> all rows in all processes, which make the same of them."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, count: int, mesh: Any) -> Tensor:
        ctx.mesh = mesh
        found = own.new_empty((len(own) * mesh.size(), *own.shape[1:]))
        all_gather(found, own.contiguous(), group=mesh.get_group())
        return found[:count]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _OwnRows.apply(gradient, ctx.mesh), None, None  # type: ignore[no-untyped-call]


class _OwnRows(torch.autograd.Function):
    """All rows -> those of this process, zero where it repeated one: the transpose of `_AllRows`."""

    @staticmethod
    def forward(ctx: Any, every: Tensor, mesh: Any) -> Tensor:
        ctx.mesh, ctx.count = mesh, len(every)
        each = -(-len(every) // mesh.size())
        rank = mesh.get_local_rank()
        return _padded(every[rank * each : (rank + 1) * each], each)

    @staticmethod
    def backward(ctx: Any, bent: Tensor) -> tuple[Tensor, None]:
        return _AllRows.apply(bent, ctx.count, ctx.mesh), None  # type: ignore[no-untyped-call]
