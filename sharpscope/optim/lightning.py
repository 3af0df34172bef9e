"""The audit log as a callback of Lightning."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback as LightningCallback

from sharpscope.errors import UsageError
from sharpscope.optim.selective import SelectiveProjection
from sharpscope.optim.session import Session, unwrapped
from sharpscope.optim.sharpness import FEW, Measure


class Callback(LightningCallback):
    """Logs what ``AdamSPD`` or ``SGDSPD`` holds back, and measures sharpness on the batches beside it.

    ``Trainer(callbacks=[Callback(batches, every=500, audit=PATH)])``. The module's ``forward`` must give logits for
    sharpness to be measured. With several optimisers the first of ours is logged.

    Parameters
    ----------
    batches, every, audit, measure
        As for :class:`sharpscope.optim.hf.Callback`.
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

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the log."""
        found = [unwrapped(optimizer) for optimizer in trainer.optimizers]
        ours = [optimizer for optimizer in found if isinstance(optimizer, SelectiveProjection)]
        if not ours:
            names = ", ".join(type(optimizer).__name__ for optimizer in found)
            raise UsageError(f"none of the optimisers ({names}) has something to log", "AdamSPD or SGDSPD")
        self._session.start(ours[0], pl_module, trainer.global_step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log when a line is due."""
        del pl_module, outputs, batch, batch_idx
        self._session.step(trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the rest."""
        del pl_module
        self._session.stop(trainer.global_step)
