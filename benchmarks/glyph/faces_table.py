"""Name the faces behind the weights and the images, with their packages and licences."""

from collections import defaultdict

import numpy as np
from pages import SETS

HEAD = """# Faces

The weights were trained on, and the images show, bitmaps of the faces below, taken from Debian's font packages.
Licences as stated in each package's `/usr/share/doc/PACKAGE/copyright`: {licences}. No font file is shipped.
No family, and no design shared by several families, is in more than one split. Counts are faces used.

The `scans` images are derived from the *Optical Recognition of Handwritten Digits* data set (E. Alpaydin,
C. Kaynak, 1998; UCI Machine Learning Repository, https://archive.ics.uci.edu/dataset/80, CC BY 4.0) as
distributed with scikit-learn: 8x8 scans enlarged, placed side by side and lightly blurred.
"""
SPLITS = {
    "pretrain": "Pre-training: `base/`, and through it all three models",
    "finetune": "Fine-tuning: `success/`, `failure/`, images `train/`",
    "test": "Test: images `id/` and the shifted sets",
}


def used(faces: list[dict], pages: dict[str, np.ndarray]) -> list[dict]:
    """Return the faces that some weight or image derives from."""
    shown = {int(i) for name in [*SETS, "pool"] for i in pages[f"{name}/faces"]}
    return [f for i, f in enumerate(faces) if f["split"] == "pretrain" or i in shown]


def faces_page(faces: list[dict], pages: dict[str, np.ndarray]) -> str:
    """Return FACES.md: per split, a table of family, style, number of faces, package and licence."""
    kept = used(faces, pages)
    licences = sorted({f["licence"] for f in kept})
    counts = ", ".join(f"{name} ({sum(f['licence'] == name for f in kept)} faces)" for name in licences)
    text = [HEAD.format(licences=counts)]
    for split, title in SPLITS.items():
        rows: dict[tuple[str, ...], int] = defaultdict(int)
        for f in kept:
            if f["split"] == split:
                rows[f["family"], f["style"], f["package"], f["licence"]] += 1
        text.append(f"## {title} ({sum(rows.values())} faces of {len(rows)} families)\n")
        text.append("| family | style | faces | package | licence |\n|---|---|---|---|---|")
        text += [f"| {a} | {b} | {n} | {c} | {d} |" for (a, b, c, d), n in sorted(rows.items())]
        text.append("")
    return "\n".join(text)
