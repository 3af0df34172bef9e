"""Does the model keep what an earlier call computed from its weights? Along the path that would stay as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sharpscope.errors import ModelError
from sharpscope.network import MODULE_PARTS, Network
from sharpscope.objective import Objective
from sharpscope.soundness import near
from sharpscope.tree import Tree

_Run = Callable[[Tree], object]  # a forward at weights


@dataclass(frozen=True)
class _Held:
    """An attribute of a submodule with tensors that are no weights."""

    name: str  # with the submodule's
    owner: dict[str, Any]
    attribute: str

    @property
    def tensors(self) -> list[Tensor]:
        return _tensors(self.owner[self.attribute])


def check_caches(objective: Objective, network: Network, weights: Tree, names: Sequence[str]) -> None:
    """Raise if the forward uses tensors that it would compute from the named weights, were they not there already.

    Found by taking each away: what the forward then puts there again, from the weights, was kept of an earlier call, as
    LeViT keeps its attention biases once it was called in evaluation mode. A tensor that it does not put back, and one
    that it draws at random, are part of the model.

    Cost: nothing where no submodule holds tensors beside its weights, else up to five forwards of two or three examples
    for each.

    Raises
    ------
    ModelError
        Naming the attribute.
    """
    batch = objective.batches[0]
    inputs = batch.split(max(len(batch.targets) // 2, 1))[0].inputs

    def run(here: Tree) -> object:
        leaves = {name: here[name].detach().requires_grad_() for name in names}
        with torch.enable_grad():
            return objective.outputs({**here, **leaves}, inputs)

    for held in _all_held(network.module):
        if _is_cache(held, network.module, run, weights, near(weights, names)):
            raise ModelError(
                f"{held.name} holds what an earlier call of the model computed from its weights: outputs would not "
                "follow the weights along the path",
                "model.train() and then model.eval() before the scan, which empty it in models of timm and "
                "transformers; else empty it, or scan before the model is called",
            )


def _all_held(module: nn.Module) -> list[_Held]:
    return [
        _Held(f"{prefix}.{name}".lstrip("."), vars(sub), name)
        for prefix, sub in module.named_modules()
        for name, value in vars(sub).items()
        if name not in MODULE_PARTS and _tensors(value)
    ]


def _tensors(value: object, deep: int = 4) -> list[Tensor]:
    """Return the tensors that are no parameters: the value itself, or those in it."""
    if isinstance(value, dict | list | tuple):
        members = (value.values() if isinstance(value, dict) else value) if deep else ()  # they may hold each other
        return [tensor for member in members for tensor in _tensors(member, deep - 1)]
    return [value] if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) else []


def _is_cache(held: _Held, module: nn.Module, run: _Run, weights: Tree, moved: Tree) -> bool:
    """Return whether the forward takes the tensors as they are, and makes them of the weights where there are none."""
    before = held.tensors
    after = _left_by(held, module, run, weights)
    if [*map(id, after)] != [*map(id, before)]:  # written at every call, as pruning does
        return False
    made = _made_by(held, module, run, weights)
    if any(tensor.requires_grad for tensor in made):
        return True
    other, again = (_made_by(held, module, run, moved) for _ in range(2))
    return bool(made and other) and _equal(other, again) and not _equal(other, made)


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def _left_by(held: _Held, module: nn.Module, run: _Run, weights: Tree) -> list[Tensor]:
    """Return the tensors that are there when a forward ends, none where it fails."""
    left: list[Tensor] = []
    handle = module.register_forward_hook(lambda *_: left.__setitem__(slice(None), held.tensors))
    try:
        run(weights)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a model does without a tensor of its own
        return []
    finally:
        handle.remove()
    return left


def _made_by(held: _Held, module: nn.Module, run: _Run, weights: Tree) -> list[Tensor]:
    """Return the tensors that a forward puts there where there are none."""
    value = held.owner[held.attribute]
    try:
        held.owner[held.attribute] = type(value)() if isinstance(value, dict | list) else None
        return _left_by(held, module, run, weights)
    finally:
        held.owner[held.attribute] = value
