"""One training run being watched: the audit log and the sharpness beside it, for every kind of loop."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from sharpscope.errors import UsageError
from sharpscope.home import at_home
from sharpscope.optim.audit import AuditLog
from sharpscope.optim.selective import SelectiveProjection
from sharpscope.optim.sharpness import FEW, Measure, SharpnessProbe


class Session:
    """What the callbacks share.

    Parameters
    ----------
    batches
        Labelled batches to measure sharpness on; None: only the log.
    every
        Optimiser steps between lines.
    audit
        Path of the log.
    measure
        What is measured on the batches.
    """

    def __init__(self, batches: Iterable[Any] | None, every: int, audit: str | Path, measure: Measure = FEW) -> None:
        self._batches, self._measure = batches, measure
        self.every, self.path = every, at_home(audit)
        self._probe: SharpnessProbe | None = None
        self._log: AuditLog | None = None
        self._module: nn.Module | None = None
        self.summary = ""  #: in words what the projection did, after :meth:`stop`

    def start(self, optimizer: Any, module: nn.Module | None, step: int) -> None:
        """Open the log; ``step`` optimiser steps have been made. Batches that cannot be measured on are refused now."""
        self._probe = None if self._batches is None else SharpnessProbe(self._batches, self._measure)
        if self._probe is not None:
            if module is None:
                raise UsageError("batches are given, but no model to measure on", "model=...")
            self._probe.check(module)
        self._module = module
        self._log = AuditLog(self.path, unwrapped(optimizer), every=self.every, step=step)

    def step(self, step: int) -> None:
        """Say that so many optimiser steps have been made."""
        if self._log is None or not self._log.due(step):
            return
        self._log.write(step)
        if self._probe is not None and self._module is not None:
            self._log.append(self._probe.lines(self._module, self._log.optimizer.layers, step))

    def stop(self, step: int) -> None:
        """Write the rest, and say in words what the projection did in ``summary``."""
        if self._log is not None:
            self.summary = self._log.close(step)
            self._log = None


def unwrapped(optimizer: Any) -> Any:
    """Return the optimiser inside those of accelerate and Lightning."""
    seen = 0
    while not isinstance(optimizer, SelectiveProjection) and seen < 5:
        inner = getattr(optimizer, "optimizer", getattr(optimizer, "_optimizer", None))
        if inner is None:
            break
        optimizer, seen = inner, seen + 1
    return optimizer
