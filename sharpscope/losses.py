"""Losses as sums over examples of outputs and targets, by name."""

from __future__ import annotations

import dis
import hashlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
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
    return str(getattr(loss, "__qualname__", None) or _placeless(loss))


def code_of(loss: Loss) -> str | None:
    """Return a hash of what a function of one's own does, as far as its code and what it captured tell; else None.

    A name says too little of it: a cell that was edited and run again defines another function of the same name.
    Functions and classes of other packages count by their names, those of the loss's own package by what they do.
    """
    if getattr(loss, "func", loss) in LOSSES.values() or loss in COUPLED:
        return None
    return hashlib.sha256(_said(loss, _package(loss)).encode()).hexdigest()


def _package(value: object) -> str:
    """Return the package that a function or an object's class is written in."""
    while isinstance(value, partial):
        value = value.func
    return str(getattr(value, "__module__", None)).partition(".")[0]


def _said(value: object, home: str, deep: int = 8) -> str:
    """Return a text of the value without what differs from process to process: places in memory, orders of sets."""
    if deep == 0:
        return type(value).__qualname__  # objects may hold each other
    text, parts = _parts(value, home)
    inner = [_said(part, home, deep - 1) for part in parts]
    return f"{text} {sorted(inner) if isinstance(value, set | frozenset) else inner}"


def _parts(value: object, home: str) -> tuple[str, Iterable[object]]:
    """Return what a value is, and the values that it is made of."""
    match value:
        case CodeType() | FunctionType() | MethodType() | type() | partial():
            return _code(value, home)
        case Mapping():
            return "", value.items()
        case set() | frozenset() | list() | tuple():
            return "", value
        case ModuleType():
            return value.__name__, ()
        case Tensor():
            return f"{value.dtype} {value.tolist()}", ()
        case nn.Module():
            own = {name: of for name, of in vars(value).items() if not name.startswith("_")}
            return repr(value), (type(value), own, value.state_dict())
    return _placeless(value), (type(value), vars(value)) if hasattr(value, "__dict__") else ()


def _placeless(value: object) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _code(value: CodeType | FunctionType | MethodType | type | partial[Any], home: str) -> tuple[str, Iterable[object]]:
    """The same for what can be called, or belongs to it."""
    match value:
        case FunctionType() | type() if _package(value) != home:
            return f"{value.__module__}.{value.__qualname__}", ()
        case CodeType():
            return f"{value.co_code.hex()} {value.co_names}", value.co_consts
        case FunctionType():
            captured = inspect.getclosurevars(value).nonlocals.values()
            known = [value.__globals__[name] for name in _globals(value.__code__) if name in value.__globals__]
            return "", (value.__code__, *captured, *known, value.__defaults__, value.__kwdefaults__)
        case MethodType():
            return "", (value.__func__, value.__self__)
        case partial():
            return "", (value.func, value.args, value.keywords)
    own = [(name, of) for name, of in sorted(vars(value).items()) if isinstance(of, FunctionType | int | float)]
    return value.__qualname__, own


def _globals(code: CodeType) -> list[str]:
    """Return the names of globals that code reads, with those that are read in functions within it."""
    found = {str(step.argval) for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    inner = [name for const in code.co_consts if isinstance(const, CodeType) for name in _globals(const)]
    return sorted(found | set(inner))


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
