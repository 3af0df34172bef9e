"""Which tensors are projected together: chunks of whole units, of a bounded number of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from sharpscope.optim import projection, shards
from sharpscope.optim.fused import Fused

AnchorOf = Callable[[str, Tensor], Tensor | None]

# Weights in a chunk. Deviations are written, read three times and dropped: a chunk bounds what they take beside the
# anchors. On an H200 launches rule, and cache-sized chunks were four times slower than one of all 88 M weights
# (benchmarks/results/spd-h200.json); on a CPU small ones stay in the cache.
LIMITS = {"cuda": 1 << 27}
LIMIT: int | None = None  #: overrides the above
_ELSEWHERE = 1 << 22


@dataclass(frozen=True)
class Activity:
    """Decisions on one unit since they were last asked for: all, gated (c < 0), active (r > 0), sum of the ratios."""

    unit: str
    tensors: int
    decisions: int
    gated: int
    active: int
    ratio: float

    def __add__(self, other: Activity) -> Activity:
        return Activity(
            self.unit,
            self.tensors,
            self.decisions + other.decisions,
            self.gated + other.gated,
            self.active + other.active,
            self.ratio + other.ratio,
        )


@dataclass(frozen=True)
class Entry:
    """One parameter: its group, plain name, unit, process groups its norms are summed over, and if it has an anchor."""

    group: dict[str, Any]
    name: str
    parameter: Tensor
    unit: str
    places: shards.Groups
    anchored: bool  #: not at zero

    @property
    def kind(self) -> tuple[Any, ...]:
        """What tensors must share to be handled in one call."""
        here = self.parameter
        return (here.device, here.dtype, self.places, self.anchored, bool(self.group.get("maximize")))


class Part:
    """Parameters of one device and dtype, with their anchors.

    Attributes
    ----------
    entries
        The parameters.
    anchors
        What this rank has of the anchors, None for zeros.
    """

    def __init__(self, entries: Sequence[Entry], anchor_of: AnchorOf) -> None:
        self.entries = entries
        self.places = [entry.places for entry in entries]
        found = [anchor_of(entry.name, entry.parameter) for entry in entries]
        self.anchors = [anchor for anchor in found if anchor is not None] or None
        self._parameters = [entry.parameter for entry in entries]
        self._fused: Fused | None = None
        self._sharded = any(shards.is_sharded(parameter) for parameter in self._parameters)

    @property
    def weights(self) -> list[Tensor]:
        """What this rank has of the parameters; FSDP may exchange its pieces between steps."""
        return [shards.local(p) for p in self._parameters] if self._sharded else self._parameters

    @property
    def gradients(self) -> list[Tensor]:
        """What this rank has of the gradients."""
        found = [p.grad for p in self._parameters if p.grad is not None]
        return [shards.local(gradient) for gradient in found] if self._sharded else found

    def fused(self, weights: list[Tensor], gradients: list[Tensor] | None) -> Fused | None:
        """Return the kernels for these tensors; None where foreach calls do the work."""
        if not Fused.usable([*weights, *(gradients or ())], self.anchors):
            return None
        if self._fused is None:
            self._fused = Fused(weights, self.anchors)
        return self._fused

    def deviations(self, weights: list[Tensor]) -> list[Tensor]:
        """Return these weights minus the anchors."""
        return projection.deviations(weights, self.anchors)


@dataclass
class Chunk:
    """Whole units.

    Attributes
    ----------
    units
        Their names.
    sizes
        Number of tensors of each.
    member
        (units, tensors) of 0 and 1; None if every tensor is a unit of its own.
    tally
        (4, units): decisions made, those gated, those active, sum of the ratios.
    """

    parts: list[Part]
    units: list[str]
    sizes: list[int]
    member: Tensor | None
    tally: Tensor
    pending: Any = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        """Where the numbers per unit are."""
        return self.tally.device

    def pooled(self, per_part: Sequence[Tensor]) -> Tensor:
        """Return sums per unit (k, units) of sums per tensor (k, tensors of the part), over all ranks."""
        sums = [
            shards.summed(values, part.places).to(self.device)
            for values, part in zip(per_part, self.parts, strict=True)
        ]
        found = sums[0] if len(sums) == 1 else torch.cat(sums, dim=1)
        return found if self.member is None else found @ self.member.T

    def per_tensor(self, per_unit: Tensor) -> Tensor:
        """Return the number of each tensor's unit."""
        return per_unit if self.member is None else per_unit @ self.member

    def option(self, key: str) -> float | Tensor:
        """Return a hyper-parameter per tensor, as one number if all agree."""
        values = [float(entry.group[key]) for part in self.parts for entry in part.entries]
        if len(set(values)) == 1:
            return values[0]
        # Filled on the device: a copy from the host would wait.
        runs = [(value, len(list(run))) for value, run in groupby(values)]
        return torch.cat([torch.full((n,), value, dtype=torch.float64, device=self.device) for value, n in runs])

    def spread(self, per_tensor: Tensor) -> Iterator[tuple[Part, Tensor]]:
        """Yield each part with the numbers of its tensors on its device, in the dtype its deviations have."""
        start = 0
        for part in self.parts:
            first = part.entries[0].parameter
            dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
            values = per_tensor[start : start + len(part.entries)].to(device=first.device, dtype=dtype)
            start += len(part.entries)
            yield part, values

    def count(self, gated: Tensor, active: Tensor, ratio: Tensor) -> None:
        """Add one step's decisions to the tally, on the device."""
        self.tally += torch.stack([torch.ones_like(ratio), gated.to(ratio), active.to(ratio), ratio])

    def drained(self) -> Iterator[Activity]:
        """Yield the counts and set them back, in place: a captured graph goes on adding to the same tensor."""
        columns = self.tally.T.tolist()
        self.tally.zero_()
        for unit, size, (decisions, gated, active, ratio) in zip(self.units, self.sizes, columns, strict=True):
            if decisions:
                yield Activity(unit, size, int(decisions), int(gated), int(active), ratio)


def chunks(entries: Sequence[Entry], anchor_of: AnchorOf) -> list[Chunk]:
    """Return the entries in chunks of whole units, of one kind each where units allow."""
    units: dict[str, list[Entry]] = {}
    for entry in entries:
        units.setdefault(entry.unit, []).append(entry)
    bins: dict[Any, list[list[str]]] = {}
    filled: dict[Any, int] = {}
    for unit, mine in units.items():
        kinds = tuple(dict.fromkeys(entry.kind for entry in mine))
        size = sum(shards.local(entry.parameter).numel() for entry in mine)
        limit = LIMIT or LIMITS.get(mine[0].parameter.device.type, _ELSEWHERE)
        if kinds not in bins or filled[kinds] + size > limit:
            bins.setdefault(kinds, []).append([])
            filled[kinds] = 0
        bins[kinds][-1].append(unit)
        filled[kinds] += size
    return [_chunk({unit: units[unit] for unit in names}, anchor_of) for kind in bins.values() for names in kind]


def _chunk(units: Mapping[str, list[Entry]], anchor_of: AnchorOf) -> Chunk:
    kinds: dict[Any, list[Entry]] = {}
    for mine in units.values():
        for entry in mine:
            kinds.setdefault(entry.kind, []).append(entry)
    parts = [Part(mine, anchor_of) for mine in kinds.values()]
    names, sizes = list(units), [len(mine) for mine in units.values()]
    device = parts[0].entries[0].parameter.device
    member = None
    if max(sizes) > 1:
        rows = [names.index(entry.unit) for part in parts for entry in part.entries]
        member = torch.zeros(len(names), len(rows), dtype=torch.float64)
        member[rows, list(range(len(rows)))] = 1
        member = member.to(device)
    # Made here: a tally made while a graph is captured would start from zero at every replay.
    return Chunk(parts, names, sizes, member, torch.zeros(4, len(names), dtype=torch.float64, device=device))
