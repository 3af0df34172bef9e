"""Regenerate every figure and table of the study from its stored rows: `make study`.

PYTHONPATH=. python benchmarks/study/study.py [FOLDER]     # default: figures/; about a minute on one core
"""

import io
import sys
from pathlib import Path

from drawings import drawn
from PIL import Image
from rows import rows
from writeup import findings, rendered

FIGURES = Path(__file__).parents[2] / "figures"
COLOURS, DPI = 64, 130


def small(figure: object) -> bytes:
    """Return a figure as a PNG of few colours."""
    first, second = io.BytesIO(), io.BytesIO()
    figure.savefig(first, format="png", dpi=DPI)  # type: ignore[attr-defined]
    with Image.open(first) as picture:
        picture.convert("RGB").quantize(COLOURS).save(second, format="png", optimize=True)
    return second.getvalue()


def main(folder: Path = FIGURES) -> None:
    """Write STUDY.md and the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = rows()
    found = findings(stored)
    for name, figure in drawn(stored, found).items():
        (folder / name).write_bytes(small(figure))
    (folder / "STUDY.md").write_text(rendered(found), encoding="utf-8")
    print(f"wrote {folder / 'STUDY.md'}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
