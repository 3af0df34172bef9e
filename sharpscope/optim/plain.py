"""The audit log around a training loop of one's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from sharpscope.optim.session import Session, unwrapped
from sharpscope.optim.sharpness import FEW, Measure


@contextmanager
def audited(
    optimizer: Any,
    audit: str | Path,
    *,
    every: int = 100,
    model: nn.Module | None = None,
    batches: Iterable[Any] | None = None,
    measure: Measure = FEW,
    step: int = 0,
) -> Iterator[Session]:
    """Log what an ``AdamSPD`` or ``SGDSPD`` does while the block runs; its steps are counted by themselves.

    Parameters
    ----------
    optimizer
        The optimiser; a wrapper is seen through.
    audit
        Path of the log, see :class:`~sharpscope.optim.audit.AuditLog`.
    every
        Optimiser steps between lines.
    model, batches, measure
        To measure sharpness at every line too, see :class:`~sharpscope.optim.sharpness.SharpnessProbe`.
    step
        Steps already made, when a run is resumed.

    Yields
    ------
    Session
        Its ``summary`` says after the block in words what the projection did.
    """
    session, done = Session(batches, every, audit, measure), step
    session.start(optimizer, model, step)

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        session.step(done)

    hook = unwrapped(optimizer).register_step_post_hook(count)
    try:
        yield session
    finally:
        hook.remove()
        session.stop(done)
