"""Forwards that differ from one forward in a few tensors: what comes before those tensors is not computed again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sharpscope.network import Network
from sharpscope.partition import container_names, partition
from sharpscope.tree import Tree


class _Call(NamedTuple):
    """One call of a module as it was recorded."""

    inputs: tuple[Any, dict[str, Any]]
    outputs: Any
    versions: tuple[tuple[Tensor, int], ...]


class Replay:
    """A network that remembers one forward at base weights and answers for weights that differ in a few tensors.

    A module that holds none of the moved tensors, and whose inputs are bit for bit those of the recorded call, gives
    the recorded output. Inputs are compared, never assumed, so networks of any order of execution are right: where
    nothing can be reused, everything is computed. What this cannot see is a module that reads tensors it does not
    hold; :meth:`agrees` compares with the full forward.

    Parameters
    ----------
    network
        The network as a function of its weights.

    Notes
    -----
    Memory: inputs and outputs of every block for one batch. Time: from the first moved block on.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._holds = _holders(network)
        self._tape: dict[str, list[_Call]] = {}

    @torch.no_grad()
    def record(self, weights: Tree, inputs: Any) -> Tensor:
        """Return the logits at the base weights and remember how they came about."""
        self._tape = {name: [] for name in self._holds}

        def remember(name: str, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
            before = _versions((args, kwargs))
            outputs = forward(*args, **kwargs)
            self._tape[name].append(_Call((args, kwargs), outputs, (*before, *_versions(outputs))))
            return outputs

        with self._patched(remember):
            logits = self._network.forward(weights, inputs)
        for name, calls in self._tape.items():
            # A tensor written in place since then is no longer what the module was given or gave.
            whole = all(tensor._version == version for call in calls for tensor, version in call.versions)
            self._tape[name] = calls if whole else []
        return logits

    @torch.no_grad()
    def __call__(self, weights: Tree, inputs: Any, moved: Collection[str]) -> Tensor:
        """Return the logits at weights that differ from the recorded ones in the ``moved`` tensors at most."""
        seen: Counter[str] = Counter()

        def recall(name: str, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
            calls, index = self._tape[name], seen[name]
            seen[name] += 1
            known = index < len(calls) and self._holds[name].isdisjoint(moved)
            if known and _same((args, kwargs), calls[index].inputs):
                return calls[index].outputs
            return forward(*args, **kwargs)

        with self._patched(recall):
            return self._network.forward(weights, inputs)

    @torch.no_grad()
    def agrees(self, weights: Tree, inputs: Any, moved: Collection[str]) -> bool:
        """Return whether the answer is that of a full forward, bit for bit. Cost: a full forward besides."""
        return torch.equal(self(weights, inputs, moved), self._network.forward(weights, inputs))

    @contextmanager
    def _patched(self, call: Callable[[str, Callable[..., Any], Any, dict[str, Any]], Any]) -> Iterator[None]:
        """Let ``call`` stand before the forward of every holder inside the block."""
        modules = {name: self._network.module.get_submodule(name) for name in self._holds}
        own = {name: module.__dict__["forward"] for name, module in modules.items() if "forward" in module.__dict__}
        try:
            for name, module in modules.items():
                module.forward = _before(call, name, module.forward)
            yield
        finally:
            for name, module in modules.items():
                module.__dict__.pop("forward", None)
                module.__dict__.update({"forward": own[name]} if name in own else {})


def _before(call: Callable[..., Any], name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: call(name, forward, args, kwargs)


def _holders(network: Network) -> Mapping[str, frozenset[str]]:
    """Return the largest modules that hold tensors of one block only, with the names of all tensors they hold."""
    module, names = network.module, list(network.parameters)
    home = partition(names, granularity="block", containers=container_names(module)).layers
    layer = {name: layer for layer, mine in home.items() for name in mine}
    known = {id(tensor): name for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    found: dict[str, frozenset[str]] = {}
    for name, sub in module.named_modules():
        if not name or any(name.startswith(f"{outer}.") for outer in found) or not _replaceable(sub):
            continue
        held = frozenset(known[id(tensor)] for tensor in [*sub.parameters(), *sub.buffers()])
        if len({layer[tensor] for tensor in held if tensor in layer}) == 1:
            found[name] = held
    return found


def _replaceable(module: nn.Module) -> bool:
    return not isinstance(module, torch.jit.ScriptModule) and not isinstance(module, nn.ModuleList | nn.ModuleDict)


def _versions(found: Any) -> tuple[tuple[Tensor, int], ...]:
    if isinstance(found, Tensor):
        return ((found, found._version),)
    parts = found.values() if isinstance(found, Mapping) else found if isinstance(found, tuple | list) else ()
    return tuple(pair for part in parts for pair in _versions(part))


def _same(a: Any, b: Any) -> bool:
    """Return whether two arguments are certainly equal."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    return isinstance(a, str | int | float | bool | torch.dtype) and bool(a == b)
