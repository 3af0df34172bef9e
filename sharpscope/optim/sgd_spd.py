"""SGD that takes back what a step adds to the deviation from the anchor, where the gradient pulls the other way."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from sharpscope.optim.anchor import Parameters, Source
from sharpscope.optim.anchored import as_groups
from sharpscope.optim.selective import Gate, Selection, SelectiveProjection, Unit
from sharpscope.partition import Partition


class SGDSPD(SelectiveProjection, torch.optim.SGD):
    """SGD with Selective Projection Decay (arXiv 2411.01713).

    Without momentum a small step against the gradient cannot grow the deviation that the gradient pulls back, so the
    projection has next to nothing to do: use momentum.

    Parameters
    ----------
    params, anchor, decay, exclude, granularity, gate, row_norms, layers, store_anchor
        See :class:`~sharpscope.optim.adam_spd.AdamSPD`.
    lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, fused
        As in :class:`torch.optim.SGD`: its ``weight_decay`` is added to the gradient, inside the momentum.

    Raises
    ------
    UsageError, MismatchError, ModelError
        As :class:`~sharpscope.optim.adam_spd.AdamSPD`.
    """

    rule = torch.optim.SGD

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        *,
        anchor: Source,
        decay: float = 1.0,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        exclude: str | Iterable[str] = (),
        granularity: Unit = "tensor",
        gate: Gate = "gradient",
        row_norms: bool = False,
        layers: Partition | None = None,
        store_anchor: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        self._start_selective(
            anchor=anchor,
            exclude=exclude,
            store_anchor=store_anchor,
            decay=decay,
            selection=Selection(granularity, gate, row_norms),
        )
        torch.optim.SGD.__init__(
            self,
            as_groups(params),
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
        )
        self._finish_selective(layers)
