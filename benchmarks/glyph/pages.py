"""Make the fine-tuning images and the test sets once, on the CPU, from a seed.

Usage: python pages.py bitmaps.npz pages.npz

pages.npz: for each set SET/images (n, 32, 32, 3) uint8, SET/labels (n,), SET/faces (n,) index into the face list
(-1 for scans). In the test sets, images of even and odd place within their class come from disjoint designs, so
that a choice made on one half can be judged on the other. `pool` holds the fine-tuning images in RENDERINGS draws.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from render import GLYPH, Fonts, Scene, fonts, images
from scenes import colored, corrupted, page, rotated
from torch import Tensor

PER_CLASS, RENDERINGS, PER_DESIGN, SEED = 10, 16, 2, 20261121
OOD = ("sans", "script", "decorative", "color", "rotation", "corruption", "scans")  # fixed before any result was seen
SETS = ("id", *OOD)
Shift = Callable[[Scene, torch.Generator], Scene]
SHIFTS: dict[str, tuple[str, Shift | None]] = {
    "id": ("serif", None),
    "sans": ("sans", None),
    "script": ("script", None),
    "decorative": ("decorative", None),
    "color": ("serif", colored),
    "rotation": ("serif", rotated),
    "corruption": ("serif", corrupted),
}


def face_list(archive: Path) -> tuple[Tensor, list[dict]]:
    """Return the bitmaps (faces, 62, 48, 48) and the list of faces."""
    stored = np.load(archive)
    return torch.from_numpy(stored["bitmaps"]), json.loads(str(stored["faces"]))


def chosen(faces: list[dict], split: str, style: str) -> list[list[int]]:
    """Return up to PER_DESIGN upright faces of each design of a split and style, design by design."""
    designs: dict[int, list[int]] = {}
    for i, f in enumerate(faces):
        # Slanted is what a script often is; everywhere else the page is upright.
        if f["split"] == split and f["style"] == style and (f["upright"] or style == "script"):
            designs.setdefault(f["design"], []).append(i)
    return [members[:PER_DESIGN] for members in designs.values()]


def test_set(drawn: Fonts, faces: list[dict], style: str, shift: Shift | None, generator: torch.Generator) -> dict:
    """Return images, labels and faces of a test set, PER_CLASS of each class, halves of disjoint designs."""
    designs = chosen(faces, "test", style)
    halves = [torch.tensor([i for design in designs[side::2] for i in design]) for side in (0, 1)]
    labels = torch.arange(36).repeat_interleave(PER_CLASS)
    picks = [half[torch.randint(len(half), labels.shape, generator=generator)] for half in halves]
    face = torch.where(torch.arange(len(labels)) % 2 == 0, *picks)
    scene = page(face, labels, generator)
    scene = shift(scene, generator) if shift else scene
    return {"images": _bytes(images(drawn, scene, generator)), "labels": labels.numpy(), "faces": face.numpy()}


def scans(generator: torch.Generator) -> dict:
    """Return scikit-learn's handwritten digits on the page, 36 of each, a scan between two other scans."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=generator)
    target = torch.from_numpy(data.target)[order]
    rows = torch.cat([(target == digit).nonzero()[:36, 0] for digit in range(10)])
    beside = torch.randint(len(order), (len(rows), 2), generator=generator)
    trio = torch.cat([rows[:, None], beside], 1)
    small = torch.from_numpy(data.images)[order][trio].float() / 16
    large = torch.nn.functional.interpolate(small, (30, 30), mode="bicubic").clamp(0, 1)  # capital height, to the eye
    margin = (GLYPH - 30) // 2
    drawn = fonts((torch.nn.functional.pad(large, [margin] * 4) * 255).to(torch.uint8))
    scene = page(torch.arange(len(rows)), torch.zeros(len(rows), dtype=torch.long), generator)
    scene.character[:] = torch.arange(3)
    labels = 26 + target[rows].numpy()
    return {"images": _bytes(images(drawn, scene, generator)), "labels": labels, "faces": np.full(len(rows), -1)}


def pool(drawn: Fonts, faces: list[dict], generator: torch.Generator) -> dict:
    """Return the fine-tuning images, (RENDERINGS, faces x 36, ...), with labels and faces, class by class."""
    face = torch.tensor([i for design in chosen(faces, "finetune", "serif") for i in design])
    labels = torch.arange(36).repeat_interleave(len(face))
    face = face.repeat(36)
    renderings = [_bytes(images(drawn, page(face, labels, generator), generator)) for _ in range(RENDERINGS)]
    return {"images": np.stack(renderings), "labels": labels.numpy(), "faces": face.numpy()}


def training_sample(pooled: dict) -> dict:
    """Return PER_CLASS images of each class from the pool's first rendering."""
    count = len(pooled["labels"]) // 36
    spread = np.linspace(0, count - 1, PER_CLASS).round().astype(int)
    rows = np.concatenate([c * count + np.sort((spread + c) % count) for c in range(36)])
    return {"images": pooled["images"][0][rows], "labels": pooled["labels"][rows], "faces": pooled["faces"][rows]}


def _bytes(image: Tensor) -> np.ndarray:
    return (image * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def main(archive: Path, output: Path) -> None:
    coverage, faces = face_list(archive)
    drawn, generator = fonts(coverage), torch.Generator().manual_seed(SEED)
    made = {name: test_set(drawn, faces, *SHIFTS[name], generator) for name in SHIFTS}
    made |= {"scans": scans(generator), "pool": pool(drawn, faces, generator)}
    made["train"] = training_sample(made["pool"])
    np.savez_compressed(output, **{f"{name}/{key}": value for name, s in made.items() for key, value in s.items()})
    for name, s in made.items():
        print(name, s["images"].shape, len(set(s["faces"].tolist())), "faces")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
