"""Triton kernels of the projection: one pass over weights, anchors and gradients of all tensors. Imports triton.

A kernel takes a table of pointers, as many tensors differ in size; a program handles a span of one of them.
"""

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

SPAN = 16384  # weights of a program
BLOCK = 2048  # weights at a time
KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def sums(
    owners,
    starts,
    sizes,
    weights,
    anchors,
    gradients,
    out,
    anchored: tl.constexpr,
    graded: tl.constexpr,
    kind: tl.constexpr,
    span: tl.constexpr,
    block: tl.constexpr,
):
    """Write ``sum (w - a)^2`` and ``sum (w - a) g`` of each program's span, both in float32."""
    program = tl.program_id(0)
    owner = tl.load(owners + program)
    start = tl.load(starts + program)
    size = tl.load(sizes + owner)
    weight = tl.load(weights + owner).to(tl.pointer_type(kind))
    squares = tl.zeros([block], dtype=tl.float32)
    products = tl.zeros([block], dtype=tl.float32)
    for offset in range(0, span, block):
        place = start + offset + tl.arange(0, block)
        inside = place < size
        moved = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
        if anchored:
            anchor = tl.load(anchors + owner).to(tl.pointer_type(kind))
            moved -= tl.load(anchor + place, mask=inside, other=0.0).to(tl.float32)
        squares += moved * moved
        if graded:
            gradient = tl.load(gradients + owner).to(tl.pointer_type(kind))
            products += moved * tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + 2 * program, tl.sum(squares))
    tl.store(out + 2 * program + 1, tl.sum(products))


@triton.jit
def pull(
    owners,
    starts,
    sizes,
    weights,
    anchors,
    shares,
    anchored: tl.constexpr,
    kind: tl.constexpr,
    span: tl.constexpr,
    block: tl.constexpr,
):
    """Subtract ``share * (w - a)`` from the weights in place; a tensor whose share is 0 is not touched."""
    program = tl.program_id(0)
    owner = tl.load(owners + program)
    share = tl.load(shares + owner)
    if share != 0.0:
        start = tl.load(starts + program)
        size = tl.load(sizes + owner)
        weight = tl.load(weights + owner).to(tl.pointer_type(kind))
        for offset in range(0, span, block):
            place = start + offset + tl.arange(0, block)
            inside = place < size
            value = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
            moved = value
            if anchored:
                anchor = tl.load(anchors + owner).to(tl.pointer_type(kind))
                moved -= tl.load(anchor + place, mask=inside, other=0.0).to(tl.float32)
            tl.store(weight + place, (value - share * moved).to(kind), mask=inside)
