"""Weight norm written out: torch differentiates its fused kernel twice as if the norms were constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode


class PlainWeightNorm(TorchFunctionMode):
    """Computes ``g v / |v|`` of ``torch.nn.utils.weight_norm``, old and new, by operations that are right twice."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") == "_weight_norm":
            return _written_out(*args, **kwargs)
        return function(*args, **kwargs)


def _written_out(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def has_weight_norm(module: nn.Module) -> bool:
    """Return whether a weight of the module is under ``torch.nn.utils.weight_norm``, old or new."""
    return any(
        isinstance(sub, _WeightNorm) or any(isinstance(hook, WeightNorm) for hook in sub._forward_pre_hooks.values())
        for sub in module.modules()
    )
