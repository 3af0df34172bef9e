"""A saved optimiser state, brought into the order of the parameters it is loaded into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sharpscope.errors import MismatchError
from sharpscope.optim.anchor import plain_name

Group = dict[str, Any]


def by_name(current: Sequence[Group], saved: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Return the saved groups with their parameters in the order of the current ones.

    Torch matches by position; two models that name the same tensors in another order would swap their moments.
    A state without names is matched by position too.

    Raises
    ------
    MismatchError
        If the groups do not hold the same names; the message gives the first that is missing.
    """
    if len(current) != len(saved):
        raise MismatchError(
            f"the state has {len(saved)} parameter groups, the optimiser {len(current)}",
            "the same groups as when saved",
        )
    return [
        _reordered(index, mine, dict(theirs)) for index, (mine, theirs) in enumerate(zip(current, saved, strict=True))
    ]


def _reordered(index: int, mine: Group, theirs: Group) -> Group:
    names = [plain_name(name) for name in mine["param_names"]]
    place = {plain_name(name): i for i, name in enumerate(theirs.get("param_names") or mine["param_names"])}
    if missing := [name for name in [*names, *place] if name not in place or name not in names]:
        raise MismatchError(
            f"parameter {missing[0]!r} of group {index} is only in "
            f"{'the saved state' if missing[0] in place else 'the optimiser'}",
            "the model and the groups that the state was saved with",
        )
    if len(theirs["params"]) != len(names):
        raise MismatchError(
            f"parameter group {index} has {len(theirs['params'])} tensors in the saved state, {len(names)} now",
            "the model and the groups that the state was saved with",
        )
    found = {**theirs, "params": [theirs["params"][place[name]] for name in names], "param_names": mine["param_names"]}
    if "anchor_digests" in theirs:
        found["anchor_digests"] = [theirs["anchor_digests"][place[name]] for name in names]
    return found


def checked_shapes(current: Sequence[Group], saved: Sequence[Group], state: Mapping[Any, Any]) -> None:
    """Raise unless every tensor of the state has the shape of its parameter.

    Raises
    ------
    MismatchError
        Naming the parameter.
    """
    for mine, theirs in zip(current, saved, strict=True):
        for name, parameter, key in zip(mine["param_names"], mine["params"], theirs["params"], strict=True):
            for what, value in state.get(key, {}).items():
                if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                    raise MismatchError(
                        f"parameter {name!r} is {tuple(parameter.shape)}, "
                        f"its {what} in the saved state {tuple(value.shape)}",
                        "the model that the state was saved with",
                    )
