"""What functions with a derivative of their own ask of the pass through the graph that they run in.

A product walks a gradient's graph: up through the functions of the first backward, in the order of the layers, then
down through those of the forward. Both give derivatives by the activations, which autograd would add up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def unheard(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose calls of torch no mode takes for those of a model."""

    @wraps(function)
    def called(*arguments: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*arguments)

    return called


def _runs(node: Any) -> bool:
    return bool(torch._C._will_engine_execute_node(node))


def goes_on(ctx: Any, place: int) -> bool:
    """Return whether the derivatives that are computed now ask for the one by an argument, or for what it comes from.

    A block's product needs no derivative by the weights of the layers above; torch's own functions look as well.
    """
    if place >= len(ctx.next_functions):  # the last one was no tensor
        return False
    node = ctx.next_functions[place][0]
    return node is not None and _runs(node)


def leave(node: Any, *parts: Tensor) -> tuple[Tensor | None, ...]:
    """Return derivatives by arguments of the forward's function; left to it where its turn is yet to come, None.

    ``node`` is the function's context. It adds them to its own while these are written, which saves a pass over
    memory. Its turn comes later: on the way up, what it gave is differentiated before anything that has its output.
    """
    if not _runs(node):
        return parts
    node.left = parts
    return (None,) * len(parts)


def left(ctx: Any) -> tuple[Tensor, ...] | None:
    """Return what was left to this function in this pass."""
    found: tuple[Tensor, ...] | None = getattr(ctx, "left", None)
    ctx.left = None
    return found
