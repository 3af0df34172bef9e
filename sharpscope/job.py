"""What a plan is carried out on: two models and data, checked and on their device."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sharpscope._version import __version__
from sharpscope.capacity import free_bytes
from sharpscope.curvature.graphs import HEADROOM
from sharpscope.curvature.point import Point
from sharpscope.curvature.workspace import Workspace
from sharpscope.data import Split
from sharpscope.losses import code_of
from sharpscope.network import Network
from sharpscope.objective import Batch, Objective
from sharpscope.partition import Partition
from sharpscope.path import Path
from sharpscope.plan import Plan
from sharpscope.provenance import provenance
from sharpscope.ranks import ALONE, Parallel, Ranks
from sharpscope.recipe import CONVENTION
from sharpscope.tree import Tree, fingerprint, norm, select
from sharpscope.weight_norm import has_weight_norm


def _data(split: Split) -> str | list[Any]:
    """Return what the examples are and which outputs they are judged by."""
    return split.fingerprint if split.columns is None else [split.fingerprint, list(split.columns)]


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
    memory: int | None = None  # bytes of the device that the scan may take
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

    @property
    def evaluators(self) -> Ranks:
        """The processes that share images where weights are only evaluated; with weights in shards all do all."""
        return ALONE if self.parallel == "weights" else self.ranks

    def batches(self, split: Split, ranks: Ranks) -> Iterator[Batch]:
        """Yield this rank's batches of a split, on the device."""
        mine = ranks.mine(split, split.batch_count)
        return (piece.to(self.device) for batch in mine for piece in batch.split(self.objective.pieces))

    def room(self) -> int | None:
        """Return the bytes that kept graphs may take; None: half of what is free.

        Ranks that gather weights must all keep the same graphs. Elsewhere on a GPU the allocator keeps the limit, and
        the workspace, which serves all alphas, is measured out once.
        """
        measured = self.memory is not None and self.device.type != "cuda"
        if self.graph_bytes is not None or (self.parallel != "weights" and not measured):
            return self.graph_bytes
        mine = int(free_bytes(self.device, self.memory) * HEADROOM)
        return min(self.ranks.gathered([mine])) if self.parallel == "weights" else mine

    def count(self, point: Point) -> None:
        """Add the point's products since the last time to the cost."""
        self.counts.update(point.counts)
        point.counts.clear()

    def tell_all(self) -> None:
        """Make cost and warnings those of all ranks. Collective, where ranks measure apart."""
        self.counts = sum(self.ranks.gathered([self.counts]), Counter())
        self.warnings = list(dict.fromkeys(self.ranks.gathered(self.warnings)))

    def identity(self, plan: Plan) -> dict[str, Any]:
        """Return what must be equal for cells to belong to the same scan."""
        layers = json.dumps({k: list(v) for k, v in self.layers.layers.items()})
        return {
            "weights": [fingerprint({**self.constants, **end}) for end in (self.path.start, self.path.end)],
            "data": {split.name: _data(split) for split in [*self.splits, self.sharpness_data]},
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
            **({"loss_code": code} if (code := code_of(plan.loss)) else {}),
            "precision": plan.precision,
            "chains": plan.chains,
            # Absent from scans before there was a choice, which resume.
            **({} if plan.objective == "image" else {"objective": [plan.objective, self.texts]}),
            # Absent from scans that had sharpness under weight norm wrong, which do not resume.
            **({"weight_norm": "written out"} if plan.measures and has_weight_norm(self.network.module) else {}),
        }

    def describe(self, plan: Plan, done: int) -> str:
        """Return the plan in one line."""
        resumed = f", {done} cells are there already" if done else ""
        names = ", ".join(plan.settings) or "accuracy only"
        names += {"image": "", "both": " of both towers", "contrastive": " of contrastive batches"}[plan.objective]
        place = str(self.device)
        if self.ranks.size > 1:
            place = f"{self.ranks.size} x {self.device.type}, sharing {self.parallel}"
        pieces = self.objective.pieces
        cut = f", batches in {pieces} pieces to stay within memory" if pieces > 1 else ""
        return (
            f"{len(self.layers.layers)} layers x {len(plan.alphas)} alphas on {place}: {names} "
            f"on {self.curvature_images} images of {self.curvature_split!r}{cut}; "
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
            "partition": {layer: list(names) for layer, names in self._saved_layers.layers.items()},
            "provenance": self.provenance,
            "cost": {"seconds": round(seconds, 3), "processes": self.ranks.size, **dict(self.counts)},
            "warnings": self.warnings,
            "plan": identity,
        }

    @property
    def _saved_layers(self) -> Partition:
        """The layers that a merge finds on disk: running statistics go with theirs, which a pattern may have named."""
        passing = {
            f"{place}.{name}".lstrip(".")
            for place, sub in self.network.module.named_modules()
            for name in sub._non_persistent_buffers_set
        }
        return self.path_layers.only(set(self.path_layers.names) - passing)

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
