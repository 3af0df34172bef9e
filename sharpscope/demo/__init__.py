"""An embedded pair of miniature CLIPs and images for them: a report that needs no download."""

from __future__ import annotations

import os
import shutil
import zipfile
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Literal

from sharpscope.config import Settings
from sharpscope.errors import SharpscopeError
from sharpscope.home import at_home
from sharpscope.measures import DEFAULT

Kind = Literal["success", "failure"]
ASSETS = Path(str(files(__name__) / "assets"))
ID, SHARPNESS = "id", "train"  # sets of the archive that are not OOD
ALPHAS = 11
MEASURES = (*DEFAULT, "directional")
IMAGES = 72  # that sharpness is measured on: two of each class
GROUP = 8  # images of a group of m-sharpness: nine groups, so that its error is known to a quarter of itself
MOVED = 48  # images of each set that moves of single layers are judged on
RECIPES = 16  # tried: all kinds of them, and the first steps of the search layer by layer
TOLERANCE = 3.0  # times the usual target errors: standard errors of 15 % show on every curve, in a ninth of the time
THREADS = 1  # tensors this small gain nothing from a second thread, and lose where others use the machine too
_MARK = ".archive"  # in an unpacked folder: the hash of its archive


def pair(kind: Kind = "success") -> tuple[Path, Path]:
    """Return the directories of the zero-shot and the fine-tuned CLIP.

    Parameters
    ----------
    kind
        ``"success"``: an alpha between the ends is better on the OOD sets than both. ``"failure"``: none is.
    """
    return _asset("base"), _asset(kind)


def extract(folder: str | Path) -> Path:
    """Unpack the images into ``folder/SET/CLASS/NNNN.png`` and return the folder.

    It is whole as soon as it is there; one that holds these images already is left as it is. A folder that holds
    something else is refused.
    """
    archive, place = _asset("images.zip"), at_home(folder)
    mark = sha256(archive.read_bytes()).hexdigest()
    if (place / _MARK).is_file() and (place / _MARK).read_text() == mark:
        return place
    if place.exists() and not (place / _MARK).is_file() and (not place.is_dir() or any(place.iterdir())):
        raise SharpscopeError(f"{place} exists and holds something else than the demo's images", "choose another --out")
    beside = place.with_name(f"{place.name}.{os.getpid()}.part")
    beside.mkdir(parents=True)
    try:
        with zipfile.ZipFile(archive) as images:
            images.extractall(beside)
        (beside / _MARK).write_text(mark)
        shutil.rmtree(place, ignore_errors=True)
        beside.replace(place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return place


def settings(out: str | Path, kind: Kind = "success") -> Settings:
    """Return the settings of the demo's report, after unpacking its images into ``out/images``."""
    images = extract(at_home(out) / "images")
    sets = sorted(entry.name for entry in images.iterdir() if entry.is_dir())
    zero_shot, fine_tuned = pair(kind)
    return Settings(
        zero_shot=str(zero_shot),
        fine_tuned=str(fine_tuned),
        id=str(images / ID),
        ood={name: str(images / name) for name in sets if name not in (ID, SHARPNESS)},
        sharpness_on=str(images / SHARPNESS) if SHARPNESS in sets else None,
        templates=str(_asset("templates.txt")),
        tolerance=TOLERANCE,
        threads=THREADS,
        measures=MEASURES,
        m=GROUP,
        alphas=ALPHAS,
        limit=IMAGES,
        batch_size=IMAGES // 2,  # each half has trace probes of its own
        interventions=True,
        intervention_limit=MOVED,
        recipes=True,
        recipe_limit=RECIPES,
        out=str(out),
    )


def _asset(name: str) -> Path:
    path = ASSETS / name
    if not path.exists():
        raise SharpscopeError(f"this installation lacks the demo's {name}", "pip install --force-reinstall sharpscope")
    return path
