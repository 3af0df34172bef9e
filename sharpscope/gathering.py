"""A network whose weights are spread over processes: each block's are gathered while it computes, and let go.

torch's ``fully_shard`` cannot be differentiated twice: with ``create_graph=True`` its gradients come without a graph,
and ``autograd.grad`` finds none at all. So the shards are gathered by functions that can (:mod:`sharpscope.sharding`),
and products with the Hessian are exact. Of a gathered weight autograd saves not the weight but how to gather it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from sharpscope.errors import ModelError
from sharpscope.network import Network, logits
from sharpscope.partition import container_names
from sharpscope.sharding import Examples, cut, is_shard, local, mesh_of, shard_of, whole
from sharpscope.tree import Tree


class Gatherings:
    """Which storages hold gathered weights, and of which shards: a saved one can be let go and gathered again."""

    def __init__(self) -> None:
        # Weak, yet the address of a storage is not used again while there is a reference to it.
        self._known: dict[int, tuple[StorageWeakRef, Tensor]] = {}

    def gathered(self, shard: Tensor) -> Tensor:
        """Return the whole tensor, remembering what it was made of."""
        found = whole(shard)
        storage = found.untyped_storage()
        self._known[storage._cdata] = (StorageWeakRef(storage), shard.detach())  # type: ignore[no-untyped-call]
        return found

    def forget(self) -> None:
        """Drop what is no more."""
        self._known = {key: entry for key, entry in self._known.items() if not entry[0].expired()}  # type: ignore[no-untyped-call]

    def kept(self, tensor: Tensor) -> Callable[[], Tensor] | None:
        """Return how to make the tensor again, if it is a view of a gathered weight."""
        known = None if is_shard(tensor) else self._known.get(tensor.untyped_storage()._cdata)
        if known is None:
            return None
        shape, stride, offset, shard = tensor.shape, tensor.stride(), tensor.storage_offset(), known[1]

        def again() -> Tensor:
            return self.gathered(shard).as_strided(shape, stride, offset)

        return again


class _Slot(NamedTuple):
    """Where a weight goes in a module."""

    module: nn.Module
    leaf: str
    name: str  # of the tensor in the weights


@dataclass(frozen=True)
class ShardedNetwork(Network):
    """A module in evaluation mode whose parameters are shards; its forward takes and gives all examples.

    Every process computes on its share of the examples, and all have all logits: what is made of those is the same in
    all processes. Collective, as everything that is made of shards.

    Parameters
    ----------
    gatherings
        Of the weights of blocks.
    """

    gatherings: Gatherings
    examples: Examples
    weights: dict[str, Tensor]  # of the forward under way

    def forward(self, weights: Mapping[str, Tensor], inputs: Any) -> Tensor:
        """Return the logits ``(n, classes)``, those of the plain network."""
        self.gatherings.forget()
        self.weights.update(weights)
        try:
            own = logits(self.module(self.examples.own(inputs)))
        finally:
            self.weights.clear()
        return self.examples.all(own, len(inputs))


def sharded(network: Network, module: nn.Module, mesh: Any) -> ShardedNetwork:
    """Return the network on shards: a copy of the module, without weights, whose blocks gather theirs.

    The module is one that :func:`torch.distributed.fsdp.fully_shard` was applied to, block by block, or a plain one; a
    block is what is wrapped, or else a member of a list of modules. What is in no block is gathered for all the time.
    """
    wrapped = {name for name, sub in module.named_modules() if _is_wrapped(sub)}
    containers = container_names(module)
    blocks = wrapped or {
        f"{above}.{child}".lstrip(".")
        for above in containers
        for child, _ in module.get_submodule(above).named_children()
    }
    bare = _bare(module, {})
    gatherings, weights = Gatherings(), dict[str, Tensor]()
    owners = {id(parameter): name for name, parameter in module.named_parameters()}
    slots: dict[str, list[_Slot]] = {}
    for name, sub in bare.named_modules(remove_duplicate=False):
        block = next((above for above in _above(name) if above in blocks), "")
        for table in (sub._parameters, sub._buffers):
            for leaf, tensor in table.items():
                if tensor is not None:
                    key = owners.get(id(tensor), f"{name}.{leaf}".lstrip("."))
                    slots.setdefault(block, []).append(_Slot(sub, leaf, key))
    for block, mine in slots.items():
        _gathering(bare.get_submodule(block), mine, weights, gatherings)
    return ShardedNetwork(bare, network.parameters, network.buffers, gatherings, Examples(mesh), weights)


def _above(name: str) -> Iterator[str]:
    """Yield the name and those of the modules it lies in, innermost first."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _gathering(block: nn.Module, slots: list[_Slot], weights: Mapping[str, Tensor], gatherings: Gatherings) -> None:
    """Make the block gather its weights before it computes, and let go of them after."""

    def before(*_: object) -> None:
        found: dict[str, Tensor] = {}
        for module, leaf, name in slots:
            if name in weights:
                given = weights[name]
                found.setdefault(name, gatherings.gathered(given) if is_shard(given) else given)
                _table(module, leaf)[leaf] = found[name]

    def after(*_: object) -> None:
        for module, leaf, name in slots:
            if name in weights:
                _table(module, leaf)[leaf] = None

    block.register_forward_pre_hook(before)
    block.register_forward_hook(after, always_call=True)


def _table(module: nn.Module, leaf: str) -> dict[str, Any]:
    return module._parameters if leaf in module._parameters else module._buffers


def _is_wrapped(module: nn.Module) -> bool:
    return "FSDPModule" in {kind.__name__ for kind in type(module).__mro__}


def _bare(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """Return a copy of the tree of modules on the same tensors, without the classes and hooks of ``fully_shard``."""
    if id(module) not in done:
        kinds: Any = type(module).__mro__
        kind = kinds[2] if _is_wrapped(module) else kinds[0]
        copy = done[id(module)] = kind.__new__(kind)
        copy.__dict__.update(module.__dict__)
        for name, table in module.__dict__.items():
            if name in ("_parameters", "_buffers"):
                copy.__dict__[name] = dict(table)
            elif name == "_modules":
                copy.__dict__[name] = {n: sub if sub is None else _bare(sub, done) for n, sub in table.items()}
            elif name.endswith("_hooks"):
                own = {k: h for k, h in table.items() if not getattr(h, "__module__", "").startswith("torch.dist")}
                copy.__dict__[name] = type(table)(own)
    return done[id(module)]


def checked_mesh(parameters: Tree) -> Any:
    """Return the mesh that the parameters are sharded over, None if they are plain tensors.

    Raises
    ------
    ModelError
        If some are plain and some are not, or they are not spread as ``fully_shard`` over all processes does.
    """
    mesh = mesh_of(parameters.values())
    for name, tensor in parameters.items() if mesh else ():
        placements: Any = getattr(tensor, "placements", ())
        plain = len(placements) == 1 and (placements[0].is_replicate() or placements[0].is_shard(0))
        if not plain or tensor.device_mesh != mesh or mesh.size() != torch.distributed.get_world_size():  # type: ignore[attr-defined]
            raise ModelError(
                f"{name!r} is spread as {placements or 'a plain tensor'}, not in rows over all processes",
                "fully_shard on every block, then on the model, with a mesh of one axis that holds every process",
            )
    return mesh


class _Kind(NamedTuple):
    """What a shard is a shard of."""

    device_mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size


def spread(tree: Tree, mesh: Any) -> Tree:
    """Return plain tensors, which every process has, in shards on the device of the mesh; scalars stay whole."""
    from torch.distributed.tensor import Replicate, Shard

    kinds = {n: _Kind(mesh, (Shard(0) if t.ndim else Replicate(),), t.shape) for n, t in tree.items()}
    return {name: cut(tensor, kinds[name]) for name, tensor in tree.items()}  # type: ignore[arg-type]


class Offloaded(Mapping[str, Tensor]):
    """Tensors that are kept in the memory of the host and come to the device one at a time, when asked for.

    Shards come as shards, of which each process keeps its own part.
    """

    def __init__(self, tree: Tree, device: torch.device) -> None:
        self._device = device
        self._parts = {name: local(tensor).cpu() for name, tensor in tree.items()}
        self._kinds = {
            name: _Kind(tensor.device_mesh, tensor.placements, tensor.shape)  # type: ignore[attr-defined]
            for name, tensor in tree.items()
            if is_shard(tensor)
        }

    def __getitem__(self, name: str) -> Tensor:
        part = self._parts[name].to(self._device)
        return shard_of(part, self._kinds[name]) if name in self._kinds else part  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)
