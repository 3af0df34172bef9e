"""A layer with part of its change, or of its weights, set to zero."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sharpscope.errors import UsageError
from sharpscope.path import mix
from sharpscope.tree import Tree, check_same_structure, uniform

Target = Literal["delta", "weight"]
Mask = Literal["random", "magnitude"]


def sparsify(
    start: Tree,
    here: Tree,
    p: float,
    *,
    target: Target = "delta",
    mask: Mask = "random",
    rescale: bool = False,
    seed: int = 0,
) -> Tree:
    """Return the tensors of a layer with a share ``p`` of them dropped.

    ``"weight"`` and ``"random"`` is the literal reading of the straggler paper (arXiv 2410.16476); ``"delta"`` with
    ``rescale`` is DARE (arXiv 2311.03099) and keeps zero-shot as the limit. A random mask of the delta without
    rescaling is in expectation a smaller alpha for the layer: compare with :func:`shrunk`.

    Parameters
    ----------
    start, here
        The layer's tensors at zero-shot, and those to be made sparse.
    p
        Share that is dropped, 0 to 1.
    target
        ``"delta"``: a dropped entry falls back to ``start``; ``"weight"``: to zero.
    mask
        ``"random"``: each entry by itself with probability p; ``"magnitude"``: of every tensor the share p that is
        smallest, of the delta or of the weight.
    rescale
        Divide what is left by ``1 - p``.
    seed
        Of the random mask, which also depends on each tensor's name.

    Raises
    ------
    UsageError
        If p lies outside 0 to 1, is 1 with ``rescale``, or a word is unknown.
    MismatchError
        If the trees differ in names, shapes or dtypes.
    """
    _check(p, target, mask, rescale)
    check_same_structure(start, here, ("the layer at zero-shot", "the layer to be made sparse"))
    if p == 0:
        return dict(here)
    # Half precision knows 256 or 2048 numbers from 0 to 1: of p = .9 it would drop .902.
    wide = {name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for name, tensor in here.items()}
    luck = uniform(wide, "sparsify", seed) if mask == "random" else None
    factor = 1 / (1 - p) if rescale else 1.0
    found = {}
    for name, tensor in here.items():
        origin = start[name] if target == "delta" else torch.zeros_like(tensor)
        left = tensor - origin
        kept = _largest(left, 1 - p) if luck is None else (luck[name] + 1) / 2 >= p
        # Where nothing is dropped or scaled the bits stay: origin + (tensor - origin) would round.
        moved = tensor if factor == 1.0 else origin + factor * left
        found[name] = torch.where(kept, moved, origin)
    return found


def shrunk(start: Tree, here: Tree, p: float) -> Tree:
    """Return the control of a sparsified delta: the layer at ``start + (1 - p) * (here - start)``."""
    return {name: mix(start[name], tensor, 1 - p) for name, tensor in here.items()}


def _largest(left: Tensor, share: float) -> Tensor:
    """Return where the largest entries lie, ``round(share * size)`` of them."""
    flat = left.abs().reshape(-1)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.argsort(descending=True, stable=True)[: round(share * len(flat))]] = True
    return mask.reshape(left.shape)


def _check(p: float, target: str, mask: str, rescale: bool) -> None:
    if not 0 <= p <= 1 or (rescale and p == 1):
        raise UsageError(f"p={p}: the share that is dropped lies in 0 to 1, below 1 to rescale", "e.g. p=0.5")
    for word, known in ((target, ("delta", "weight")), (mask, ("random", "magnitude"))):
        if word not in known:
            raise UsageError(f"{word!r} is unknown", " or ".join(known))
