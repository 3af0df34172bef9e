"""Attention whose second derivative is one kernel, or eleven small products, instead of some forty.

With S = scale q k', P = softmax(S) and output P v, the gradients for a cotangent g are

    dP = g v',  T = dP - rows(P dP),  dS = P T,  dq = scale dS k,  dk = scale dS' q,  dv = P' g

where a product of two matrices of one shape is taken entry by entry and rows() sums over a row. Their cotangents
a, b, c come back through

    D = scale (a k' + q b'),  U = D - rows(P D),  E = P U,  F = T U + g c',  W = P (F - rows(P F))

as E v + P c for g, E' g for v, scale (W k + dS b) for q and scale (W' q + dS' a) for k. A mask changes P alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from sharpscope.curvature.fusion import Fused, kernels, wide
from sharpscope.curvature.passes import leave, left, unheard

TOKENS, WIDTHS = 64, (16, 32, 64)  # largest number of tokens, and widths of a head, that the kernel takes


def _centred(p: Tensor, dp: Tensor) -> Tensor:
    wide_p, wide_dp = wide(p), wide(dp)
    return (wide_dp - (wide_p * wide_dp).sum(-1, keepdim=True)).to(p.dtype)


def _slopes(p: Tensor, dp: Tensor) -> Tensor:
    return (wide(p) * (wide(dp) - (wide(p) * wide(dp)).sum(-1, keepdim=True))).to(p.dtype)


def _bends(p: Tensor, t: Tensor, d: Tensor, gc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return dS, E and W of the module's docstring."""
    dtype = p.dtype
    p, t, d, gc = wide(p), wide(t), wide(d), wide(gc)
    u = d - (p * d).sum(-1, keepdim=True)
    f = t * u + gc
    ds, e, w = p * t, p * u, p * (f - (p * f).sum(-1, keepdim=True))
    return ds.to(dtype), e.to(dtype), w.to(dtype)


_centre, _slope, _bend = Fused(_centred, axes=1), Fused(_slopes, axes=1), Fused(_bends, axes=1)


def _kernels(q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Return the module of Triton kernels if they take these tensors."""
    same = q.shape == k.shape == v.shape and q.dim() == 4 and q.shape[-2] <= TOKENS and q.shape[-1] in WIDTHS
    return kernels(q) if same else None


def _in_kernel(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, more: tuple[Tensor, ...] | None, scale: float
) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = _kernels(q, k, v).slopes(g, q, k, v, more, scale)
    return found


class _Slope(torch.autograd.Function):
    """``dq, dk, dv`` of the attention that the node is; what is left to that is added."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        p: Tensor | None,
        node: Any,
        more: tuple[Tensor, ...] | None,
    ) -> tuple[Tensor, ...]:
        ctx.node = node
        if p is None:
            ctx.save_for_backward(g, q, k, v)
            return _in_kernel(g, q, k, v, more, node.scale)
        g = g.contiguous()  # read several times
        t = _centre(p, torch.bmm(g, v.mT))
        ctx.save_for_backward(g, q, k, v, p, t)
        return _gradients(g, q, k, p, p * t, more, node.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor | None, ...]:
        g, q, k, v, *known = ctx.saved_tensors
        scale = ctx.node.scale
        if not known:
            by_g, *rest = _kernels(q, k, v).bends(a, b, c, g, q, k, v, scale)
            return by_g, *leave(ctx.node, *rest), None, None, None
        p, t = known
        a, b, c = (tensor.contiguous() for tensor in (a, b, c))
        ds, e, w = _bend(p, t, _sum(torch.bmm(a, k.mT), q, b.mT).mul_(scale), torch.bmm(g, c.mT))
        by_q, by_k = _sum(torch.bmm(w, k), ds, b).mul_(scale), _sum(torch.bmm(w.mT, q), ds.mT, a).mul_(scale)
        return _sum(torch.bmm(e, v), p, c), *leave(ctx.node, by_q, by_k, torch.bmm(e.mT, g)), None, None, None


def _sum(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the total with the products of a and b added in place."""
    return total.baddbmm_(a, b)


def _gradients(
    g: Tensor, q: Tensor, k: Tensor, p: Tensor, ds: Tensor, more: tuple[Tensor, ...] | None, scale: float
) -> tuple[Tensor, ...]:
    found = torch.bmm(ds, k).mul_(scale), torch.bmm(ds.mT, q).mul_(scale), torch.bmm(p.mT, g)
    return found if more is None else tuple(own.add_(part) for own, part in zip(found, more, strict=True))


def _weights(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Return P; a mask is broadcast, and rows in which all is masked are zero, as torch has them."""
    if mask is None:
        return torch.softmax(scores, -1)
    allowed = mask if mask.dtype == torch.bool else mask > -torch.inf
    scores = torch.where(mask, scores, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1).masked_fill(~allowed.any(-1, keepdim=True), 0.0)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, shape: torch.Size
    ) -> Tensor:
        ctx.scale = scale
        if mask is None and (triton := _kernels(q, k, v)):
            ctx.save_for_backward(q, k, v, None)
            found: Tensor = triton.attention(q, k, v, scale)
            return found
        scores = wide(torch.bmm(q, k.mT)) * scale
        p = _weights(scores.view(*shape, *scores.shape[1:]), mask).view_as(scores).to(q.dtype)
        ctx.save_for_backward(q, k, v, p)
        return torch.bmm(p, v)

    @staticmethod
    @unheard
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_Slope.apply(g, q, k, v, p, ctx, left(ctx)), None, None, None  # type: ignore[no-untyped-call]
        # A product's way down, which nothing differentiates.
        if p is None:
            return *_in_kernel(g, q, k, v, left(ctx), ctx.scale), None, None, None
        g = g.contiguous()
        return *_gradients(g, q, k, p, _slope(p, torch.bmm(g, v.mT)), left(ctx), ctx.scale), None, None, None


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Return ``softmax(scale q k' + mask) v``, shapes (..., tokens, width), differentiable twice.

    A mask is a constant that is broadcast, of numbers or of what is not masked.
    """
    shape = q.shape[:-2]
    if mask is None and _kernels(q, k, v):
        found: Tensor = _Attention.apply(q, k, v, scale, None, shape)  # type: ignore[no-untyped-call]
        return found
    q, k, v = (tensor.reshape(-1, *tensor.shape[-2:]) for tensor in (q, k, v))  # else every product copies them
    found = _Attention.apply(q, k, v, scale, mask, shape)  # type: ignore[no-untyped-call]
    return found.view(*shape, *found.shape[1:])


def attention_of_groups(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Return :func:`attention` with groups along a first axis more."""
    if mask is None:
        found = attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), scale)
        return found.view(*q.shape[:2], *found.shape[1:])
    mask = mask.view(len(mask), *(1,) * (q.dim() - mask.dim()), *mask.shape[1:])
    if mask.requires_grad:  # which no mode sees within `vmap`
        q, k, v = wide(q), wide(k), wide(v)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return attention(q, k, v, scale, mask)


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, float, Tensor | None] | None:
    """Return the arguments of :func:`attention` if that is what ``scaled_dot_product_attention`` is asked for.

    That is without dropout, without heads in groups, and with a mask that is a constant.
    """
    if dropout_p or enable_gqa or not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        return None
    if not query.dtype == key.dtype == value.dtype:
        return None
    mask = attn_mask
    if is_causal and mask is None:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    elif mask is not None and (is_causal or not _is_constant(mask, query, key)):
        return None
    return query, key, value, query.shape[-1] ** -0.5 if scale is None else scale, mask


def _is_constant(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """Return whether the mask is one that torch takes, is broadcast to the scores and asks for no gradient."""
    known = mask.dtype in (torch.bool, query.dtype) or query.dtype == torch.float16
    sizes = zip(mask.shape[::-1], (key.shape[-2], *query.shape[-2::-1]), strict=False)
    fits = mask.dim() <= query.dim() and all(size in (1, whole) for size, whole in sizes)
    return known and fits and not mask.requires_grad
