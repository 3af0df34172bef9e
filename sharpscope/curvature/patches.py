"""Patches of an image as rows of a matrix product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


def along_patches(
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor | None:
    """Return the convolution as a matrix product if its windows do not overlap, as those of a ViT; else None.

    With weights for each group of examples torch would have it as one convolution in groups, far slower.
    """
    sides = tuple(weight.shape[2:])
    plain = _pair(padding) in ((0, 0), "valid") and _pair(dilation) == (1, 1) and groups == 1
    if not plain or _pair(stride) != sides or x.dim() != 4:
        return None
    (high, wide), (rows, columns) = sides, (x.shape[-2] // sides[0], x.shape[-1] // sides[1])
    windows = x[..., : rows * high, : columns * wide].reshape(*x.shape[:2], rows, high, columns, wide)
    return product(windows.permute(0, 2, 4, 1, 3, 5).flatten(3), weight.flatten(1), bias).permute(0, 3, 1, 2)


def _pair(value: str | int | Sequence[int]) -> Any:
    return (value, value) if isinstance(value, int) else value if isinstance(value, str) else tuple(value)
