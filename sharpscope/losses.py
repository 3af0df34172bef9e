"""Losses as sums over examples of outputs and targets, by name."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import partial
from types import CodeType, FunctionType
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from sharpscope.errors import UsageError

Loss = Callable[[Tensor, Tensor], Tensor]

# What the loss is a function of: the image tower and a head; both towers; both towers, image-text pairs for classes.
Towers = Literal["image", "both", "contrastive"]


def cross_entropy(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the summed cross-entropy of logits ``(n, classes)`` and class numbers ``(n,)``."""
    return functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the summed squared error, averaged over classes, against one-hot targets ``(n,)`` or values ``(n, k)``."""
    if targets.ndim == 1:
        targets = functional.one_hot(targets, outputs.shape[1]).to(outputs.dtype)
    return (outputs - targets).square().mean(1).sum()


def contrastive(similarity: Tensor, targets: Tensor) -> Tensor:
    """Return n times CLIP's symmetric cross-entropy of a scaled similarity matrix ``(n, n)``, pairs on the diagonal.

    No sum over examples: each example's term depends on the whole batch, so the batch is the unit. Batches must be of
    equal size and must not be split; targets are ignored.
    """
    pairs = torch.arange(len(targets), device=similarity.device)
    both = (functional.cross_entropy(s, pairs, reduction="sum") for s in (similarity, similarity.T))
    return sum(both, torch.zeros((), dtype=similarity.dtype, device=similarity.device)) / 2


def sigmoid_contrastive(similarity: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG001
    """Return n times SigLIP's loss of a similarity matrix ``(n, n)`` with scale and bias (arXiv 2303.15343).

    Every entry is a yes-or-no question, summed over all n^2. As in :func:`contrastive` the batch is the unit.
    """
    signs = 2 * torch.eye(len(similarity), dtype=similarity.dtype, device=similarity.device) - 1
    return -functional.logsigmoid(signs * similarity).sum()


COUPLED: tuple[Loss, ...] = (contrastive, sigmoid_contrastive)  # each batch is one term of the mean, not its examples


def logit_normalised(loss: Loss) -> Loss:
    """Return the loss of ``(z - mean z) / ||z - mean z||`` instead of the logits z: free of the logits' scale."""

    def normalised(logits: Tensor, targets: Tensor) -> Tensor:
        centred = logits - logits.mean(1, keepdim=True)
        return loss(centred / centred.norm(dim=1, keepdim=True).clamp_min(torch.finfo(logits.dtype).tiny), targets)

    return normalised


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "squared_error": squared_error}


def name_of(loss: Loss) -> str:
    """Return what the function is called, the same in every process."""
    return str(getattr(loss, "__qualname__", None) or _placeless(repr(loss)))


def code_of(loss: Loss) -> str | None:
    """Return a hash of what a function of one's own does, as far as its code and what it captured tell; else None.

    A name says too little of it: a cell that was edited and run again defines another function of the same name.
    """
    if getattr(loss, "func", loss) in LOSSES.values() or loss in COUPLED:
        return None
    return hashlib.sha256(_said(loss).encode()).hexdigest()


def _said(value: object, deep: int = 6) -> str:
    """Return a text of the value without what differs from process to process: places in memory, orders of sets."""
    if deep == 0:
        return type(value).__qualname__  # objects may hold each other

    def every(values: Iterable[object]) -> list[str]:
        return [_said(inner, deep - 1) for inner in values]

    if isinstance(value, CodeType):
        return f"{value.co_code.hex()} {value.co_names} {every(value.co_consts)}"
    if isinstance(value, FunctionType):
        captured = inspect.getclosurevars(value).nonlocals.values()
        return f"{every((value.__code__, *captured, value.__defaults__, value.__kwdefaults__))}"
    if isinstance(value, partial):
        return f"{every((value.func, value.args, value.keywords))}"
    if isinstance(value, set | frozenset):
        return f"{sorted(every(value))}"
    if isinstance(value, Mapping):
        return f"{every(value.items())}"
    if isinstance(value, list | tuple):
        return f"{every(value)}"
    if isinstance(value, Tensor | type) or not hasattr(value, "__dict__"):
        return _placeless(repr(value))
    return f"{_placeless(repr(value))} {_said(vars(value), deep - 1)}"


def _placeless(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def loss_from(name: str, label_smoothing: float = 0.0) -> Loss:
    """Return the loss of that name.

    Raises
    ------
    UsageError
        If the name is unknown, or smoothing is asked of a loss that has none or lies outside [0, 1).
    """
    if name == "contrastive":
        raise UsageError("a contrastive loss needs both towers and texts", 'objective="contrastive"')
    if name not in LOSSES:
        near = get_close_matches(name, LOSSES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"loss {name!r} is unknown", f"{hint}known: {', '.join(LOSSES)}")
    if not 0 <= label_smoothing < 1 or (label_smoothing and name != "cross_entropy"):
        problem = f"label_smoothing={label_smoothing} with {name} cannot be meant"
        raise UsageError(problem, "0 <= label_smoothing < 1, and with cross_entropy only")
    return partial(cross_entropy, label_smoothing=label_smoothing) if label_smoothing else LOSSES[name]
