"""Accuracy along each path and at every mix, sparsified layer and random move that the hypotheses need.

Rows, accuracies in per cent; half a: images of even place, half b: of odd place.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from finetune import _as_pixels
from sets import OOD, SETS, Sets
from torch import Tensor
from tower import Weights, encoded_images

from sharpscope.partition import partition
from sharpscope.path import Path
from sharpscope.sparsity import sparsify
from sharpscope.stragglers.label_free import MEAN_OOD, Answers, label_free
from sharpscope.tree import gaussian, norm, select

ALPHAS = tuple(round(0.1 * i, 1) for i in range(11))
BASES, FACTORS, SHARES, RANDOM = (0.3, 0.5, 0.7, 1.0), (0.0, 0.1, 0.5), (0.5, 0.9), 2
ENDS = (0.0, 0.25, 0.5, 0.75, 1.0)
DISTURBED = (0.5, 1.0)  # mixes in which layers are sparsified or moved at random
CHUNK = 24  # weights evaluated side by side


class Place(NamedTuple):
    """A point in weight space: what was done to which layer, in which uniform mix, and how much of it."""

    kind: str  # layer (own alpha), sparse, zeroed, random, LiNeS
    layer: str
    alpha: float  # of the others; LiNeS: of the first layer
    amount: float  # layer: share of alpha left to it; sparse, zeroed: share dropped; random: draw; LiNeS: last alpha


class Line:
    """The straight line between two image towers, layer by layer; uniform mixes are made once."""

    def __init__(self, start: Weights, end: Weights) -> None:
        self.path, self.layers = Path(start, end), partition(list(start)).layers
        self.uniform = {alpha: self.path(alpha) for alpha in sorted({*ALPHAS, *BASES})}

    def distances(self) -> dict[str, float]:
        """Return the norm of each layer's delta."""
        delta = self.path.delta
        return {layer: norm(select(delta, names)) for layer, names in self.layers.items()}

    def _at(self, names: tuple[str, ...], alpha: float) -> Weights:
        return {n: torch.lerp(self.path.start[n], self.path.end[n], alpha) for n in names}

    def places(self) -> Iterator[tuple[Place, Weights]]:
        """Yield every point but the uniform ones."""
        for alpha in BASES:
            for layer, names in self.layers.items():
                for share in FACTORS:
                    yield Place("layer", layer, alpha, share), self.uniform[alpha] | self._at(names, share * alpha)
                if alpha in DISTURBED:
                    yield from self._disturbed(layer, names, alpha)
        for first in ENDS:
            for last in ENDS:
                if first != last:
                    ramp = zip(self.layers.values(), np.linspace(first, last, len(self.layers)), strict=True)
                    mixed = {n: w for names, alpha in ramp for n, w in self._at(names, float(alpha)).items()}
                    yield Place("LiNeS", "all", first, last), mixed

    def _disturbed(self, layer: str, names: tuple[str, ...], alpha: float) -> Iterator[tuple[Place, Weights]]:
        base = self.uniform[alpha]
        start, here = select(self.path.start, names), select(base, names)
        for share in SHARES:
            yield Place("sparse", layer, alpha, share), base | sparsify(start, here, share)
            yield Place("zeroed", layer, alpha, share), base | sparsify(start, here, share, target="weight")
        length = norm({n: here[n] - start[n] for n in names})
        for draw in range(RANDOM):
            noise = gaussian(here, "study", layer, draw)
            size = length / norm(noise)
            yield Place("random", layer, alpha, float(draw)), base | {n: here[n] + size * noise[n] for n in names}


class Judge:
    """The test sets on a device, and a base's head."""

    def __init__(self, sets: Sets, head: Tensor) -> None:
        self.head = head
        self.pixels = torch.cat([_as_pixels(torch.from_numpy(sets[s]["images"]).to(head.device)) for s in SETS])
        self.labels = torch.cat([torch.from_numpy(sets[s]["labels"]).to(head.device) for s in SETS])
        ends = np.cumsum([0, *(len(sets[s]["labels"]) for s in SETS)])
        self.slices = {s: slice(int(a), int(b)) for s, a, b in zip(SETS, ends[:-1], ends[1:], strict=True)}

    @torch.no_grad()
    def answers(self, some: list[Weights]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return correctness, confidence and loss of each image, (weights, images) each."""
        stacked = {n: torch.stack([w[n] for w in some]) for n in some[0]}
        logits = torch.vmap(encoded_images, in_dims=(0, None))(stacked, self.pixels) @ self.head.T
        loss = F.cross_entropy(logits.transpose(1, 2), self.labels.expand(len(some), -1), reduction="none")
        right = logits.argmax(-1) == self.labels
        return tuple(t.cpu().numpy() for t in (right, logits.softmax(-1).amax(-1), loss))  # type: ignore[return-value]

    def halves(self, right: np.ndarray) -> dict[str, tuple[float, float]]:
        """Return the per cent right of each set, on both halves."""
        parts = {s: right[place] for s, place in self.slices.items()}
        return {s: (100 * float(p[::2].mean()), 100 * float(p[1::2].mean())) for s, p in parts.items()}

    def path_rows(self, model: str, line: Line) -> tuple[list[tuple], list[tuple]]:
        """Return rows (model, alpha, set, a, b, loss) and, without OOD labels, (model, alpha, estimator, estimate)."""
        right, confidence, loss = self.answers([line.uniform[alpha] for alpha in ALPHAS])
        rows, known = [], {}
        for i, alpha in enumerate(ALPHAS):
            for s, (a, b) in self.halves(right[i]).items():
                place = self.slices[s]
                known[alpha, s] = Answers(right[i, place], confidence[i, place])
                rows.append((model, alpha, s, a, b, float(loss[i, place].mean())))
        found = label_free(known, "id", list(OOD))
        found = found[found["split"] == MEAN_OOD]
        names = zip(found["alpha"], found["estimator"], found["estimate"], strict=True)
        return rows, [(model, *row) for row in names]

    def point_rows(self, model: str, line: Line) -> list[tuple]:
        """Return rows (model, kind, layer, alpha, amount, id_a, id_b, ood_a, ood_b)."""
        places, rows = list(line.places()), []
        for start in range(0, len(places), CHUNK):
            some = places[start : start + CHUNK]
            right, _, _ = self.answers([w for _, w in some])
            for (place, _), mine in zip(some, right, strict=True):
                found = self.halves(mine)
                ood = np.mean([found[s] for s in OOD], axis=0)
                rows.append((model, *place, *found["id"], *map(float, ood)))
        return rows
