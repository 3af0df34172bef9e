"""An optimiser of torch with an anchor beside its weights: names, anchors, state dict, and room around the step."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sharpscope.errors import MismatchError, UsageError
from sharpscope.optim import shards
from sharpscope.optim.anchor import (
    ZEROS,
    Parameters,
    Source,
    checked_patterns,
    digest,
    excluded,
    found_for,
    joint_digest,
    placed,
    plain_name,
    tensors_of,
)
from sharpscope.optim.state import by_name, checked_shapes, groups_in


class Anchored(torch.optim.Optimizer):
    """Base of the optimisers here; it stands before an optimiser of torch in the list of bases.

    That optimiser makes the plain step with its own code, so that without a pull every bit is its own.

    Attributes
    ----------
    anchors
        Plain parameter name -> anchor on the parameter's device and in its dtype (this rank's part), None for zeros.
        Excluded parameters are absent. Not part of the state dict, which holds their hashes.
    digests
        Plain parameter name -> hash of the whole anchor as it was given.
    """

    rule: ClassVar[type[torch.optim.Optimizer]]  #: whose step this is
    _own: ClassVar[tuple[str, ...]] = ("anchors", "digests", "_exclude", "_store_anchor", "_source", "_extra")

    _by_row = False  # whether norms of single rows are needed
    anchors: dict[str, Tensor | None]
    digests: dict[str, str]

    def _start(self, anchor: Source, exclude: str | Iterable[str], store_anchor: bool, **extra: float) -> None:
        """Prepare for the parameter groups that the constructor of ``rule`` adds; ``extra`` are their defaults."""
        self.anchors, self.digests = {}, {}
        self._exclude = checked_patterns(exclude)
        self._store_anchor = store_anchor
        self._source = anchor if anchor is None or isinstance(anchor, str) else tensors_of(anchor)
        self._extra = extra

    def _finish(self) -> None:
        """Check what only the whole shows, and let go of the tensors that the anchors were copied from."""
        self.defaults.update(self._extra)
        names = [plain_name(name) for group in self.param_groups for name in group["param_names"]]
        for pattern in self._exclude:
            if not any(excluded(name, (pattern,)) for name in names):
                raise UsageError(f"exclude={pattern!r} matches no parameter", f"names such as {names[0]!r}")
        if isinstance(self._source, Mapping):
            self._source = {}

    @property
    def anchor_hash(self) -> str:
        """One hash of all anchors and their names."""
        return joint_digest(self.digests)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of named parameters, see :meth:`torch.optim.Optimizer.add_param_group`.

        After construction a group brings its own ``"anchor"``, unless the optimiser's is None or ``"init"``.

        Raises
        ------
        UsageError
            If parameters have no names, or two have the same.
        MismatchError
            If a parameter has no anchor or one of another shape; the message names it.
        """
        group = dict(param_group)
        source = tensors_of(group.pop("anchor")) if "anchor" in group else self._source
        names, parameters = _named(group)
        self._check_new(names)
        for key, value in self._extra.items():
            group.setdefault(key, value)
        found = [(name, p, self._wanted(name, p, source)) for name, p in zip(names, parameters, strict=True)]
        super().add_param_group({**group, "params": parameters, "param_names": names})
        for name, parameter, (keep, tensor) in found:
            if keep:
                self.digests[plain_name(name)] = digest(tensor)
                self.anchors[plain_name(name)] = None if tensor is None else placed(tensor, parameter)

    def _check_new(self, names: list[str]) -> None:
        known = [name for group in self.param_groups for name in group["param_names"]]
        count = Counter(map(plain_name, known + names))
        if twice := next((name for name in count if count[name] > 1), None):
            raise UsageError(
                f"two parameters are called {twice!r}, and anchors go by name",
                "names of their own: [(f'image.{name}', p) for name, p in image.named_parameters()]",
            )

    def _wanted(self, name: str, parameter: Tensor, source: Source) -> tuple[bool, Tensor | None]:
        """Return whether the parameter has an anchor, and the tensor to copy it from."""
        if not parameter.is_floating_point():
            raise UsageError(f"parameter {name!r} is {parameter.dtype}", "real floating-point parameters")
        if excluded(plain_name(name), self._exclude):
            return False, None
        shards.check(name, parameter, by_row=self._by_row)
        return True, found_for(plain_name(name), parameter, source)

    def anchor_of(self, name: str, parameter: Tensor) -> Tensor | None:
        """Return the anchor of a parameter, moved to where the parameter is now."""
        anchor, here = self.anchors[name], shards.local(parameter)
        if anchor is not None and (anchor.device != here.device or anchor.dtype != here.dtype):
            anchor = self.anchors[name] = anchor.to(device=here.device, dtype=here.dtype)
        return anchor

    def anchored(self) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
        """Yield group, plain name and parameter of all that have an anchor."""
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if (plain := plain_name(name)) in self.anchors:
                    yield group, plain, parameter

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step; return what the closure returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._before_update()
        # Unwrapped: the step of torch may carry its own hooks, which would run twice.
        inspect.unwrap(self.rule.step)(self)
        self._after_update()
        return loss

    def _before_update(self) -> None:
        """Do what must see the weights before the plain step."""

    def _after_update(self) -> None:
        """Change the weights after the plain step."""

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict; its groups also hold ``anchor_digests``, it the anchors if so asked."""
        found = super().state_dict()
        for group in found["param_groups"]:
            group["anchor_digests"] = [self.digests.get(plain_name(name), "") for name in group["param_names"]]
        if self._store_anchor:
            pairs = ((name, self.anchors[name], parameter) for _, name, parameter in self.anchored())
            found["anchors"] = {n: None if tensor is None else shards.piece_of(tensor, p) for n, tensor, p in pairs}
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state, matched by parameter name.

        Raises
        ------
        UsageError, MismatchError
            If it is no state of such an optimiser, or parameters, shapes or anchors are not those it was saved with.
            Nothing has been changed then.
        """
        groups = by_name(self.param_groups, groups_in(state_dict))
        checked_shapes(self.param_groups, groups, state_dict["state"])
        stored = state_dict.get("anchors")
        if stored is None:
            self._check_digests(groups)
        else:
            stored = {name: self._stored(name, p, stored) for _, name, p in self.anchored()}
        known = _digests_in(groups)
        for mine, group in zip(self.param_groups, groups, strict=True):
            group.pop("anchor_digests", None)
            for key in self._extra:  # a state of the plain optimiser has none of them
                group.setdefault(key, mine[key])
        super().load_state_dict({"state": state_dict["state"], "param_groups": groups})
        for name, (tensor, own) in (stored or {}).items():
            # What was given may have been finer than what is kept beside half-precision weights: its hash stays.
            self.anchors[name], self.digests[name] = tensor, known.get(name) or own

    def _stored(self, name: str, parameter: Tensor, stored: Mapping[str, Tensor | None]) -> tuple[Tensor | None, str]:
        """Return a stored anchor where the parameter is, and the hash of the whole."""
        if name in stored and stored[name] is None:
            return None, ZEROS
        tensor = found_for(name, parameter, {n: t for n, t in stored.items() if t is not None})
        return None if tensor is None else placed(tensor, parameter), digest(tensor)

    def _check_digests(self, groups: list[dict[str, Any]]) -> None:
        for group in groups:
            theirs = group.get("anchor_digests")
            if theirs is None:
                warnings.warn("the state was saved without anchors: they cannot be verified", stacklevel=3)
                continue
            for name, old in zip(map(plain_name, group["param_names"]), theirs, strict=True):
                new = self.digests.get(name, "")
                if old != new:
                    raise MismatchError(
                        f"the anchor of {name!r} is not the one that the state was saved with "
                        f"({_short(old)} then, {_short(new)} now)",
                        "the anchor of that run; for anchor='init' build the optimiser on the initial weights",
                    )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in self._own}}


def _digests_in(groups: list[dict[str, Any]]) -> dict[str, str]:
    """Return the hashes of anchors that saved groups hold, by plain name."""
    pairs = ((group["param_names"], group.get("anchor_digests", ())) for group in groups)
    return {plain_name(name): mark for names, marks in pairs for name, mark in zip(names, marks, strict=bool(marks))}


def _short(found: str) -> str:
    return {"": "excluded", ZEROS: ZEROS}.get(found, found[:12])


def _named(group: dict[str, Any]) -> tuple[list[str], list[Tensor]]:
    items = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    if all(isinstance(item, tuple) for item in items):
        return [name for name, _ in items], [parameter for _, parameter in items]
    if len(names := list(group.get("param_names", ()))) == len(items):
        return names, items
    raise UsageError(
        "the parameters have no names, by which anchors are found",
        "model.named_parameters() instead of model.parameters(); in groups {'params': [(name, parameter), ...]}",
    )


def as_groups(params: Parameters) -> list[dict[str, Any]]:
    """Return parameter groups of named parameters, or groups of them, as torch of any version takes them.

    Raises
    ------
    UsageError
        If there are no parameters.
    """
    found = type(params).__name__
    if isinstance(params, nn.Module | Mapping) or not isinstance(params, Iterable):
        raise UsageError(f"the parameters are a {found}", "model.named_parameters(), or a list of groups of them")
    items: list[Any] = list(params)
    if not items:
        raise UsageError("there are no parameters to optimise", "model.named_parameters()")
    return [dict(item) for item in items] if isinstance(items[0], dict) else [{"params": items}]
