"""Models against each other and data against the models: checked before a scan starts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sharpscope.agreement import check_same_forward
from sharpscope.batches import check_taken
from sharpscope.budget import GraphBytes, pieces_for
from sharpscope.caches import check_caches
from sharpscope.capacity import free_bytes
from sharpscope.curvature.point import Point
from sharpscope.curvature.workspace import Workspace
from sharpscope.data import Split
from sharpscope.device import own_device
from sharpscope.errors import MismatchError, ModelError, UsageError
from sharpscope.evaluate import class_count
from sharpscope.gathering import Offloaded, ShardedNetwork, checked_mesh, sharded, spread
from sharpscope.job import Job
from sharpscope.losses import Towers
from sharpscope.merging.scanned import on_disk
from sharpscope.network import Network, network
from sharpscope.objective import Objective, check_additive, check_deterministic, check_differentiable, check_finite
from sharpscope.pairs import differentiated
from sharpscope.partition import Partition, batch_norms, container_names, partition
from sharpscope.path import Path
from sharpscope.plan import Plan, path_notes
from sharpscope.ranks import ALONE, Parallel, Ranks, mesh_over
from sharpscope.sharding import is_shard, local, shard_of
from sharpscope.soundness import check_derivatives
from sharpscope.tree import Tree, check_same_structure, select

MEANS = ("mean OOD", "ood mean")  # names of means over sets, in the page and in tables
ROLES = ("the zero-shot model", "the fine-tuned model")


def _modules(
    models: tuple[Any, Any], classes: Sequence[str] | None, objective: Towers
) -> tuple[tuple[Any, Any], tuple[str, str], list[str]]:
    """Return two classifiers, their names and notes: the modules, or made of what :func:`sharpscope.load` returned."""
    loaded = [hasattr(model, "preprocess") and not isinstance(model, nn.Module) for model in models]
    if any(loaded) and not all(loaded):
        other = models[loaded.index(False)]
        raise ModelError(
            f"{ROLES[loaded.index(True)]} was loaded, {ROLES[loaded.index(False)]} is a {type(other).__name__}",
            "sharpscope.load(REF) for both, or two modules whose forward gives logits",
        )
    if any(isinstance(model, nn.Module) for model in models) or not all(hasattr(m, "preprocess") for m in models):
        if objective != "image":
            raise UsageError(
                f"objective={objective!r} needs both towers of two CLIPs, a {type(models[0]).__name__} gives logits",
                "sharpscope.load(REF) for both models",
            )
        return models, (type(models[0]).__name__, type(models[1]).__name__), []
    from sharpscope.models.compatibility import pair  # reads checkpoints, only where it is needed

    start, end, notes = pair(*models, classes, objective)
    return (start, end), (models[0].name, models[1].name), notes


def in_shards(*models: Any) -> bool:
    """Return whether the models are in shards.

    Raises
    ------
    ModelError
        If one is and the other is not.
    """
    found = [isinstance(m, nn.Module) and any(map(is_shard, m.parameters())) for m in models]
    if any(found) and not all(found):
        raise ModelError(
            f"{ROLES[found.index(True)]} is in shards and {ROLES[found.index(False)]} is not",
            "fully_shard both, or neither and parallel='weights'",
        )
    return any(found)


def _ends(networks: tuple[Network, Network]) -> tuple[Path, Tree, list[str]]:
    """Return the path, the constant buffers, and a warning if buffers lie on the path."""
    first, second = networks
    _check_ties(networks)
    check_same_structure(first.buffers, second.buffers, ROLES)
    moving = [n for n, b in first.buffers.items() if b.is_floating_point() and not torch.equal(b, second.buffers[n])]
    path = Path(
        {**first.parameters, **select(first.buffers, moving)}, {**second.parameters, **select(second.buffers, moving)}
    )
    notes = []
    if moving:
        wrong = (
            "batch-norm statistics are wrong between the ends without recalibration"
            if any(name.rpartition(".")[0] in batch_norms(first.module) for name in moving)
            else "what was computed from the weights at the ends may be wrong between them"
        )
        notes.append(
            f"{len(moving)} buffers differ between the models ({moving[0]}, ...) and are interpolated; {wrong}"
        )
    return path, {n: b for n, b in first.buffers.items() if n not in moving}, notes


def _check_ties(networks: tuple[Network, Network]) -> None:
    """Raise if a tensor is another one's in one model and its own in the other: by names it would only be missing."""
    first, second = networks
    for one, other, roles in ((first, second, ROLES), (second, first, ROLES[::-1])):
        if tied := next((n for n in other.parameters if n in one.ties and n not in one.parameters), None):
            raise MismatchError(
                f"{tied!r} is tied to {one.ties[tied]!r} in {roles[0]} and has weights of its own in {roles[1]}",
                "tie it in both or in neither: a parameter of its own, nn.Parameter(weight.detach().clone())",
            )


def _moved(tree: Tree, device: torch.device) -> Tree:
    return {
        name: shard_of(local(tensor).to(device), tensor) if is_shard(tensor) else tensor.to(device)
        for name, tensor in tree.items()
    }


def _placed(
    path: Path, first: Network, module: nn.Module, place: torch.device, parallel: Parallel, objective: Towers
) -> tuple[Path, Network | ShardedNetwork]:
    """Return the path on the device, in shards where ranks share the weights, and the network that computes on it."""
    if parallel != "weights":
        return Path(_moved(path.start, place), _moved(dict(path.end), place)), first
    if objective != "image":
        raise UsageError(f"objective={objective!r} on weights in shards", "parallel='data', or objective='image'")
    return _spread(path, first, module, place)


def _spread(path: Path, first: Network, module: nn.Module, place: torch.device) -> tuple[Path, ShardedNetwork]:
    """Return the path in shards, its end in the host's memory, and the network that computes on shards."""
    mesh = checked_mesh(first.parameters) or mesh_over(place)
    plain = {name for name in path.start if not is_shard(path.start[name])} & first.parameters.keys()

    def shards(tree: Mapping[str, Tensor]) -> Tree:
        return {**tree, **spread(select(dict(tree), [name for name in tree if name in plain]), mesh)}

    return Path(_moved(shards(path.start), place), Offloaded(shards(path.end), place)), sharded(first, module, mesh)


def prepare(
    models: tuple[Any, Any],
    id_split: Split,
    ood: list[Split],
    curvature: Split,
    plan: Plan,
    patterns: Mapping[str, str] | None,
    device: str | None,
    ranks: Ranks = ALONE,
    parallel: Parallel = "data",
    memory: int | None = None,
) -> Job:
    """Return the job, after checking models against each other and the data against the models.

    With ``parallel="data"`` the ranks measure every alpha together, with ``"weights"`` each holds a part of them.

    Cost: three forwards and one gradient of a batch, a forward per split, and what checks of derivatives take on two
    examples.
    """
    curvature = next((split for split in (id_split, *ood) if _same(split, curvature)), curvature)
    _check_names(list(dict.fromkeys([id_split, *ood, curvature])))
    (module, other), model_names, notes = _modules(models, id_split.classes, plan.objective)
    networks = (network(module, ROLES[0]), network(other, ROLES[1]))
    for split in (id_split, *ood, curvature):
        check_taken(split.unread, module, split.name)
    path, constants, moving = _ends(networks)
    notes += [
        *path_notes(plan.alphas),
        *moving,
        *(note for split in dict.fromkeys([id_split, *ood, curvature]) for note in split.notes),
    ]
    place = own_device(device or ("cuda" if torch.cuda.is_available() else str(next(iter(path.start.values())).device)))
    constants = _moved(constants, place)
    path, net = _placed(path, networks[0], module, place, parallel, plan.objective)
    if all(torch.equal(local(tensor), local(path.end[name])) for name, tensor in path.start.items()):
        notes.append("both models have the same weights: every point of the path is the same")
    parameters = list(networks[0].parameters)
    everything, on_path = (
        partition(names, granularity=plan.granularity, containers=container_names(module), patterns=patterns)
        for names in (parameters, list(path.start))
    )
    loss, batches, said, texts = differentiated(module, curvature, plan, place)
    again = net.gatherings.kept if isinstance(net, ShardedNetwork) else None
    sharers = ranks if parallel == "data" else ALONE
    objective = Objective(net.forward, loss, batches, ranks=sharers, again=again)
    labelled = [id_split, *ood, *([] if texts else [curvature])]
    layers, graph = _touched(objective, net, {**constants, **path.start}, everything, labelled, plan)
    notes += _untouched(path, everything, layers)
    if parallel != "weights":
        notes += check_same_forward(objective, networks, constants, path)
    objective = _in_pieces(objective, graph, sum(local(t).nbytes for t in path.start.values()), place, memory)
    if objective.pieces > 1:
        notes.append(f"batches are computed in {objective.pieces} pieces to stay within memory")
    return Job(
        path=path,
        constants=constants,
        layers=layers,
        all_layers=everything,
        path_layers=on_path,
        network=net,
        splits=[id_split, *ood],
        curvature_split=curvature.name,
        curvature_images=objective.examples,
        sharpness_data=curvature,
        objective=objective,
        names=model_names,
        sources=(on_disk(models[0]), on_disk(models[1])),
        device=place,
        warnings=[*notes, *said],
        ranks=ranks,
        parallel=parallel,
        memory=memory,
        workspace=Workspace(memory=memory),
        texts=texts,
    )


def _same(one: Split, other: Split) -> bool:
    return one is other or (one.name == other.name and one.fingerprint == other.fingerprint)


def _check_names(splits: list[Split]) -> None:
    names = [split.name for split in splits]
    if taken := next((name for name in names if name in MEANS), None):
        raise UsageError(f"data set name {taken!r} stands for the mean over OOD sets", "give the set another name")
    if twice := {name for name in names if names.count(name) > 1 or "|" in name}:
        raise UsageError(f"data set name {min(twice)!r} is used twice or holds a '|'", "give each set its own name")


def _in_pieces(
    objective: Objective, graph: GraphBytes, weights: int, device: torch.device, memory: int | None
) -> Objective:
    """Return the objective with batches in as many pieces as the memory asks for."""
    if objective.coupled:
        return objective
    free = min(objective.ranks.gathered([free_bytes(device, memory)]))
    return replace(objective, pieces=pieces_for(len(objective.batches[0].targets), graph, weights, free))


def _touched(
    objective: Objective,
    network: Network | ShardedNetwork,
    weights: Tree,
    everything: Partition,
    splits: list[Split],
    plan: Plan,
) -> tuple[Partition, GraphBytes]:
    """Check one batch (labels in range, finite, the same twice); return the layers that its loss touches.

    Also returned: what gradient graphs keep.
    """
    first = Objective(objective.forward, objective.loss, objective.batches[:1], again=objective.again)
    for split in splits:
        split.check_labels(class_count(first, weights, next(iter(split)).inputs, ROLES[0], split.name))
    if not isinstance(network, ShardedNetwork):  # whose module is without weights after a forward
        check_caches(first, network, weights, everything.names)
    check_additive(first, weights)
    check_finite(first(weights), "the zero-shot end")
    check_deterministic(first, weights)
    example = replace(first, batches=tuple(first.batches[0].split([1])[:1]))
    check_differentiable(example, weights, everything.names)
    if plan.measures and not isinstance(network, ShardedNetwork):
        curved = any(getattr(measure, "matrix", None) == "hessian" for measure in plan.measures)
        check_derivatives(first, network, weights, everything.names, curved)
    point = _of_few(first, weights, everything.names)
    empty = {name for name in everything.names if not weights[name].numel()}  # has no curvature, and no direction
    return everything.only(set(everything.names) - point.unused - empty), GraphBytes.of(point.graph_bytes)


def _of_few(first: Objective, weights: Tree, names: Sequence[str]) -> Point:
    """Return a point over an example and over two, which tell the layers that are touched and what graphs keep."""
    one, two = (replace(first, batches=tuple(first.batches[0].split([count])[:1])) for count in (1, 2))
    both = one if first.coupled else replace(first, batches=(*one.batches, *two.batches))
    try:
        return Point(both, weights, names, graph_bytes=sys.maxsize)
    except torch.OutOfMemoryError:
        return Point(one, weights, names, graph_bytes=0)


def _untouched(path: Path, everything: Partition, touched: Partition) -> list[str]:
    """Return a warning if layers that the loss does not touch differ between the models."""
    left = {layer: names for layer, names in everything.layers.items() if layer not in touched.layers}
    moved = [
        layer
        for layer, names in left.items()
        if not all(torch.equal(local(path.start[name]), local(path.end[name])) for name in names)
    ]
    told = f"the outputs do not depend on {len(moved)} of the layers that differ between the models"
    return [f"{told} ({moved[0]}{', ...' if moved[1:] else ''}): nothing is measured there"] if moved else []
