"""Render every face's 62 characters once, drop illegible faces, split the rest by design.

Usage: python bitmaps.py ROOT faces.json bitmaps.npz

bitmaps.npz holds `bitmaps` (faces, 62, 48, 48) uint8 coverage and `faces`, the face list as JSON in the same
order, each with its `split` (pretrain, finetune, test) and its `design`: families whose letters coincide
(one foundry's Latin is reused in many scripts' fonts) share a design, so that no split sees another's letters.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
from faces import CHARACTERS
from PIL import Image, ImageDraw, ImageFont

SIZE, CAP_HEIGHT, ROOM = 48, 28, 46
CLASSES = np.array([i % 26 if i < 52 else i - 26 for i in range(62)])  # letters of either case, then digits
LEGIBLE = 0.5  # share of a face's characters that nearest neighbours among the other families recognise
SAME_DESIGN = 0.965  # mean correlation of two faces' characters above which they count as one design
RELATED = {
    "jsMath": "CMU",
    "CabinSketch": "Cabin",
    "unifur": "eurofurence",
    "monofur": "eurofurence",
    "OCR": "OCR",
    "Annapurna": "Charis",
    "Abyssinica": "Charis",
    "BIZ": "BIZ",
    "Mplus": "M",
    "STIX": "STIX",
    "DSEG": "DSEG",
}
SHARES = {"serif": (0.25, 0.35, 0.40)}  # pretrain, finetune, test, by design; the page needs unseen serifs
OTHER_SHARES = (0.60, 0.0, 0.40)


def bitmaps(path: Path) -> np.ndarray | None:
    """Return the (62, 48, 48) coverage of a font file's characters on one baseline; None for blank glyphs."""
    font = ImageFont.truetype(str(path), 100, layout_engine=ImageFont.Layout.BASIC)
    boxes = np.array([font.getbbox(c, anchor="ls") for c in CHARACTERS], dtype=float)
    widths, caps = boxes[:, 2] - boxes[:, 0], -boxes[CHARACTERS.index("H"), 1]
    height = boxes[:, 3].max() - boxes[:, 1].min()
    if widths.min() < 1 or caps < 1:
        return None
    size = 100 * min(CAP_HEIGHT / caps, ROOM / height, ROOM / np.quantile(widths, 0.9))
    font = ImageFont.truetype(str(path), max(size, 1), layout_engine=ImageFont.Layout.BASIC)
    middle = (boxes[:, 3].max() + boxes[:, 1].min()) / 2 * size / 100
    return np.stack([_glyph(font, c, SIZE / 2 - middle) for c in CHARACTERS])


def _glyph(font: ImageFont.FreeTypeFont, character: str, baseline: float) -> np.ndarray:
    left, _, right, _ = font.getbbox(character, anchor="ls")
    page = Image.new("L", (SIZE, SIZE))
    ImageDraw.Draw(page).text((SIZE / 2 - (left + right) / 2, baseline), character, fill=255, font=font, anchor="ls")
    return np.asarray(page)


def shapes(pages: np.ndarray) -> np.ndarray:
    """Return the characters as unit vectors of their centred, 16x16 coverage, (faces, 62, 256)."""
    small = pages.reshape(*pages.shape[:2], 16, 3, 16, 3).mean((3, 5)).reshape(*pages.shape[:2], -1)
    centred = small - small.mean(-1, keepdims=True)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), 1e-9)
    return unit.astype(np.float32)


def legibility(vectors: np.ndarray, families: list[str]) -> np.ndarray:
    """Return, per face, the share of its characters whose nearest shape in other families has the same class."""
    flat, owner = vectors.reshape(-1, vectors.shape[-1]), np.repeat(families, len(CLASSES))
    labels = np.tile(CLASSES, len(vectors))
    scores = []
    for face, family in zip(vectors, families, strict=True):
        likeness = face @ flat.T
        likeness[:, owner == family] = -1
        scores.append((labels[likeness.argmax(1)] == CLASSES).mean())
    return np.array(scores)


def designs(vectors: np.ndarray, names: list[str]) -> list[int]:
    """Return a number per face, equal where the names or (nearly) all characters are equal, and so on along chains."""
    flat = vectors.reshape(len(vectors), -1)
    same = flat @ flat.T / vectors.shape[1] > SAME_DESIGN
    names = np.array(names)
    same |= names[:, None] == names[None, :]
    label = np.arange(len(same))
    while True:
        merged = np.where(same, label[None, :], len(label)).min(1)
        if (merged == label).all():
            return label.tolist()
        label = merged


def kin(face: dict) -> str:
    """Return what a face's relatives share: the first word of the family's name, and the style."""
    word = re.split(r"[ _-]", face["family"])[0]
    return next((name for start, name in RELATED.items() if word.startswith(start)), word) + "/" + face["style"]


def splits(faces: list[dict], seed: int = 0) -> list[str]:
    """Return each face's split: designs shuffled within their style, then dealt out by SHARES."""
    random = np.random.default_rng(seed)
    parts: dict[int, str] = {}
    styles = {f["design"]: f["style"] for f in reversed(faces)}
    for style in sorted(set(styles.values())):
        members = random.permutation([d for d, s in styles.items() if s == style])
        cuts = np.cumsum(SHARES.get(style, OTHER_SHARES))[:2] * len(members)
        for name, chunk in zip(
            ("pretrain", "finetune", "test"), np.split(members, cuts.round().astype(int)), strict=True
        ):
            parts |= dict.fromkeys(chunk.tolist(), name)
    return [parts[f["design"]] for f in faces]


def located(root: Path) -> dict[tuple[str, str], Path]:
    """Return (package, file name) -> path from the listing unpack.sh wrote."""
    lines = (line.split(maxsplit=1) for line in (root / "fonts.list").read_text().splitlines())
    return {(package, Path(path).name): root / path for package, path in lines}


def main(root: Path, listing: Path, output: Path) -> None:
    paths = located(root)
    drawn = [(f, bitmaps(paths[f["package"], f["file"]])) for f in json.loads(listing.read_text())]
    drawn = [(f, page) for f, page in drawn if page is not None]
    pages = np.stack([page for _, page in drawn])
    legible = legibility(shapes(pages), [f["family"] for f, _ in drawn]) >= LEGIBLE
    pages, faces = pages[legible], [f for (f, _), kept in zip(drawn, legible, strict=True) if kept]
    for f, design in zip(faces, designs(shapes(pages), [kin(f) for f in faces]), strict=True):
        f["design"] = design
    for f, split in zip(faces, splits(faces), strict=True):
        f["split"] = split
    np.savez_compressed(output, bitmaps=pages, faces=json.dumps(faces, ensure_ascii=False))
    print(len(faces), "legible faces,", len({f["design"] for f in faces}), "designs")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
