"""The study's images and faces: thirds of the pre-training designs, the fine-tuning pool, nine test sets.

Made anew from the bitmaps of `../glyph` with a seed of their own, by its code; unseen designs in every test set.
"""

from pathlib import Path

import numpy as np
import torch
from pages import SHIFTS, face_list, pool, scans, test_set, training_sample
from render import fonts

SEED, BASES = 20261122, 3
DRAWN = {"id": SHIFTS["id"], "sans": SHIFTS["sans"], "mono": ("mono", None)} | {
    name: SHIFTS[name] for name in ("script", "decorative", "color", "rotation", "corruption")
}
OOD = (*(name for name in DRAWN if name != "id"), "scans")
SETS = ("id", *OOD)
Sets = dict[str, dict[str, np.ndarray]]


def image_sets(archive: Path) -> Sets:
    """Return set -> images (n, 32, 32, 3), labels, faces; `pool` has its renderings as first axis, `train` is of it."""
    coverage, faces = face_list(archive)
    drawn, generator = fonts(coverage), torch.Generator().manual_seed(SEED)
    made = {name: test_set(drawn, faces, *DRAWN[name], generator) for name in DRAWN}
    made |= {"scans": scans(generator), "pool": pool(drawn, faces, generator)}
    return made | {"train": training_sample(made["pool"])}


def own_faces(faces: list[dict], base: int) -> list[dict]:
    """Return the face list with only this base's third of the pre-training designs left in that split.

    Designs are dealt out within style in random order, each to the base with the fewest faces of that style so far.
    """
    draw = np.random.default_rng(SEED)
    owner: dict[int, int] = {}
    for style in sorted({f["style"] for f in faces}):
        counts: dict[int, int] = {}
        for f in faces:
            if f["split"] == "pretrain" and f["style"] == style:
                counts[f["design"]] = counts.get(f["design"], 0) + 1
        load = [0] * BASES
        for design in draw.permutation(sorted(counts)):
            fewest = load.index(min(load))
            owner.setdefault(int(design), fewest)
            load[fewest] += counts[int(design)]
    return [f if f["split"] != "pretrain" or owner[f["design"]] == base else f | {"split": "unused"} for f in faces]
