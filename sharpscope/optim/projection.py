"""Selective projection as pure functions of lists of tensors; no call here waits for the device.

Selective Projection Decay, arXiv 2411.01713. Per unit (a tensor or a layer), with gradient g, previous weights theta,
anchor theta_0 and the plain optimiser step theta~::

    c = -<g, theta - theta_0>
    r = clip((||theta~ - theta_0|| - ||theta - theta_0||) / ||theta~ - theta_0||, 0, 1)     if c < 0, else 0
    theta <- theta~ - min(lambda * r, 1) * (theta~ - theta_0)

The minimum is a departure from the paper: beyond 1 the weights would overshoot the anchor.

Large tensors stay in the dtype of the weights, float32 at least; sums end in float64 vectors of one number per unit,
which stay on the device, so that gates and ratios cost a few launches for all units together.
"""

from __future__ import annotations

import torch
from torch import Tensor

Tensors = list[Tensor] | tuple[Tensor, ...]

_HALF = (torch.float16, torch.bfloat16)
# One float32 BLAS dot over 25 M numbers is off by 5e-5, and torch's CPU norm by 1e-3 (measured): far more than a
# step adds to a norm. Blocks of this size, added in float64, are good to 1e-7.
_BLOCK = 1 << 16


def widened(tensors: Tensors) -> list[Tensor]:
    """Return the tensors, half precision as float32."""
    if not any(tensor.dtype in _HALF for tensor in tensors):
        return list(tensors)
    single = torch.float32
    wide = [torch.empty_like(t, dtype=single) if t.dtype in _HALF else torch.empty_like(t) for t in tensors]
    torch._foreach_copy_(wide, tensors)  # one launch for all
    return wide


def deviations(weights: Tensors, anchors: Tensors | None) -> list[Tensor]:
    """Return ``theta - theta_0`` per tensor, float32 at least; without anchors the weights themselves, not a copy."""
    if anchors is None:
        return widened(weights)
    found: list[Tensor] = list(torch._foreach_sub(widened(weights), widened(anchors)))
    return found


def on_cpu(tensor: Tensor) -> bool:
    """Return whether foreach calls would be loops."""
    return tensor.is_cpu


def squares(tensors: Tensors) -> Tensor:
    """Return the squared norm of each tensor, shape ``(n,)``, float64."""
    if on_cpu(tensors[0]):
        return torch.stack([_blockwise(tensor, tensor) for tensor in tensors])
    return torch.stack(torch._foreach_norm(tensors)).double().square()


def products(first: Tensors, second: Tensors) -> Tensor:
    """Return the inner product of each pair of tensors, shape ``(n,)``, float64."""
    if on_cpu(first[0]):
        return torch.stack([_blockwise(a, b) for a, b in zip(first, widened(second), strict=True)])
    # There is no foreach sum. Norms are sums of absolute values: sum(x) = 2 * sum(max(x, 0)) - sum(|x|).
    terms = torch._foreach_mul(first, widened(second))
    absolute = torch._foreach_norm(terms, 1)
    torch._foreach_clamp_min_(terms, 0)
    positive, total = torch.stack([*torch._foreach_norm(terms, 1), *absolute]).double().chunk(2)
    return torch.sub(2 * positive, total)


def _blockwise(a: Tensor, b: Tensor) -> Tensor:
    pairs = zip(torch.split(a.reshape(-1), _BLOCK), torch.split(b.reshape(-1), _BLOCK), strict=True)
    return torch.stack([torch.dot(x, y) for x, y in pairs]).sum(dtype=torch.float64)


def row_norms(tensors: Tensors) -> list[Tensor]:
    """Return the sum of absolute values of every row, shape ``(rows, 1, ...)``; a vector is one row.

    A row is what one output of a linear map or convolution depends on; the largest of these sums is the norm MARS
    of projected fine-tuning (TPGM, arXiv 2303.10720).
    """
    return [t.abs().sum(dim=tuple(range(1, t.ndim)) or None, keepdim=t.ndim > 1) for t in tensors]


def ratios(before: Tensor, after: Tensor, gated: Tensor) -> Tensor:
    """Return r from the norms of the deviation before and after the step; 0 where not gated or not grown.

    Never NaN: what the step itself spoiled is left as it is.
    """
    growth = 1 - before / after
    return torch.where(gated & (growth > 0), growth, 0.0)


def shares(ratio: Tensor, decay: float | Tensor) -> Tensor:
    """Return ``min(lambda * r, 1)``: the part of the deviation to take back."""
    return (ratio * decay).clamp(max=1)


def pull(weights: Tensors, deviation: Tensors, share: Tensors) -> None:
    """Subtract ``share * deviation`` from the weights in place; a share is a scalar or a column of rows."""
    torch._foreach_addcmul_(weights, deviation, share, -1)  # half precision: computed in float32, rounded once
