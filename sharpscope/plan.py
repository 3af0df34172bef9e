"""What a scan is going to do, checked before it starts: the plan, and the job it is done on."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sharpscope._version import __version__
from sharpscope.curvature.point import Point
from sharpscope.curvature.workspace import Workspace
from sharpscope.data import Split
from sharpscope.errors import ModelError, UsageError
from sharpscope.losses import Loss, Towers, cross_entropy
from sharpscope.measures import Measure
from sharpscope.merging.scanned import on_disk
from sharpscope.network import Network, network
from sharpscope.objective import Batch, Objective, check_deterministic, check_finite
from sharpscope.pairs import check_objective, differentiated
from sharpscope.partition import Granularity, Partition, container_names, partition
from sharpscope.path import Path
from sharpscope.precision import Precision
from sharpscope.provenance import provenance
from sharpscope.ranks import ALONE, Parallel, Ranks, own_device
from sharpscope.recipe import CONVENTION
from sharpscope.tree import Tree, check_same_structure, fingerprint, norm, select

ROLES = ("the zero-shot model", "the fine-tuned model")


def alphas_from(chosen: int | Sequence[float]) -> tuple[float, ...]:
    """Return the points of the path: a number of evenly spaced ones, or those given, sorted.

    >>> alphas_from(3)
    (0.0, 0.5, 1.0)
    """
    if isinstance(chosen, int):
        if chosen < 2:
            raise UsageError(f"alphas={chosen}: a path has two ends at least", "alphas=11, or a list of points")
        return tuple(round(i / (chosen - 1), 12) for i in range(chosen))
    points = tuple(sorted(float(alpha) for alpha in chosen))
    if not points or not np.isfinite(points).all() or len(set(points)) < len(points):
        raise UsageError(f"alphas={list(chosen)}: needs distinct finite numbers", "e.g. alphas=[0, 0.5, 1]")
    return points


@dataclass(frozen=True)
class Plan:
    """The settings that determine the numbers."""

    alphas: tuple[float, ...]
    measures: tuple[Measure, ...]
    seed: int
    limit: int | None
    batch_size: int
    granularity: Granularity
    loss: Loss = cross_entropy
    loss_name: str = "cross_entropy"
    label_smoothing: float = 0.0
    precision: Precision = "highest"
    chains: int = 1  # runs of alphas, each begun without a neighbour's eigenvectors
    objective: Towers = "image"  # what the loss is a function of

    def __post_init__(self) -> None:
        if not 1 <= self.chains <= len(self.alphas):
            raise UsageError(f"chains={self.chains} of {len(self.alphas)} alphas: 1 or more, each of an alpha or more")
        if (self.limit is not None and self.limit < 1) or self.batch_size < 1:
            raise UsageError(f"limit={self.limit}, batch_size={self.batch_size}: both must be 1 or more")
        check_objective(self.objective, self.loss_name, self.label_smoothing, self.measures, self.batch_size)

    @property
    def rounds(self) -> list[tuple[int, ...]]:
        """Indices of the alphas in the order in which they are measured, those that come at once together.

        >>> Plan(alphas_from(5), (), 0, None, 64, "block", chains=2).rounds
        [(0, 3), (1, 4), (2,)]
        """
        runs = np.array_split(np.arange(len(self.alphas)), self.chains)
        return [tuple(int(run[i]) for run in runs if i < len(run)) for i in range(len(runs[0]))]

    def begins(self, index: int) -> bool:
        """Return whether an alpha is the first of its chain."""
        return index in self.rounds[0]

    def stride(self, index: int) -> float:
        """Return the way from the alpha before to this one, over the way to that one; 0 if a chain begins there."""
        if self.begins(index) or self.begins(index - 1):
            return 0.0
        ahead, behind = np.diff(self.alphas[index - 2 : index + 1])[::-1]
        return float(ahead / behind)

    @property
    def settings(self) -> dict[str, Any]:
        """Measure name -> its settings."""
        return {measure.name: asdict(measure) for measure in self.measures}  # type: ignore[call-overload]


@dataclass
class Job:
    """Two models and data, checked and on their device: what the plan is carried out on."""

    path: Path
    constants: Tree  # buffers that are the same in both models
    layers: Partition  # of the tensors that the loss touches
    all_layers: Partition
    path_layers: Partition  # of every tensor on the path, buffers that differ between the models too
    network: Network
    splits: list[Split]  # ID first
    curvature_split: str
    curvature_images: int
    sharpness_data: Split
    objective: Objective
    names: tuple[str, str]
    sources: tuple[dict[str, str], dict[str, str]]  # where the weights are on disk, and their hash
    device: torch.device
    warnings: list[str]
    ranks: Ranks = ALONE
    parallel: Parallel = "data"
    graph_bytes: int | None = None  # that kept graphs may take, see Point
    workspace: Workspace = field(default_factory=Workspace)
    texts: str = ""  # hash of the texts of a contrastive objective
    counts: Counter[str] = field(default_factory=Counter)

    def weights(self, alpha: float) -> Tree:
        """Return all tensors that the forward takes, at alpha."""
        return {**self.constants, **self.path(alpha)}

    def columns(self, split: Split) -> Tensor | None:
        """Return the split's classes on the device, None for all."""
        return None if split.columns is None else torch.tensor(split.columns, device=self.device)

    @property
    def team(self) -> Ranks:
        """The processes that measure an alpha together."""
        return self.objective.ranks

    def batches(self, split: Split, ranks: Ranks) -> Iterator[Batch]:
        """Yield this rank's batches of a split, on the device."""
        mine = ranks.mine(split, split.batch_count)
        return (piece.to(self.device) for batch in mine for piece in batch.split(self.objective.pieces))

    def count(self, point: Point) -> None:
        """Add the point's products to the cost."""
        self.counts.update(point.counts)

    def identity(self, plan: Plan) -> dict[str, Any]:
        """Return what must be equal for cells to belong to the same scan."""
        layers = json.dumps({k: list(v) for k, v in self.layers.layers.items()})
        return {
            "weights": [fingerprint({**self.constants, **end}) for end in (self.path.start, self.path.end)],
            "data": {split.name: split.fingerprint for split in [*self.splits, self.sharpness_data]},
            "layers": hashlib.sha256(layers.encode()).hexdigest(),
            "alphas": list(plan.alphas),
            "measures": plan.settings,
            "seed": plan.seed,
            "limit": plan.limit,
            "batch_size": plan.batch_size,
            "loss": [
                self.objective.loss.__name__ if self.objective.coupled else plan.loss_name,
                plan.label_smoothing,
            ],
            "precision": plan.precision,
            "chains": plan.chains,
            # Absent from scans before there was a choice, which resume.
            **({} if plan.objective == "image" else {"objective": [plan.objective, self.texts]}),
        }

    def describe(self, plan: Plan, done: int) -> str:
        """Return the plan in one line."""
        resumed = f", {done} cells are there already" if done else ""
        names = ", ".join(plan.settings) or "accuracy only"
        names += {"image": "", "both": " of both towers", "contrastive": " of contrastive batches"}[plan.objective]
        place = str(self.device)
        if self.ranks.size > 1:
            place = f"{self.ranks.size} x {self.device.type}, sharing {self.parallel}"
        return (
            f"{len(self.layers.layers)} layers x {len(plan.alphas)} alphas on {place}: {names} "
            f"on {self.curvature_images} images of {self.curvature_split!r}; "
            f"evaluation on {', '.join(f'{s.name} ({len(s)})' for s in self.splits)}{resumed}"
        )

    @property
    def provenance(self) -> dict[str, Any]:
        """Versions, device and arithmetic."""
        return provenance(self.device, next(iter(self.path.start.values())).dtype)

    def meta(self, plan: Plan, identity: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Return the plan and provenance of a result, see :class:`sharpscope.result.ScanResult`."""
        return {
            "sharpscope": __version__,
            "alpha_convention": CONVENTION,
            "alphas": list(plan.alphas),
            "measures": plan.settings,
            "seed": plan.seed,
            "granularity": plan.granularity,
            "objective": plan.objective,
            "curvature_split": self.curvature_split,
            "splits": self._split_facts(),
            "layers": self._layer_facts(),
            "unused": [layer for layer in self.all_layers.layers if layer not in self.layers.layers],
            "models": {
                role: {"name": name, "hash": mark, **source}
                for role, name, mark, source in zip(
                    ("zero_shot", "fine_tuned"), self.names, identity["weights"], self.sources, strict=True
                )
            },
            "partition": {layer: list(names) for layer, names in self.all_layers.layers.items()},
            "provenance": self.provenance,
            "cost": {"seconds": round(seconds, 3), "processes": self.ranks.size, **dict(self.counts)},
            "warnings": self.warnings,
            "plan": identity,
        }

    def _split_facts(self) -> dict[str, Any]:
        facts = {}
        for split in dict.fromkeys([*self.splits, self.sharpness_data]):
            role = "id" if split is self.splits[0] else "ood" if split in self.splits else "sharpness"
            facts[split.name] = {
                "role": role,
                "n": len(split),
                "classes": None if split.classes is None else list(split.classes),
                "columns": None if split.columns is None else list(split.columns),
                "fingerprint": split.fingerprint,
                "measured": self.curvature_images if split.name == self.curvature_split else 0,
            }
        return facts

    def _layer_facts(self) -> dict[str, Any]:
        delta = self.path.delta
        return {
            layer: {
                "tensors": len(names),
                "size": sum(self.path.start[n].numel() for n in names),
                "delta_norm": norm(select(delta, names)),
                "start_norm": norm(select(self.path.start, names)),
            }
            for layer, names in self.layers.layers.items()
        }


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


def _ends(networks: tuple[Network, Network]) -> tuple[Path, Tree, list[str]]:
    """Return the path, the constant buffers, and a warning if running statistics lie on the path."""
    first, second = networks
    check_same_structure(first.buffers, second.buffers, ROLES)
    moving = [n for n, b in first.buffers.items() if b.is_floating_point() and not torch.equal(b, second.buffers[n])]
    path = Path(
        {**first.parameters, **select(first.buffers, moving)}, {**second.parameters, **select(second.buffers, moving)}
    )
    notes = []
    if moving:
        notes.append(
            f"{len(moving)} buffers differ between the models ({moving[0]}, ...) and are interpolated; batch-norm "
            "statistics are wrong between the ends without recalibration"
        )
    return path, {n: b for n, b in first.buffers.items() if n not in moving}, notes


def _moved(tree: Tree, device: torch.device) -> Tree:
    return {name: tensor.to(device) for name, tensor in tree.items()}


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
) -> Job:
    """Return the job, after checking models against each other and the data against the models.

    With ``parallel="data"`` the ranks measure every alpha together.

    Cost: two forwards and one gradient of a batch, and a forward per split.
    """
    _check_names([id_split, *ood])
    (module, other), model_names, notes = _modules(models, id_split.classes, plan.objective)
    networks = (network(module, ROLES[0]), network(other, ROLES[1]))
    path, constants, moving = _ends(networks)
    notes += [*moving, *(note for split in dict.fromkeys([id_split, *ood, curvature]) for note in split.notes)]
    place = own_device(device or ("cuda" if torch.cuda.is_available() else str(next(iter(path.start.values())).device)))
    path, constants = Path(_moved(path.start, place), _moved(path.end, place)), _moved(constants, place)
    if all(torch.equal(tensor, path.end[name]) for name, tensor in path.start.items()):
        notes.append("both models have the same weights: every point of the path is the same")
    parameters = list(networks[0].parameters)
    everything, on_path = (
        partition(names, granularity=plan.granularity, containers=container_names(module), patterns=patterns)
        for names in (parameters, list(path.start))
    )
    loss, batches, said, texts = differentiated(module, curvature, plan, place)
    objective = Objective(networks[0].forward, loss, batches, ranks=ranks if parallel == "data" else ALONE)
    labelled = [id_split, *ood, *([] if texts else [curvature])]
    layers = _touched(objective, {**constants, **path.start}, everything, labelled)
    return Job(
        path=path,
        constants=constants,
        layers=layers,
        all_layers=everything,
        path_layers=on_path,
        network=networks[0],
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
        texts=texts,
    )


def _check_names(splits: list[Split]) -> None:
    names = [split.name for split in splits]
    if twice := {name for name in names if names.count(name) > 1 or "|" in name}:
        raise UsageError(f"data set name {min(twice)!r} is used twice or holds a '|'", "give each set its own name")


def _touched(objective: Objective, weights: Tree, everything: Partition, splits: list[Split]) -> Partition:
    """Check one batch (labels in range, finite, the same twice); return the layers that its loss touches."""
    first = Objective(objective.forward, objective.loss, objective.batches[:1])
    for split in splits:
        split.check_labels(_classes(first, weights, split))
    check_finite(first(weights), "the zero-shot end")
    check_deterministic(first, weights)
    example = replace(first, batches=(first.batches[0].split(first.examples)[0],))
    point = Point(example, weights, everything.names, graph_bytes=0)  # which tensors are touched one example tells
    return everything.only(set(everything.names) - point.unused)


def _classes(objective: Objective, weights: Tree, split: Split) -> int:
    """Return how many classes the model tells apart; ``ModelError`` if it cannot take the data."""
    example = next(iter(split)).inputs[:1].to(next(iter(weights.values())).device)
    try:
        with torch.no_grad():
            return objective.outputs(weights, example).shape[1]
    except RuntimeError as refusal:
        raise ModelError(
            f"the zero-shot model fails on inputs of {split.name!r} of shape {tuple(example.shape)} {example.dtype}: "
            f"{refusal}",
            "give the loader the size, channels and dtype that the model was made for",
        ) from refusal
