"""A saved optimiser state, brought into the order of the parameters it is loaded into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sharpscope.errors import MismatchError, UsageError
from sharpscope.optim.anchor import plain_name

Group = dict[str, Any]
# What Adam and SGD are told apart by; torch loads either into the other, and the next step fails.
_OF_RULE = ("betas", "momentum")


def groups_in(state: Any) -> Sequence[Mapping[str, Any]]:
    """Return the parameter groups of a saved state.

    Raises
    ------
    UsageError
        If it is the state of no optimiser, as a whole checkpoint is not.
    """
    if isinstance(state, Mapping) and {"state", "param_groups"} <= state.keys():
        return list(state["param_groups"])
    held = f"keys {sorted(map(str, state))}" if isinstance(state, Mapping) else f"a {type(state).__name__}"
    raise UsageError(
        f"this is no state of an optimiser: it has {held}", "what state_dict() gave: checkpoint['optimizer']"
    )


def by_name(current: Sequence[Group], saved: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Return the saved groups with their parameters in the order of the current ones.

    Torch matches by position; two models that name the same tensors in another order would swap their moments.
    A state without names is matched by position too.

    Raises
    ------
    MismatchError
        If the groups do not hold the same names, or the state is of an optimiser of another rule; the message gives
        the first that is missing.
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
    if lost := next((option for option in _OF_RULE if option in mine and option not in theirs), None):
        raise MismatchError(
            f"group {index} of the saved state has no {lost!r}: it is of an optimiser of another rule",
            "a state of the same optimiser, or of the one of torch that it is made of",
        )
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
