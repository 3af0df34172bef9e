"""Selective Projection Decay around the step of any optimiser of torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Any, ClassVar, Literal, SupportsFloat

import torch
from torch import Tensor

from sharpscope.errors import UsageError
from sharpscope.optim import projection, shards
from sharpscope.optim.anchor import Source, plain_name
from sharpscope.optim.anchored import Anchored
from sharpscope.optim.chunk import Activity, Chunk, Entry, Part, chunks
from sharpscope.optim.fused import Fused
from sharpscope.partition import Partition, partition

Unit = Literal["tensor", "layer"]
Gate = Literal["gradient", "update"]


@dataclass(frozen=True)
class Selection:
    """When and by what a unit is pulled back.

    Parameters
    ----------
    granularity
        Whether a tensor or a layer has a gate and a ratio of its own.
    gate
        ``"gradient"`` (the paper): the gradient pulls towards the anchor, c = -<g, theta - theta_0> < 0.
        ``"update"``: the plain step does, c = <theta~ - theta, theta - theta_0> < 0, as arXiv 2510.12402 gates
        ordinary decay. A step that points inwards and yet ends farther out has overshot, so this is rare.
        Keeps a copy of the weights during the step.
    row_norms
        A ratio per row, from sums of absolute values, see :func:`~sharpscope.optim.projection.row_norms`.
    """

    granularity: Unit = "tensor"
    gate: Gate = "gradient"
    row_norms: bool = False

    def __post_init__(self) -> None:
        if self.granularity not in ("tensor", "layer"):
            raise UsageError(f"granularity={self.granularity!r}", "'tensor' or 'layer'")
        if self.gate not in ("gradient", "update"):
            raise UsageError(f"gate={self.gate!r}", "'gradient' or 'update'")


def checked_decay(decay: float) -> float:
    """Return lambda; ``UsageError`` if it is no number from 0."""
    if not isinstance(decay, SupportsFloat) or not 0 <= float(decay) < float("inf"):
        raise UsageError(f"decay={decay!r}", "a number from 0 (plain optimiser); 1 is the paper's full projection")
    return float(decay)


_COUNTED = "decisions"  # in the first group of a saved state
# Sets of tensors with a gradient whose chunks are kept: training that skips layers at random has thousands of them.
PLANS = 16


class SelectiveProjection(Anchored):
    """The part of :class:`AdamSPD` and :class:`SGDSPD` that is not the plain step.

    Attributes
    ----------
    selection
        See :class:`Selection`.
    layers
        The partition of the anchored parameters.
    since
        The step from which on decisions are counted: that of a log's last line. Saved and loaded with the state.
    """

    since = 0

    _own: ClassVar[tuple[str, ...]] = (*Anchored._own, "selection", "layers", "_by_row", "_recorded")

    def _start_selective(
        self,
        *,
        anchor: Source,
        exclude: str | Iterable[str],
        store_anchor: bool,
        decay: float,
        selection: Selection,
    ) -> None:
        self.selection = selection
        self._by_row = selection.row_norms
        self._plans: dict[Any, list[Chunk]] = {}
        self._counted: dict[str, Activity] = {}
        self._running: list[Chunk] = []
        self._recorded = False
        self._start(anchor, exclude, store_anchor, decay=checked_decay(decay))

    def _finish_selective(self, layers: Partition | None) -> None:
        self._finish()
        names = [name for _, name, _ in self.anchored()]
        if not names:
            raise UsageError("every parameter is excluded: nothing is left to project", "a narrower exclude")
        self.layers = _covering(names, layers)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, see :meth:`Anchored.add_param_group`; new parameters get layers by their names."""
        checked_decay(param_group.get("decay", 0))
        super().add_param_group(param_group)
        self._let_go()
        if "layers" in self.__dict__:
            known = set(self.layers.names)
            fresh = [name for _, name, _ in self.anchored() if name not in known]
            self.layers = _joined(self.layers, partition(fresh) if fresh else Partition({}))

    @property
    def layers_hash(self) -> str:
        """A hash of the partition."""
        text = json.dumps({layer: list(names) for layer, names in self.layers.layers.items()})
        return hashlib.sha256(text.encode()).hexdigest()

    def _plan(self) -> list[Chunk]:
        """Return the chunks of this step: parameters with a gradient in groups with lambda above 0."""
        live = [(group, name, p) for group, name, p in self.anchored() if p.grad is not None and group["decay"] > 0]
        key = tuple((name, p.device, p.dtype) for _, name, p in live)
        if key not in self._plans:
            if len(self._plans) >= PLANS:
                self._let_go()
            self._plans[key] = self._chunks(live)
        return self._plans[key]

    def _chunks(self, live: list[tuple[dict[str, Any], str, Tensor]]) -> list[Chunk]:
        by_layer = self.selection.granularity == "layer"
        home = {name: layer for layer, names in self.layers.layers.items() for name in names} if by_layer else {}
        entries = []
        for group, name, parameter in live:
            assert parameter.grad is not None
            shards.check_gradient(name, parameter, parameter.grad)
            unit, anchored = home.get(name, name), self.anchors[name] is not None
            entries.append(Entry(group, name, parameter, unit, shards.groups(parameter), anchored))
        return chunks(entries, self.anchor_of)

    def _before_update(self) -> None:
        self._running = self._plan()
        for chunk in self._running:
            chunk.pending = self._seen(chunk)

    def _seen(self, chunk: Chunk) -> tuple[Tensor, list[Any]]:
        """Return sums per unit before the step (squared norm and, for the gradient gate, -c), and what to keep."""
        per_part, kept = [], []
        for part in chunk.parts:
            weights = part.weights
            gradients = part.gradients if self.selection.gate == "gradient" else None
            copies = [weight.clone() for weight in weights] if self.selection.gate == "update" else None
            sums, rows = self._moments(part, weights, gradients)
            if part.entries[0].group.get("maximize"):
                sums[1:] *= -1  # the gradient of what is minimised
            per_part.append(sums)
            kept.append((copies, rows))
        return chunk.pooled(per_part), kept

    def _moments(
        self, part: Part, weights: list[Tensor], gradients: list[Tensor] | None
    ) -> tuple[Tensor, list[Tensor] | None]:
        """Return squared norms of the deviations, with gradients <g, theta - theta_0> too, and row norms if wanted."""
        if fused := self._fused(part, weights, gradients):
            return fused.sums(weights, gradients), None
        deviation = part.deviations(weights)
        sums = [projection.squares(deviation)]
        if gradients is not None:
            sums.append(projection.products(deviation, gradients))
        return torch.stack(sums), projection.row_norms(deviation) if self.selection.row_norms else None

    def _fused(self, part: Part, weights: list[Tensor], gradients: list[Tensor] | None = None) -> Fused | None:
        return None if self.selection.row_norms else part.fused(weights, gradients)

    def _after_update(self) -> None:
        for chunk in self._running:
            self._project(chunk)
            chunk.pending = None
        self._running = []

    def _project(self, chunk: Chunk) -> None:
        before, kept = chunk.pending
        weights = [part.weights for part in chunk.parts]
        kernels = [self._fused(part, mine) for part, mine in zip(chunk.parts, weights, strict=True)]
        pairs = zip(chunk.parts, weights, kernels, strict=True)
        deviation = [[] if fused else part.deviations(mine) for part, mine, fused in pairs]
        sums = zip(weights, deviation, kernels, strict=True)
        after = chunk.pooled([f.sums(w, None) if f else projection.squares(d)[None] for w, d, f in sums])[0]
        gated = before[1] > 0 if self.selection.gate == "gradient" else self._turned(chunk, weights, kept)
        if self.selection.row_norms:
            self._pull_rows(chunk, gated, weights, deviation, kept)
            return
        ratio = projection.ratios(before[0].sqrt(), after.sqrt(), gated)
        if self._recorded:
            chunk.count(gated, ratio > 0, ratio)
        share = projection.shares(chunk.per_tensor(ratio), chunk.option("decay"))
        for (_, values), mine, moved, fused in zip(chunk.spread(share), weights, deviation, kernels, strict=True):
            if fused:
                fused.pull(mine, values)
            else:
                projection.pull(mine, moved, values.unbind())

    def _turned(self, chunk: Chunk, weights: list[list[Tensor]], kept: list[Any]) -> Tensor:
        """Return where the plain step pointed towards the anchor."""
        sums = []
        for part, mine, (copies, _) in zip(chunk.parts, weights, kept, strict=True):
            step = torch._foreach_sub(projection.widened(mine), projection.widened(copies))
            sums.append(projection.products(part.deviations(copies), step)[None])
        return chunk.pooled(sums)[0] < 0

    def _pull_rows(
        self, chunk: Chunk, gated: Tensor, weights: list[list[Tensor]], deviation: list[list[Tensor]], kept: list[Any]
    ) -> None:
        gates = list(chunk.spread(chunk.per_tensor(gated.double())))
        decays = list(chunk.spread(torch.zeros_like(chunk.per_tensor(gated.double())) + chunk.option("decay")))
        found = []
        for index, (_, flags) in enumerate(gates):
            after = projection.row_norms(deviation[index])
            before = kept[index][1]
            rows = [projection.ratios(b, a, f > 0) for b, a, f in zip(before, after, flags.unbind(), strict=True)]
            pairs = zip(rows, decays[index][1].unbind(), strict=True)
            projection.pull(weights[index], deviation[index], [projection.shares(r, d) for r, d in pairs])
            found.append(torch.stack([torch.stack([(r > 0).double().mean(), r.double().mean()]) for r in rows]).T)
        if self._recorded:
            sums = chunk.pooled(found)
            sizes = chunk.pooled([torch.ones_like(part) for part in found])
            chunk.count(gated, sums[0] > 0, (sums / sizes)[1])

    def record(self, wanted: bool = True) -> None:
        """Count decisions on the device from now on, or stop; what was counted before is dropped."""
        self._recorded = wanted
        self.activity()

    def activity(self) -> list[Activity]:
        """Return the decisions on every unit since the last call, in the order of the parameters; waits for the device.

        Nothing is counted before :meth:`record`.
        """
        found, self._counted = self._counted, {}
        for chunk in (chunk for plan in self._plans.values() for chunk in plan):
            for one in chunk.drained():
                found[one.unit] = found[one.unit] + one if one.unit in found else one
        return list(found.values())

    def carry(self, counted: Iterable[Activity]) -> None:
        """Count on from these decisions, which a saved state brought along."""
        self._counted = {one.unit: one for one in counted}

    def state_dict(self) -> dict[str, Any]:
        """Return the state; while decisions are counted, with those that no line of a log holds yet, which waits."""
        found = super().state_dict()
        if self._recorded:
            self.carry(self.activity())
            found["param_groups"][0][_COUNTED] = [self.since, *map(astuple, self._counted.values())]
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state, see :meth:`Anchored.load_state_dict`, and the decisions that no line held when it was saved."""
        super().load_state_dict(state_dict)
        for counted in [group.pop(_COUNTED) for group in self.param_groups if _COUNTED in group]:
            self.activity()
            self.since, *units = counted
            self.carry(Activity(*unit) for unit in units)

    def _let_go(self) -> None:
        """Drop the chunks, but not what they counted."""
        self.carry(self.activity())
        self._plans, self._running = {}, []

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for key in ("_plans", "_counted"):
            self.__dict__.setdefault(key, {})  # of a copy
        self._let_go()  # chunks hold the groups that have just been replaced


def _joined(a: Partition, b: Partition) -> Partition:
    return Partition(
        {layer: (*a.layers.get(layer, ()), *b.layers.get(layer, ())) for layer in {**a.layers, **b.layers}}
    )


def _covering(names: list[str], layers: Partition | None) -> Partition:
    """Return the partition of these names.

    Raises
    ------
    UsageError
        If the given one lacks a name.
    """
    if layers is None:
        return partition(names)
    plain = Partition({layer: tuple(map(plain_name, mine)) for layer, mine in layers.layers.items()})
    known = set(plain.names)
    if missing := [name for name in names if name not in known]:
        raise UsageError(f"parameter {missing[0]!r} is in no layer", "layers=sharpscope.layers(model), or exclude it")
    return plain.only(set(names))
