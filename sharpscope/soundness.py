"""Are derivatives of the network those of the function that it is? Tried on two examples, before anything is measured.

Two ways to be silently wrong. A forward that checkpoints activations runs again while gradients are computed, when the
weights that it was called with are no longer in the module. And operations have second derivatives that are wrong,
where a backward computes on what it takes for constant: then the Hessian is not symmetric.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sharpscope.curvature.gradient import plain_graph
from sharpscope.curvature.recorded import shortened
from sharpscope.errors import ModelError
from sharpscope.network import Network, logits
from sharpscope.objective import Forward, Objective
from sharpscope.precision import matmul_precision
from sharpscope.tree import Tree, dot, gaussian, norm, rademacher

AWAY = 1 / 16  # share of every weight by which it is moved, so that the module's own are others
# Of sound networks in float32, saturated ones too: gradients differ by 0, products by 3e-6 at most. Of weight norm as
# torch has it in one layer of eight: 2e-5 to 1e-3, in one of two: 5e-2 and more.
LIMIT = 1e-4
_CHECKPOINTING = (
    "if it checkpoints activations, turn that off: model.gradient_checkpointing_disable(), "
    "model.set_grad_checkpointing(False), or how else it was turned on"
)


def check_derivatives(
    objective: Objective, network: Network, weights: Tree, names: Sequence[str], curved: bool
) -> None:
    """Raise unless gradients, and products with the Hessian if it is wanted, are right.

    Parameters
    ----------
    objective
        Of which two or three examples are taken.
    network
        Whose forward is the objective's.
    weights, names
        All tensors, and those that are differentiated; tried at weights near to these.
    curved
        Whether second derivatives are wanted.

    Raises
    ------
    ModelError
        If they are not.

    Notes
    -----
    Cost: a forward and two gradients of these examples; two products. Where there is no memory for that with a single
    example, nothing is tried: a scan may still get by with less. Nor is it where the model fails at weights moved like
    that, as a matrix that must be positive definite does.
    """
    batch = objective.batches[0]
    for pieces in (max(len(batch.targets) // 2, 1), len(batch.targets)):
        try:
            _check(replace(objective, batches=(batch.split(pieces)[0],)), network, weights, names, curved)
        except torch.OutOfMemoryError:
            continue
        return


def near(weights: Tree, names: Sequence[str]) -> Tree:
    """Return weights of which the named ones are moved by :data:`AWAY`."""
    signs = rademacher({name: weights[name] for name in names}, "soundness")
    return {**weights, **{name: weights[name] * (1 + AWAY * sign) for name, sign in signs.items()}}


def _check(few: Objective, network: Network, weights: Tree, names: Sequence[str], curved: bool) -> None:
    moved = near(weights, names)
    with matmul_precision("highest"):  # in TF32 products are as asymmetric as it rounds
        if not _runs(few, moved):
            return
        check_gradient(few, network, moved, names)
        if curved and (gap := _unsaturated_asymmetry(few, moved, names)) > LIMIT:
            raise ModelError(
                f"the model's Hessian is not symmetric, by {gap:.1g} of a product: a second derivative in it is wrong",
                "operations that torch differentiates twice, in place of a fused kernel or an autograd.Function of "
                "one's own whose backward is not differentiable, and no autocast in the forward; m_sharpness needs "
                "first derivatives only",
            )


def _runs(objective: Objective, weights: Tree) -> bool:
    """Return whether the model takes the weights: a factor of a matrix, or a probability, may not be moved."""
    try:
        objective(weights)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError):
        return False
    return True


def check_gradient(objective: Objective, network: Network, weights: Tree, names: Sequence[str]) -> None:
    """Raise unless the gradient is the one that is computed while the weights are in the module."""
    leaves = {name: weights[name].detach().requires_grad_() for name in names}
    batch, inside = objective.batches[0], list[Tree]()

    def gradient(loss: Tensor) -> Tree:
        found = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
        return {name: tensor for name, tensor in zip(leaves, found, strict=True) if tensor is not None}

    def within(_module: object, _inputs: object, outputs: object) -> None:
        inside.append(gradient(objective.loss(logits(outputs), batch.targets) / objective.examples))

    try:
        handle = network.module.register_forward_hook(within)
        try:
            with torch.enable_grad():
                loss = objective.part({**weights, **leaves}, batch)
        finally:
            handle.remove()
        outside = gradient(loss)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as refusal:
        raise ModelError(
            f"the model's gradient cannot be computed: {shortened(refusal)}",
            _CHECKPOINTING,
        ) from refusal
    if not inside:  # a __call__ of its own, which knows no hooks
        return
    true = inside[-1]  # the outermost call, where a module calls itself
    gap = norm({name: outside[name] - true[name] for name in true}) if true.keys() == outside.keys() else float("inf")
    if gap > LIMIT * norm(true):
        raise ModelError(
            "the model's forward runs again while its gradient is computed, then with its own weights instead of those "
            f"it was given: the gradient is wrong by {gap / max(norm(true), 1e-300):.1g} of it",
            _CHECKPOINTING,
        )


def asymmetry(product: Callable[[Tree], Tree], like: Tree) -> float:
    """Return ``|u . Hv - v . Hu| / max(|Hu|, |Hv|)`` for standard normal u and v, of order 1 if H were any matrix.

    The product's tensors are those of ``like``, where they are not zero.

    Not divided by the length of u: ``u . Hv`` is of the order of ``|Hv|`` however many weights there are.
    """
    u, v = (gaussian(like, "verify", side) for side in "uv")
    hu, hv = product(u), product(v)
    size = max(norm(hu), norm(hv))
    return abs(dot(hv, u) - dot(hu, v)) / size if size else 0.0


def _unsaturated_asymmetry(objective: Objective, weights: Tree, names: Sequence[str]) -> float:
    """Return the asymmetry with outputs scaled to a largest of 1, or else of 1/100: near a loss of 0 all is rounding.

    The second is for losses that scale by themselves. Not by a point: on a GPU that would compile its kernels once
    more, for full float32.
    """
    gap = 0.0
    with torch.no_grad():
        largest = float(objective.outputs(weights, objective.batches[0].inputs).abs().max()) or 1.0
    for scale in (1 / largest, 0.01 / largest):
        graph = plain_graph(replace(objective, forward=_Scaled(objective.forward, scale)), weights, names)
        gap = asymmetry(partial(graph.product, tuple(graph.gradient)), graph.gradient)
        if gap <= LIMIT:
            break
    return gap


@dataclass(frozen=True)
class _Scaled:
    """A forward whose outputs are scaled."""

    forward: Forward
    scale: float

    def __call__(self, weights: Tree, inputs: Any) -> Tensor:
        return self.forward(weights, inputs) * self.scale
