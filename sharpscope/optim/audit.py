"""Writing an audit log: JSON lines, a header first, then one line per layer every N steps."""

from __future__ import annotations

import json
import os
import platform
import warnings
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharpscope._version import __version__
from sharpscope.counts import whole
from sharpscope.errors import UsageError
from sharpscope.home import at_home
from sharpscope.optim import projection, shards
from sharpscope.optim.activity import FORMAT, finite, read_audit, read_lines, sentence
from sharpscope.optim.chunk import Activity
from sharpscope.optim.selective import SelectiveProjection

Line = dict[str, Any]
_SAME = ("anchor", "partition", "optimizer", "granularity", "gate", "row_norms")  # what a continued log must share


class AuditLog:
    """What a Selective Projection optimiser does, layer by layer.

    Decisions are counted on the device and read when a line is due, so training waits once every N steps.
    With sharded parameters every rank must call every method; the first writes.

    Parameters
    ----------
    path
        The file. One that holds a log of the same anchor, partition and options is continued: its lines after
        ``step`` are dropped, so a run resumed from a checkpoint has every line once. Begun anew at step 0, the log that
        was there is kept beside, as ``NAME.1.jsonl``, with a warning. The state of the optimiser holds the decisions
        that were in no line when it was saved, so load it first. Where groups of parameters are added on the way, the
        header follows with the next line; a checkpoint of before or after continues the log.
    optimizer
        An ``AdamSPD`` or ``SGDSPD``.
    every
        Optimiser steps between lines.
    step
        Optimiser steps already made: 0, or those of the checkpoint resumed from.

    Raises
    ------
    UsageError
        If the optimiser is another one, or the file holds something else or the log of another run.
    """

    def __init__(self, path: str | Path, optimizer: Any, *, every: int = 100, step: int = 0) -> None:
        if not isinstance(optimizer, SelectiveProjection):
            raise UsageError(f"an audit log of {type(optimizer).__name__}", "AdamSPD or SGDSPD")
        self.path = at_home(path)
        self.optimizer = optimizer
        self.every = whole("every", every, 1, "optimiser steps between lines, e.g. every=100")
        step = whole("step", step, 0, "optimiser steps already made: 0, or those of the checkpoint resumed from")
        self._said = self.header()  # what the file says of the run
        self._writes = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        carried = optimizer.activity() if step else []
        # The grid of lines is that of the state, which all ranks have: the log lies with the first.
        self._last = optimizer.since if step and optimizer.since <= step and carried else step
        optimizer.record()
        optimizer.since = self._last
        if self._writes and self._open(step) < step:
            optimizer.carry(carried)

    def _open(self, step: int) -> int:
        """Begin the file, or continue it; return the step of the last line that it keeps, 0 without one."""
        header = self._said
        if not self.path.exists() or not self.path.stat().st_size:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write([header])
            return 0
        old, lines, _ = read_lines(self.path)
        self._check_run(old)
        if step == 0 and lines:
            aside = self._aside()
            self.path.replace(aside)
            warnings.warn(f"{self.path} was the log of an earlier training: it is {aside.name} now", stacklevel=4)
            old, lines = header, []
        kept = [line for line in lines if line["step"] <= step]
        self._said = {**old, **_facts(header)}
        self._write([self._said, *kept])
        return max((int(line["step"]) for line in kept), default=0)

    def _check_run(self, old: Line) -> None:
        """Raise unless the header is of this run, as it is or as it was before groups were added."""
        if _facts(self._said) in old.get("grown_from", ()):
            return
        for key, fact in _facts(self._said).items():
            if old.get(key) != fact:
                raise UsageError(
                    f"{self.path} is the log of another run: {key} is {old.get(key)!r} there, {fact!r} now",
                    "another path, or move the file away",
                )

    def _grow(self) -> None:
        """Bring the header up to date where groups were added: a run resumed from here on has them from its start."""
        before, now = _facts(self._said), _facts(self.header())
        if before != now and self._writes and self.path.exists():
            old, lines, _ = read_lines(self.path)
            known = [facts for facts in old.get("grown_from", ()) if facts not in (before, now)]
            self._said = {**old, **now, "grown_from": [*known, before]}
            self._write([self._said, *lines])

    def _aside(self) -> Path:
        """Return a name beside the log's that is free."""
        names = (self.path.with_suffix(f".{number}{self.path.suffix}") for number in count(1))
        return next(name for name in names if not name.exists())

    def _write(self, lines: Iterable[Line]) -> None:
        """Write the file, whole or not at all."""
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text("".join(json.dumps(line) + "\n" for line in lines))
        beside.replace(self.path)

    def header(self) -> Line:
        """Return the first line."""
        chosen = self.optimizer.selection
        return {
            "format": FORMAT,
            "anchor": self.optimizer.anchor_hash,
            "partition": self.optimizer.layers_hash,
            "optimizer": type(self.optimizer).__name__,
            "granularity": chosen.granularity,
            "gate": chosen.gate,
            "row_norms": chosen.row_norms,
            "versions": {"sharpscope": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }

    def step(self, step: int) -> None:
        """Say that so many optimiser steps have been made; writes when a line is due."""
        if step - self._last >= self.every:
            self.write(step)

    def due(self, step: int) -> bool:
        """Return whether :meth:`step` would write."""
        return step - self._last >= self.every

    def write(self, step: int) -> None:
        """Write one line per layer now."""
        self._last = self.optimizer.since = step
        self._grow()
        self.append({"kind": "activity", "step": step, **line} for line in self._lines())

    def append(self, lines: Iterable[Line]) -> None:
        """Write lines and make sure that they are on disk."""
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        if self._writes and text:
            if not self.path.exists():  # moved away meanwhile: what follows is a log of its own
                self._write([self.header()])
            with self.path.open("a") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())

    def close(self, step: int) -> str:
        """Write what has not been written yet, stop counting, and return in words what the projection did."""
        if step > self._last:
            self.write(step)
        self.optimizer.record(False)
        return sentence(read_audit(self.path).activity) if self._writes else ""

    def _lines(self) -> Iterable[Line]:
        counts = {one.unit: one for one in self.optimizer.activity()}
        groups = {name: group for group, name, _ in self.optimizer.anchored()}
        parameters = {name: parameter for _, name, parameter in self.optimizer.anchored()}
        for layer, names in self.optimizer.layers.layers.items():
            units = [counts[unit] for unit in dict.fromkeys((layer, *names)) if unit in counts]
            mine = {name: parameters[name] for name in names}
            options = [groups[name] for name in names]
            yield {
                "layer": layer,
                "tensors": len(names),
                **_counted(units),
                **self._distances(mine),
                **_shared(options),
            }

    def _distances(self, parameters: Mapping[str, Tensor]) -> Line:
        """Return the distance from the anchor, of the whole layer over all ranks; relative: null for anchor zero."""
        found = []
        for name, parameter in parameters.items():
            anchor = self.optimizer.anchor_of(name, parameter)
            weights, known = [shards.local(parameter.detach())], None if anchor is None else [anchor]
            moved = projection.squares(projection.deviations(weights, known))
            own = torch.zeros_like(moved) if known is None else projection.squares(projection.widened(known))
            found.append(shards.summed(torch.stack([moved, own]), [shards.groups(parameter)]).cpu())
        distance, size = torch.cat(found, dim=1).sum(1).sqrt().tolist()
        relative = distance / size if size else None
        return {"distance": finite(distance), "relative_distance": finite(relative)}


def _facts(header: Line) -> Line:
    return {key: header.get(key) for key in _SAME}


def _counted(units: Iterable[Activity]) -> Line:
    """Return the sums over units, a unit of several tensors counting as often."""
    found = [(one.tensors, one) for one in units]
    active = sum(size * one.active for size, one in found)
    return {
        "decisions": sum(size * one.decisions for size, one in found),
        "gated": sum(size * one.gated for size, one in found),
        "active": active,
        "mean_ratio": sum(size * one.ratio for size, one in found) / active if active else 0.0,
    }


def _shared(groups: list[dict[str, Any]]) -> Line:
    """Return the mean learning rate and lambda of a layer's tensors."""
    return {
        "lr": sum(float(group["lr"]) for group in groups) / len(groups),
        "lambda": sum(float(group["decay"]) for group in groups) / len(groups),
    }
