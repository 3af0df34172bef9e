"""Arithmetic on named tensors: a vector in weight space is a ``Tree``, never flattened."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sharpscope.errors import MismatchError
from sharpscope.sharding import cut, from_row, is_shard, mesh_of, row, totals, whole

Tree = dict[str, Tensor]


def check_same_structure(first: Mapping[str, Tensor], second: Mapping[str, Tensor], names: tuple[str, str]) -> None:
    """Raise unless both trees have the same keys, shapes and dtypes; ``names`` says whose trees they are.

    Raises
    ------
    MismatchError
        Naming the first tensor that differs, with both shapes or dtypes.
    """
    if missing := [key for key in [*first, *second] if key not in first or key not in second]:
        absent = names[1] if missing[0] in first else names[0]
        raise MismatchError(
            "the models do not share an architecture: "
            f"{len(first)} tensors in {names[0]}, {len(second)} in {names[1]}; "
            f"{missing[0]!r} is missing in {absent} ({len(missing)} names differ)",
            "pass two models of one architecture, e.g. a checkpoint and its fine-tuned self",
        )
    for key, tensor in first.items():
        other = second[key]
        if (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
            raise MismatchError(
                f"tensor {key!r} is {tuple(tensor.shape)} {tensor.dtype} in {names[0]} "
                f"but {tuple(other.shape)} {other.dtype} in {names[1]}",
                "pass two models of one architecture and dtype (model.float() makes both float32)",
            )


def dot(a: Tree, b: Tree) -> float:
    """Return the inner product over the keys of ``a``, accumulated in float64."""
    return totals(tensor * b[name] for name, tensor in a.items())


def sum_of(a: Tree) -> float:
    """Return the sum of all entries, accumulated in float64."""
    return totals(a.values())


def norm(a: Tree) -> float:
    """Return the Euclidean norm, accumulated in float64."""
    return math.sqrt(dot(a, a))


def axpy(scale: float, x: Tree, y: Tree) -> Tree:
    """Return ``y + scale * x`` over the keys of ``y``."""
    return {name: torch.add(tensor, x[name], alpha=scale) for name, tensor in y.items()}


def scaled(a: Tree, factor: float | Tensor) -> Tree:
    """Return ``factor * a``."""
    return {name: tensor * factor for name, tensor in a.items()}


def select(a: Mapping[str, Tensor], names: Iterable[str]) -> Tree:
    """Return the sub-tree of the given names, in their order."""
    return {name: a[name] for name in names}


def flat(a: Tree) -> Tensor:
    """Return all entries in a row, in the dtype that holds them all; of shards those of this process."""
    return torch.cat([row(tensor) for tensor in a.values()])


def unflat(entries: Tensor, like: Tree) -> Tree:
    """Return the entries in the shapes and dtypes of ``like``, whose :func:`flat` has as many."""
    pieces = torch.split(entries, [(row(t) if is_shard(t) else t).numel() for t in like.values()])
    return {name: from_row(piece, tensor) for piece, (name, tensor) in zip(pieces, like.items(), strict=True)}


def zeros(like: Tree) -> Tree:
    """Return a tree of zeros."""
    return {name: torch.zeros_like(tensor) for name, tensor in like.items()}


def _generator(tensor: Tensor, key: tuple[object, ...], name: str) -> torch.Generator:
    # One generator per tensor: numbers do not depend on the order, the choice or the sharding of the others.
    digest = hashlib.sha256(repr((*key, name)).encode()).digest()
    return torch.Generator(device=tensor.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def rademacher(like: Tree, *key: object) -> Tree:
    """Return independent signs of -1 and 1 in the shapes of ``like``, determined by the key and each tensor's name.

    On a GPU, where it is the number of calls that costs, by the key and all names together.
    """
    if not next(iter(like.values())).is_cuda:
        return {name: cut(_signs(tensor, _generator(tensor, key, name)), tensor) for name, tensor in like.items()}
    counts, first = [tensor.numel() for tensor in like.values()], next(iter(like.values()))
    if mesh_of(like.values()) is None:
        entries = first.new_empty(()).expand(sum(counts))
        return unflat(_signs(entries, _generator(entries, key, "|".join(like))), like)
    # The same signs: all of them, a byte each, and of those this process's.
    room = torch.empty(sum(counts), dtype=torch.int8, device=first.device)
    signs = torch.split(_signs(room, _generator(room, key, "|".join(like))), counts)
    return {n: cut(p.view(t.shape).to(t.dtype), t) for p, (n, t) in zip(signs, like.items(), strict=True)}


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, like.shape, generator=generator, device=like.device, dtype=torch.int8)
    return bits.to(like.dtype).mul_(2).sub_(1)


def gaussian(like: Tree, *key: object) -> Tree:
    """Return independent standard normal numbers in the shapes of ``like``, determined by key and tensor name."""
    draws = {}
    for name, tensor in like.items():
        generator = _generator(tensor, key, name)
        draw = torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=tensor.dtype)
        draws[name] = cut(draw, tensor)
    return draws


def uniform(like: Tree, *key: object) -> Tree:
    """Return independent uniform numbers in [-1, 1) in the shapes of ``like``, determined by key and tensor name."""
    draws = {}
    for name, tensor in like.items():
        generator = _generator(tensor, key, name)
        unit = torch.rand(tensor.shape, generator=generator, device=tensor.device, dtype=tensor.dtype)
        draws[name] = cut(unit * 2 - 1, tensor)
    return draws


def fingerprint(a: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over names, shapes, dtypes and bytes, in hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(a):
        tensor = whole(a[name].detach()).contiguous().cpu()
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
