"""Triton kernels of attention over up to 64 tokens and of LayerNorm: a program holds a head, or a row. Imports triton.

The formulas are in `attention.py` and `smooth.py`. Tensors of attention are (examples, heads, tokens, width) over
memory in the order (examples, tokens, heads, width), as the linear layers around it have it: nothing is copied there.
"""

from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

WARPS = 8


@triton.jit
def _tile(tensor, heads, tokens, width: tl.constexpr, block: tl.constexpr):
    """Load the tokens of this program's head, zero beyond the last."""
    example, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    row, column = tl.arange(0, block), tl.arange(0, width)
    place = ((example * tokens + row[:, None]) * heads + head) * width + column[None, :]
    return tl.load(tensor + place, mask=row[:, None] < tokens, other=0.0)


@triton.jit
def _keep(tensor, tile, heads, tokens, width: tl.constexpr, block: tl.constexpr):
    """Store the tokens of this program's head."""
    example, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    row, column = tl.arange(0, block), tl.arange(0, width)
    place = ((example * tokens + row[:, None]) * heads + head) * width + column[None, :]
    tl.store(tensor + place, tile, mask=row[:, None] < tokens)


@triton.jit
def _softmax(q, k, scale, tokens, block: tl.constexpr, precision: tl.constexpr):
    s = tl.dot(q, tl.trans(k), input_precision=precision) * scale
    s = tl.where(tl.arange(0, block)[None, :] < tokens, s, float("-inf"))
    p = tl.exp(s - tl.max(s, 1)[:, None])
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def _attention(q, k, v, out, heads, tokens, scale, width: tl.constexpr, block: tl.constexpr, precision: tl.constexpr):
    key = _tile(k, heads, tokens, width, block)
    p = _softmax(_tile(q, heads, tokens, width, block), key, scale, tokens, block, precision)
    value = _tile(v, heads, tokens, width, block)
    _keep(out, tl.dot(p.to(value.dtype), value, input_precision=precision), heads, tokens, width, block)


@triton.jit
def _slopes(
    g, q, k, v, more_q, more_k, more_v, dq, dk, dv, heads, tokens, scale,
    width: tl.constexpr, block: tl.constexpr, precision: tl.constexpr, onto: tl.constexpr,
):  # fmt: skip
    query, key = _tile(q, heads, tokens, width, block), _tile(k, heads, tokens, width, block)
    p = _softmax(query, key, scale, tokens, block, precision)
    given = _tile(g, heads, tokens, width, block)
    value = _tile(v, heads, tokens, width, block)
    dp = tl.dot(given, tl.trans(value), input_precision=precision)
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(key.dtype)
    by_v = tl.dot(tl.trans(p.to(key.dtype)), given, input_precision=precision)
    by_q = tl.dot(ds, key, input_precision=precision)
    by_k = tl.dot(tl.trans(ds), query, input_precision=precision)
    if onto:
        by_v += _tile(more_v, heads, tokens, width, block)
        by_q += _tile(more_q, heads, tokens, width, block)
        by_k += _tile(more_k, heads, tokens, width, block)
    _keep(dv, by_v, heads, tokens, width, block)
    _keep(dq, by_q, heads, tokens, width, block)
    _keep(dk, by_k, heads, tokens, width, block)


@triton.jit
def _bends(
    a, b, c, g, q, k, v, by_g, by_q, by_k, by_v, heads, tokens, scale,
    width: tl.constexpr, block: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    query, key = _tile(q, heads, tokens, width, block), _tile(k, heads, tokens, width, block)
    p = _softmax(query, key, scale, tokens, block, precision)
    given, value = _tile(g, heads, tokens, width, block), _tile(v, heads, tokens, width, block)
    on_q, on_k = _tile(a, heads, tokens, width, block), _tile(b, heads, tokens, width, block)
    d = tl.dot(on_q, tl.trans(key), input_precision=precision)
    d = tl.dot(query, tl.trans(on_k), d, input_precision=precision) * scale
    dp = tl.dot(given, tl.trans(value), input_precision=precision)
    on_v = _tile(c, heads, tokens, width, block)
    gc = tl.dot(given, tl.trans(on_v), input_precision=precision)
    mean_dp, mean_d = tl.sum(p * dp, 1)[:, None], tl.sum(p * d, 1)[:, None]
    f = d * (dp - mean_dp) - dp * mean_d + gc
    e = (p * (d - mean_d)).to(key.dtype)
    ds = (p * (dp - mean_dp) * scale).to(key.dtype)
    w = (p * (f - tl.sum(p * f, 1)[:, None]) * scale).to(key.dtype)
    found = tl.dot(e, value, input_precision=precision)
    _keep(by_g, tl.dot(p.to(key.dtype), on_v, found, input_precision=precision), heads, tokens, width, block)
    _keep(by_v, tl.dot(tl.trans(e), given, input_precision=precision), heads, tokens, width, block)
    found = tl.dot(w, key, input_precision=precision)
    _keep(by_q, tl.dot(ds, on_k, found, input_precision=precision), heads, tokens, width, block)
    found = tl.dot(tl.trans(w), query, input_precision=precision)
    _keep(by_k, tl.dot(tl.trans(ds), on_q, found, input_precision=precision), heads, tokens, width, block)


@triton.jit
def _row(x, mean, rate, weight, weight_stride, rows, width, block: tl.constexpr):
    """Return this program's place in memory, its mask, the normalised row, its rate and its group's weight."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    at = row * width + column
    r = tl.load(rate + row)
    unit = tl.where(inside, (tl.load(x + at, mask=inside, other=0.0) - tl.load(mean + row)) * r, 0.0)
    scale = tl.load(weight + row // rows * weight_stride + column, mask=inside, other=0.0)
    return at, inside, unit, r, scale


@triton.jit
def _norm_slope(
    g, x, weight, mean, rate, more, by_x, weight_stride, rows, width, block: tl.constexpr, onto: tl.constexpr
):
    at, inside, unit, r, scale = _row(x, mean, rate, weight, weight_stride, rows, width, block)
    a = tl.load(g + at, mask=inside, other=0.0).to(tl.float32) * scale
    found = r * (a - tl.sum(a, 0) / width - unit * (tl.sum(a * unit, 0) / width))
    if onto:
        found += tl.load(more + at, mask=inside, other=0.0)
    tl.store(by_x + at, found, mask=inside)


@triton.jit
def _norm_bend(
    c, p, q, g, x, weight, mean, rate, by_g, by_x, weight_stride, p_stride, q_stride, rows, width,
    block: tl.constexpr, own: tl.constexpr,
):  # fmt: skip
    at, inside, unit, r, scale = _row(x, mean, rate, weight, weight_stride, rows, width, block)
    given = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    on_x = tl.load(c + at, mask=inside, other=0.0)
    a = given * scale
    mean_c, mean_a = tl.sum(on_x, 0) / width, tl.sum(a, 0) / width
    along_c, along_a = tl.sum(on_x * unit, 0) / width, tl.sum(a * unit, 0) / width
    whole = tl.sum(on_x * a, 0) / width - mean_c * mean_a - along_c * along_a
    u = -r * (on_x * along_a + a * along_c)
    found = scale * r * (on_x - mean_c - unit * along_c)
    if own:
        column, group = tl.arange(0, block), tl.program_id(0).to(tl.int64) // rows
        on_weight = tl.load(p + group * p_stride + column, mask=inside, other=0.0)
        u += given * on_weight
        found += unit * on_weight + tl.load(q + group * q_stride + column, mask=inside, other=0.0)
    tl.store(by_g + at, found, mask=inside)
    found = r * (u - tl.sum(u, 0) / width - unit * (tl.sum(u * unit, 0) / width)) - unit * r * r * whole
    tl.store(by_x + at, found, mask=inside)


def _rows(kernel: Any, tensors: tuple[Tensor, ...], x: Tensor, groups: tuple[Tensor, ...], **how: bool) -> None:
    width = x.shape[-1]
    strides = [tensor.stride(0) if tensor.shape[0] > 1 else 0 for tensor in groups]
    block = triton.next_power_of_2(width)
    with torch.cuda.device(x.device):
        kernel[(x.shape[0] * x.shape[1],)](
            *tensors, *strides, x.shape[1], width, block=block, num_warps=min(max(block // 256, 1), 16), **how
        )


def norm_slope(g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rate: Tensor, more: tuple[Tensor] | None) -> Tensor:
    """Return LayerNorm's gradient by x ``(groups, rows, width)``, added to what there is."""
    g, (add,), found = g.contiguous(), more or (g,), torch.empty_like(x)
    _rows(_norm_slope, (g, x, weight, mean, rate, add.contiguous(), found), x, (weight,), onto=more is not None)
    return found


def norm_bend(
    c: Tensor, p: Tensor | None, q: Tensor | None, g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rate: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what cotangents of the gradients by x, weight and bias come to for g and x."""
    own = p is not None or q is not None
    on_weight, on_bias = (torch.zeros_like(weight) if own and part is None else part for part in (p, q))
    on_weight, on_bias = (weight if part is None else part.contiguous() for part in (on_weight, on_bias))
    by_g, by_x = torch.empty_like(x, dtype=g.dtype), torch.empty_like(x)
    tensors = c.contiguous(), on_weight, on_bias, g.contiguous(), x, weight, mean, rate, by_g, by_x
    _rows(_norm_bend, tensors, x, (weight, on_weight, on_bias), own=own)
    return by_g, by_x


def _run(kernel: Any, inputs: tuple[Tensor, ...], outputs: int, scale: float, **how: bool) -> tuple[Tensor, ...]:
    examples, heads, tokens, width = inputs[0].shape
    laid = [tensor.transpose(-3, -2).contiguous() for tensor in inputs]
    found = [torch.empty_like(laid[0]) for _ in range(outputs)]
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    block = max(16, triton.next_power_of_2(tokens))
    with torch.cuda.device(laid[0].device):
        kernel[(examples * heads,)](
            *laid, *found, heads, tokens, scale, width=width, block=block, precision=precision, num_warps=WARPS, **how
        )
    return tuple(tensor.transpose(-3, -2) for tensor in found)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return the attention's output."""
    return _run(_attention, (q, k, v), 1, scale)[0]


def slopes(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, more: tuple[Tensor, ...] | None, scale: float
) -> tuple[Tensor, ...]:
    """Return the gradients by q, k and v, added to those that there are."""
    return _run(_slopes, (g, q, k, v, *(more or (q, k, v))), 3, scale, onto=more is not None)


def bends(
    a: Tensor, b: Tensor, c: Tensor, g: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """Return what cotangents of the gradients come to for g, q, k and v."""
    return _run(_bends, (a, b, c, g, q, k, v), 4, scale)
