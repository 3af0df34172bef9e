"""Is the end of the path the fine-tuned model? Its forward against the zero-shot model's with the same weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sharpscope.curvature.recorded import shortened
from sharpscope.errors import MismatchError
from sharpscope.network import Network
from sharpscope.objective import Objective
from sharpscope.path import Path
from sharpscope.precision import matmul_precision
from sharpscope.tree import Tree

_SAME = 1e-3  # of the largest output: rounding of forwards that are written in different ways


def check_same_forward(
    objective: Objective, networks: tuple[Network, Network], constants: Tree, path: Path
) -> list[str]:
    """Raise unless the fine-tuned model computes what the zero-shot model does with its weights; return notes.

    Buffers of integers, attributes and code are not on the path: what differs in them would be the zero-shot model's at
    every alpha. In full float32: TF32 rounds forwards apart that are written in different ways. Cost: two forwards.
    """
    inputs = objective.batches[0].split(max(len(objective.batches[0].targets) // 2, 1))[0].inputs
    place = next(iter(path.start.values())).device
    own = {name: buffer.to(place) for name, buffer in networks[1].buffers.items() if name in constants}
    with torch.no_grad(), matmul_precision("highest"):
        ours = objective.outputs({**constants, **path.end}, inputs)
        try:
            theirs = replace(objective, forward=networks[1].forward).outputs({**own, **path.end}, inputs)
        except RuntimeError as refusal:  # as where a tensor that is no buffer lies on another device
            return [
                f"the fine-tuned model's own forward was not compared with the zero-shot model's: {shortened(refusal)}"
            ]
    size = float(ours.abs().max())
    gap = float((ours - theirs).abs().max()) if ours.shape == theirs.shape else math.inf
    if gap > _SAME * size:
        differing = _off_the_path(path, *(net.module.state_dict() for net in networks))
        told = f"{differing[0]!r} differs and is no floating-point tensor" if differing else "code or attributes differ"
        raise MismatchError(
            f"the zero-shot model with the fine-tuned weights gives other outputs than the fine-tuned model, by "
            f"{gap:.3g} of {size:.3g} ({told}): alpha 1 would not be that model",
            "two models that differ in floating-point weights alone",
        )
    return []


def _off_the_path(path: Path, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return the names of tensors that differ between the models and are not on the path."""
    both = [(name, ours.get(name), theirs[name]) for name in theirs if name not in path.start]
    tensors = [(name, a, b) for name, a, b in both if isinstance(a, Tensor) and isinstance(b, Tensor)]
    return [name for name, a, b in tensors if not torch.equal(a.cpu(), b.cpu())]
