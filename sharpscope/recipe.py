"""A recipe: which alpha each layer gets. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

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
        If the last pattern is not ``"*"``, a rule is no pair, or an alpha is not a finite number.

    Examples
    --------
    >>> Recipe((("visual.block.1*", 0.0), ("*", 0.5))).alphas(["visual.block.09", "visual.block.10"])
    {'visual.block.09': 0.5, 'visual.block.10': 0.0}
    """

    rules: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(_rule(rule) for rule in self.rules))
        if not self.rules or self.rules[-1][0] != "*":
            last = self.rules[-1][0] if self.rules else None
            raise UsageError(f"the recipe's last pattern is {last!r}", "end with '*', the alpha of all other layers")

    @classmethod
    def uniform(cls, alpha: float) -> Recipe:
        """Return the recipe that gives every layer the same alpha."""
        return cls((("*", alpha),))

    def alphas(self, layers: Iterable[str]) -> dict[str, float]:
        """Return layer id -> alpha."""
        return {layer: next(a for pattern, a in self.rules if fnmatchcase(layer, pattern)) for layer in layers}


def _rule(rule: Any) -> tuple[str, float]:
    """Return a rule with its alpha as Python's own number, which can be written: those of numpy are taken too."""
    if not isinstance(rule, Sequence) or len(rule) != 2 or not isinstance(rule[0], str):
        raise UsageError(f"rule {rule!r} of the recipe is no pair of a pattern and an alpha", "('visual.*', 0.5)")
    pattern, alpha = rule
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not math.isfinite(alpha):
        raise UsageError(f"the recipe gives {pattern!r} the alpha {alpha!r}", "use a finite number")
    return pattern, float(alpha)
