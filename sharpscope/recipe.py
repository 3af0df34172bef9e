"""A recipe: which alpha each layer gets. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from sharpscope.errors import UsageError

CONVENTION = "alpha 0 = zero-shot (start), alpha 1 = fine-tuned (end)"


@dataclass(frozen=True)
class Recipe:
    """Layer patterns with their alphas; the first pattern that matches a layer's id wins.

    Parameters
    ----------
    rules
        Pairs of a pattern (as of :mod:`fnmatch`) and an alpha: 0 is zero-shot, 1 is fine-tuned. The last pattern
        is ``"*"``, so that no layer is without an alpha.

    Raises
    ------
    UsageError
        If the last pattern is not ``"*"``, or an alpha is not a finite number.

    Examples
    --------
    >>> Recipe((("visual.block.1*", 0.0), ("*", 0.5))).alphas(["visual.block.09", "visual.block.10"])
    {'visual.block.09': 0.5, 'visual.block.10': 0.0}
    """

    rules: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        if not self.rules or self.rules[-1][0] != "*":
            last = self.rules[-1][0] if self.rules else None
            raise UsageError(f"the recipe's last pattern is {last!r}", "end with '*', the alpha of all other layers")
        for pattern, alpha in self.rules:
            if not math.isfinite(alpha):
                raise UsageError(f"the recipe gives {pattern!r} the alpha {alpha}", "use a finite number")

    @classmethod
    def uniform(cls, alpha: float) -> Recipe:
        """Return the recipe that gives every layer the same alpha."""
        return cls((("*", alpha),))

    def alphas(self, layers: Iterable[str]) -> dict[str, float]:
        """Return layer id -> alpha."""
        return {layer: next(a for pattern, a in self.rules if fnmatchcase(layer, pattern)) for layer in layers}
