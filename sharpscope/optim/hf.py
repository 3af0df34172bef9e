"""The audit log as a callback of transformers' Trainer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from sharpscope.optim.session import Session
from sharpscope.optim.sharpness import FEW, Measure


class Callback(TrainerCallback):
    """Logs what ``AdamSPD`` or ``SGDSPD`` holds back, and measures sharpness on the batches beside it.

    ``Trainer(..., optimizers=(optimizer, None), callbacks=[Callback(batches, every=500, audit=PATH)])``; resuming from
    a checkpoint continues the log.

    Parameters
    ----------
    batches
        Labelled batches to measure sharpness on; None: only the log.
    every
        Optimiser steps between lines.
    audit
        Path of the log, see :class:`~sharpscope.optim.audit.AuditLog`.
    measure
        What is measured on the batches.

    Attributes
    ----------
    summary
        After training, in words what the projection did.
    """

    def __init__(
        self,
        batches: Iterable[Any] | None = None,
        *,
        every: int = 500,
        audit: str | Path,
        measure: Measure = FEW,
    ) -> None:
        self._session = Session(batches, every, audit, measure)

    @property
    def summary(self) -> str:
        """In words what the projection did."""
        return self._session.summary

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **rest: Any
    ) -> None:
        """Open the log."""
        del args, control, rest
        self._session.start(optimizer, model, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Log when a line is due."""
        del args, control, rest
        self._session.step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Write the rest."""
        del args, control, rest
        self._session.stop(state.global_step)
