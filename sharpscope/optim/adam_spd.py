"""AdamW that takes back what a step adds to the deviation from the anchor, where the gradient pulls the other way."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sharpscope.optim.anchor import Parameters, Source
from sharpscope.optim.anchored import as_groups
from sharpscope.optim.selective import Gate, Selection, SelectiveProjection, Unit
from sharpscope.partition import Partition


class AdamSPD(SelectiveProjection, torch.optim.AdamW):
    """AdamW with Selective Projection Decay (arXiv 2411.01713).

    The plain step is made by :class:`torch.optim.AdamW` itself. Beside its state there is one copy of the anchor, and
    none for anchor zero.

    Parameters
    ----------
    params
        ``model.named_parameters()``, or groups ``{"params": [(name, parameter), ...], "decay": ..., "lr": ...}``.
    lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, fused
        As in AdamW; ``weight_decay`` is the ordinary decoupled decay towards zero, off by default. On a GPU the step is
        fused unless ``foreach`` or ``fused`` is given (torch's own default is foreach, three times slower on an H200).
    anchor
        The weights to stay near: a module, a mapping name -> tensor, ``"init"`` (the present weights), or None for
        zeros (LoRA). Found by name; copied.
    decay
        lambda: 0 is AdamW, 1 puts a tensor back on its previous distance. Between 0 and 1 no tensor ends nearer to
        the anchor than it was before the step.
    exclude
        Regular expressions; parameters whose name one is found in get the plain step and need no anchor: new
        heads, ``logit_scale``.
    granularity, gate, row_norms
        See :class:`~sharpscope.optim.selective.Selection`.
    layers
        The partition, for ``granularity="layer"`` and the audit log; default: by the names.
    store_anchor
        Put the anchors into the state dict, instead of their hashes only.

    Raises
    ------
    UsageError
        If parameters have no names, or a value cannot be meant.
    MismatchError
        If a parameter has no anchor or one of another shape; the message names it.
    ModelError
        If a parameter is sharded in a way that has no norms of whole tensors; the message names it.

    Examples
    --------
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = AdamSPD(model.named_parameters(), lr=1e-3, anchor="init", exclude=["bias"])
    >>> list(optimizer.anchors)
    ['weight']
    """

    rule = torch.optim.AdamW

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        *,
        anchor: Source,
        decay: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        exclude: str | Iterable[str] = (),
        granularity: Unit = "tensor",
        gate: Gate = "gradient",
        row_norms: bool = False,
        layers: Partition | None = None,
        store_anchor: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool | None = None,
    ) -> None:
        self._start_selective(
            anchor=anchor,
            exclude=exclude,
            store_anchor=store_anchor,
            decay=decay,
            selection=Selection(granularity, gate, row_norms),
        )
        groups = as_groups(params)
        if fused is None and foreach is None:
            fused = _all_on_gpu(groups) or None
        torch.optim.AdamW.__init__(
            self,
            groups,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            fused=fused,
        )
        self._finish_selective(layers)


def _all_on_gpu(groups: list[dict[str, Any]]) -> bool:
    """Return whether a fused step can be made; groups may hold generators, which become lists."""
    tensors = []
    for group in groups:
        if not isinstance(group["params"], Tensor):
            group["params"] = list(group["params"])
        tensors += [item[-1] if isinstance(item, tuple) else item for item in group["params"]]
    return bool(tensors) and all(t.is_cuda and t.is_floating_point() for t in tensors)
