"""Recipes worth trying: ramps over depth, projections to one radius, a layer made sparse, layers at their own alpha."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from glob import escape
from typing import Any

import numpy as np

from sharpscope.recipe import Recipe

SHARES = (0.5, 0.9)  # of a delta that are dropped


@dataclass(frozen=True)
class Sparse:
    """A layer of the best uniform mix made sparse, see :func:`sharpscope.sparsity.sparsify`."""

    layer: str
    p: float
    rescale: bool


@dataclass(frozen=True)
class Trial:
    """Weights to be tried: a recipe, and a layer of it that is made sparse."""

    name: str
    kind: str
    recipe: Recipe
    sparse: Sparse | None = None

    @property
    def key(self) -> str:
        """What determines the weights."""
        # Cells of scans that made running statistics sparse as well are answers of other weights.
        return json.dumps([self.recipe.rules, {**asdict(self.sparse), "of": "parameters"} if self.sparse else None])

    @property
    def facts(self) -> dict[str, Any]:
        """The trial as JSON values."""
        rules = None if self.sparse else [list(rule) for rule in self.recipe.rules]
        return {"name": self.name, "kind": self.kind, "rules": rules, "key": self.key}


def projected(distances: Mapping[str, float], mean: float) -> dict[str, float]:
    """Return ``min(1, radius / distance)`` per layer, the radius such that the alphas have the given mean.

    >>> projected({"near": 1.0, "far": 3.0}, 0.5)
    {'near': 0.75, 'far': 0.25}
    """
    far = np.array([d for d in distances.values() if d > 0])
    low, high = 0.0, float(far.max(initial=0.0))
    for _ in range(100):
        radius = (low + high) / 2
        low, high = (radius, high) if np.minimum(1, radius / far).mean() < mean else (low, radius)
    return {layer: round(min(1.0, high / d), 6) if d > 0 else mean for layer, d in distances.items()}


def _by_layer(name: str, kind: str, alphas: Mapping[str, float], rest: float) -> Trial:
    return Trial(name, kind, Recipe((*((escape(layer), alpha) for layer, alpha in alphas.items()), ("*", rest))))


def ramps(alpha: float, layers: list[str]) -> list[Trial]:
    """Return LiNeS ramps over the layers that rise and fall about the alpha, gently and from end to end.

    No layer leaves the path, or goes farther beyond it than the alpha does.
    """
    low, high = min(0.0, alpha), max(1.0, alpha)
    reach = min(0.25, alpha - low, high - alpha) or 0.25
    ends = dict.fromkeys(
        (min(max(first, low), high), min(max(last, low), high))
        for first, last in ((alpha - reach, alpha + reach), (alpha + reach, alpha - reach), (0.0, 1.0), (1.0, 0.0))
    )
    return [
        _by_layer(
            f"LiNeS {first:g} to {last:g}",
            "LiNeS",
            dict(zip(layers, _ramp(first, last, len(layers)), strict=True)),
            alpha,
        )
        for first, last in ends
    ]


def _ramp(first: float, last: float, count: int) -> list[float]:
    return [round(float(alpha), 6) for alpha in np.linspace(first, last, count)]


def projections(distances: Mapping[str, float], norms: Mapping[str, float], alpha: float) -> list[Trial]:
    """Return two projections with this mean alpha: to one distance, and to one distance per norm at zero-shot.

    None where nothing is shortened: at an end of the path or beyond, and where no layer went any distance.
    """
    if not 0 < alpha < 1 or not any(distances.values()):
        return []
    relative = {layer: found / (norms[layer] or 1.0) for layer, found in distances.items()}
    return [
        _by_layer(f"projected to one {word}", "projection", projected(found, alpha), alpha)
        for word, found in (("radius", distances), ("relative radius", relative))
    ]


def around(rest: float, alphas: Mapping[str, float], kind: str) -> Trial:
    """Return the trial of some layers at their own alphas, in the order given, all others at the same."""
    own = {layer: alpha for layer, alpha in alphas.items() if alpha != rest}
    words = ", ".join(f"{layer} {alpha:g}" for layer, alpha in own.items())
    return _by_layer(f"{words}, rest {rest:g}" if own else f"alpha {rest:g}", kind, own, rest)


def sparse(layer: str, alpha: float) -> list[Trial]:
    """Return the layer made sparse in the uniform mix, plain and rescaled, beside its shrink control."""
    base, found = Recipe.uniform(alpha), []
    for p in SHARES:
        for rescale, word in ((False, ""), (True, ", rescaled")):
            name = f"{layer}: {p:.0%} of its delta dropped{word}, alpha {alpha:g}"
            found.append(Trial(name, "sparsified", base, Sparse(layer, p, rescale)))
        found.append(around(alpha, {layer: round(alpha * (1 - p), 12)}, "shrunk"))
    return found
