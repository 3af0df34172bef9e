"""Measure the straight path from the base to its fine-tunes, and say honestly what it shows."""

from collections import defaultdict

import numpy as np
import torch
from finetune import _as_pixels, zero_shot_head
from pages import OOD, SETS
from torch import Tensor
from tower import Weights, encoded_images, image_weights

Right = dict[str, np.ndarray]
Faces = dict[str, np.ndarray] | None
ALPHAS = tuple(round(0.1 * i, 1) for i in range(11))


def correctness(base: Weights, towers: Weights, sets: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return, per set, which images each point of each run's path gets right, (runs, alphas, images) bool."""
    with torch.no_grad():
        head, start = zero_shot_head(base), image_weights(base)
    right: dict[str, list[Tensor]] = {name: [] for name in SETS}
    pixels = {name: _as_pixels(torch.from_numpy(sets[f"{name}/images"]).to(head.device)) for name in SETS}
    labels = {name: torch.from_numpy(sets[f"{name}/labels"]).to(head.device) for name in SETS}
    steps = torch.tensor(ALPHAS, device=head.device)
    for run in range(len(next(iter(towers.values())))):
        path = {n: torch.lerp(w[None], towers[n][run][None], steps.view(-1, *[1] * w.dim())) for n, w in start.items()}
        for name in SETS:
            right[name].append(_right(path, head, pixels[name], labels[name]))
    return {name: torch.stack(values).cpu().numpy() for name, values in right.items()}


@torch.no_grad()
def _right(path: Weights, head: Tensor, pixels: Tensor, labels: Tensor) -> Tensor:
    logits = torch.vmap(encoded_images, in_dims=(0, None))(path, pixels) @ head.T
    return logits.argmax(-1) == labels


def accuracy(right: dict[str, np.ndarray], half: int | None = None) -> dict[str, np.ndarray]:
    """Return accuracies in per cent of each set and of `ood`, their mean, over all images or one half of them.

    `right` maps set -> (..., alphas, images); half 0 / 1: images of even / odd place, from disjoint designs.
    """
    part = slice(None) if half is None else slice(half, None, 2)
    table = {name: 100 * right[name][..., part].mean(-1) for name in SETS}
    return table | {"ood": np.mean([table[name] for name in OOD], 0)}


def paired(right: Right, one: int, other: int, half: int | None = None, faces: Faces = None) -> tuple[float, float]:
    """Return the OOD accuracy at alpha number `one` minus that at `other`, and its 95 % half-width, in points.

    Paired over the same images; the sets are averaged with equal weight. `right` maps set -> (alphas, images).
    With `faces` (set -> face of each image, negative: none) the images of one face count as one observation, over all
    sets: what the interval would be for new faces and not only for new images of these.
    """
    part = slice(None) if half is None else slice(half, None, 2)
    mean, shares = 0.0, defaultdict(float)
    for name in OOD:
        difference = 100.0 * (right[name][one, part].astype(float) - right[name][other, part])
        mean += difference.mean() / len(OOD)
        owner = np.full(len(difference), -1) if faces is None else faces[name][part]
        for i, (value, face) in enumerate(zip(difference - difference.mean(), owner, strict=True)):
            shares[int(face) if face >= 0 else f"{name}/{i}"] += value / len(difference) / len(OOD)
    half_width = 1.96 * sum(share**2 for share in shares.values()) ** 0.5
    return round(float(mean), 3), round(float(half_width), 3)


def verdict(right: Right, faces: Faces = None) -> dict[str, object]:
    """Return alpha chosen on the even half and, on the odd half, its gain over both ends with 95 % half-widths."""
    best = int(accuracy(right, half=0)["ood"][1:-1].argmax()) + 1
    inside = range(1, len(ALPHAS) - 1)
    return {
        "alpha": ALPHAS[best],
        "over_zero_shot": paired(right, best, 0, 1, faces),
        "over_fine_tuned": paired(right, best, -1, 1, faces),
        "best_interior_over_zero_shot_all_images": max(paired(right, i, 0, None, faces) for i in inside),
    }
