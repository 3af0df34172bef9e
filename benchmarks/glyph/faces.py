"""List the faces that may be used: read the packages' licences, keep the free ones, name each face's style.

Usage: python faces.py ROOT faces.json     (ROOT: where the font packages were unpacked, or /)
"""

import json
import re
import string
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

from fontTools.ttLib import TTFont, TTLibError

CHARACTERS = string.ascii_lowercase + string.ascii_uppercase + string.digits
PER_FAMILY = 6  # a family of forty weights would otherwise fill the pre-training set
LICENCES = {"OFL": r"OFL|SIL|Open Font", "public domain": r"public[- ]domain|CC0", "Apache-2.0": r"Apache"}
# Copyright files older than the machine-readable format say it in prose.
PROSE = {"OFL": r"licensed under the\s+SIL\s+Open\s+Font\s+License", "public domain": r"License:\s+Public Domain"}


@dataclass(frozen=True)
class Face:
    """One font file: where it came from and what kind of letters it holds."""

    package: str
    file: str
    family: str
    name: str
    licence: str
    style: str
    upright: bool
    weight: int


def licence(copyright_text: str) -> str | None:
    """Return the licence of the fonts of a package, None unless it is OFL, public domain or Apache."""
    stanza = re.search(r"^Files:\s*\*(.*?)(?=^Files:|\Z)", copyright_text, re.M | re.S)
    stated = re.search(r"^License:[ \t]*(\S.*)$", stanza[1], re.M) if stanza else None
    if stated is None:
        return next((name for name, prose in PROSE.items() if re.search(prose, copyright_text)), None)
    # "OFL or GPL" leaves us the choice; "OFL and EPL" does not.
    for choice in re.split(r"\bor\b|\|", stated[1]):
        parts = [_free(part) for part in re.split(r"\band\b", choice)]
        if all(parts):
            return parts[0]
    return None


def _free(part: str) -> str | None:
    return next((name for name, pattern in LICENCES.items() if re.search(pattern, part)), None)


def styles(table: Path) -> list[tuple[re.Pattern[str], str]]:
    """Return (family pattern, style) pairs from a file of lines `style: pattern, pattern, ...`."""
    pairs = []
    for line in table.read_text().splitlines():
        style, _, patterns = line.partition(":")
        pairs += [(re.compile(pattern.strip()), style) for pattern in patterns.split(",") if pattern.strip()]
    return pairs


def face(path: Path, package: str, free: str, table: list[tuple[re.Pattern[str], str]]) -> Face | None:
    """Return the face in a font file, None where a letter or digit is missing or the style table skips it."""
    try:
        font = TTFont(path, lazy=True)
        covered, names, metrics = font.getBestCmap(), font["name"], font["OS/2"]
        italic = font["post"].italicAngle != 0 or bool(metrics.fsSelection & 1)
    except (TTLibError, KeyError, AssertionError):
        return None
    if not covered or any(ord(c) not in covered for c in CHARACTERS):
        return None
    family = names.getDebugName(16) or names.getDebugName(1) or path.stem
    style = next((style for pattern, style in table if pattern.match(family)), "unknown")
    full = names.getDebugName(4) or path.stem
    italic = italic or bool(re.search("italic|oblique|slanted", full, re.I))
    return Face(package, path.name, family, full, free, style, not italic, int(metrics.usWeightClass))


def owners(root: Path, packages: list[str]) -> dict[str, str]:
    """Return package -> free licence for those packages whose fonts we may use."""
    texts = {p: root / "usr/share/doc" / p / "copyright" for p in packages}
    found = {p: licence(t.read_text(errors="replace")) for p, t in texts.items() if t.exists()}
    return {package: free for package, free in found.items() if free}


def files(listing: Path) -> dict[str, list[str]]:
    """Return package -> its font files, from lines `package path` (unpack.sh writes them)."""
    grouped = defaultdict(list)
    for line in listing.read_text().splitlines():
        package, path = line.split(maxsplit=1)
        grouped[package].append(path)
    return grouped


def thinned(faces: list[Face]) -> list[Face]:
    """Return at most PER_FAMILY faces of each family, upright and regular first, one per (weight, slant)."""
    families = defaultdict(dict)
    for f in sorted(faces, key=lambda f: (not f.upright, abs(f.weight - 400), f.name, f.file)):
        families[f.family].setdefault((f.upright, f.weight), f)
    return [f for family in sorted(families) for f in list(families[family].values())[:PER_FAMILY]]


def main(root: Path, output: Path) -> None:
    here = Path(__file__).parent
    listing = files(root / "fonts.list")
    table = styles(here / "styles.txt")
    faces = []
    for package, free in sorted(owners(root, sorted(listing)).items()):
        found = (face(root / path, package, free, table) for path in sorted(listing[package]))
        faces += [f for f in found if f is not None and f.style != "skip"]
    kept = thinned(faces)
    unknown = sorted({f.family for f in kept if f.style == "unknown"})
    if unknown:
        raise SystemExit(f"styles.txt names no style for: {', '.join(unknown)}")
    output.write_text(json.dumps([asdict(f) for f in kept], indent=0, ensure_ascii=False))
    print(len(kept), "faces of", len({f.family for f in kept}), "families")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
