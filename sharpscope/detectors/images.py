"""Which model on which images: names in rules to alphas and to what is stored for every image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from sharpscope.errors import MeasurementError, UsageError, nearest
from sharpscope.stragglers.recommendation import halves
from sharpscope.table import Array, cell_key

if TYPE_CHECKING:
    from sharpscope.result import ScanResult

Examples = Mapping[str, Array]  # "correct", "confidence", "loss" -> (n,)

MEAN_OOD = "mean OOD"
ENDS = {"zero-shot": 0.0, "fine-tuned": 1.0}
CANDIDATE = "candidate"
CHOSEN = (CANDIDATE, "uniform best")  #: models that were picked by half of the images
MODELS = (*ENDS, *CHOSEN, "alpha 0.5")
ALPHA = "alpha "


def model_named(name: str) -> str:
    """Return the name if it can mean a model of the path, else raise ``UsageError`` with the nearest one."""
    if name in ENDS or name in CHOSEN or _number(name) is not None:
        return name
    raise UsageError(f"{name!r} is no model", nearest(name, MODELS))


def _number(name: str) -> float | None:
    try:
        found = float(name.removeprefix(ALPHA)) if name.startswith(ALPHA) else math.nan
    except ValueError:
        return None
    return found if math.isfinite(found) else None  # NaN is as near to one alpha as to any


def check_apart(model: str, versus: str) -> None:
    """Raise ``UsageError`` if two names are of the same model whatever was measured: a change of nothing is none."""
    one, other = (ENDS.get(name, _number(name)) for name in (model, versus))
    if model == versus or (one is not None and one == other):
        raise UsageError(f"{model!r} is compared with itself, as {versus!r}", f"another one of {', '.join(MODELS)}")


def check_keep_id(keep_id: float | None, *models: str | None) -> None:
    """Raise ``UsageError`` for points of ID accuracy that a candidate may give up, where none of the models is one."""
    if keep_id is not None and CANDIDATE not in models:
        named = " and ".join(repr(model) for model in models if model is not None)
        raise UsageError(
            f"keep_id = {keep_id:g} changes nothing: it moves the {CANDIDATE}, and the rule is about {named}",
            f"leave it out, or model = {CANDIDATE!r}",
        )


def alpha_of(result: ScanResult, name: str, keep_id: float | None = None) -> float:
    """Return the alpha that a model's name stands for; ``UsageError`` if it was not evaluated.

    ``candidate`` is the recommended alpha, with at most ``-keep_id`` points of ID accuracy given up; ``uniform best``
    the one recommended whatever it costs on ID.
    """
    if name in CHOSEN:
        return _recommended(result, keep_id if name == CANDIDATE else None)
    wanted = ENDS.get(name, _number(name))
    scanned = sorted(map(float, result.meta["alphas"]))
    near = min(scanned, key=lambda alpha: abs(alpha - wanted), default=None)  # type: ignore[operator]
    if near is None or wanted is None or abs(near - wanted) > 1e-9:
        known = ", ".join(f"{alpha:g}" for alpha in scanned) or "none"
        raise UsageError(
            f"{name!r} was not scanned; alphas: {known}", f"nearest: 'alpha {near:g}'" if scanned else None
        )
    return near


def _recommended(result: ScanResult, keep_id: float | None) -> float:
    """Return the recommended alpha, kept with the result as its tables are: every rule about the candidate asks."""
    known: dict[float | None, float] = vars(result).setdefault("_recommended", {})
    if keep_id not in known:
        known[keep_id] = result.recommend(keep_id).alpha
    return known[keep_id]


def splits_of(result: ScanResult, name: str) -> list[str]:
    """Return the data sets that a split's name stands for: itself, or every OOD set for ``mean OOD``.

    Raises
    ------
    UsageError
        For a name that is no split, with the nearest one.
    MeasurementError
        For the mean over OOD sets of a scan without any.
    """
    if name in (MEAN_OOD, "ood mean"):
        if not result.ood_splits:
            raise MeasurementError("the scan holds no OOD set", "scan again with --ood NAME=DIR (ood=)")
        return result.ood_splits
    known = [result.id_split, *result.ood_splits]
    if name in known:
        return [name]
    if name == "id":
        return [result.id_split]
    raise UsageError(f"{name!r} is no split of this scan", nearest(name, [*known, MEAN_OOD]))


def examples(result: ScanResult, alpha: float, split: str, chosen: bool = False) -> Examples:
    """Return what is stored for every image of a split at an alpha.

    Where the alpha was ``chosen`` by half of the images only the other half is returned: the pick shall not flatter
    itself.

    Raises
    ------
    MeasurementError
        If it was not evaluated there, on no image, or a stored number is not finite.
    """
    key = cell_key(alpha, split, "evaluation")
    found = next((cell.arrays for cell in result.cells if cell.key == key), {})
    where = f"on {split!r} at alpha {alpha:g}"
    if not {"correct", "confidence", "loss"} <= found.keys() or not len(found["correct"]):
        raise MeasurementError(f"the scan holds no evaluation {where}", "run the same scan again: it resumes")
    for name, array in found.items():
        if not np.isfinite(array).all():
            raise MeasurementError(f"{name} {where} holds {array[~np.isfinite(array)][0]}", "look at the loss there")
    if not chosen:
        return found
    _, unseen = halves(len(found["correct"]), result.meta["seed"])
    return {name: array[unseen] for name, array in found.items()}
