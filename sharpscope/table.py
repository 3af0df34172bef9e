"""The one long table that joins measuring and reading: rows, cells of rows, and frames made of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, field, fields

import numpy as np
import pandas as pd
from scipy import stats

from sharpscope.errors import MeasurementError

MODEL = "model"  #: the layer name of a row about the whole network
EVALUATIONS = ("accuracy", "loss", "confidence", "calibration_error")  #: measures that need no curvature

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Row:
    """One measured number: what, where on the path, in which layer, on which data, and how sure.

    Parameters
    ----------
    alpha
        Place on the path: 0 is zero-shot, 1 is fine-tuned.
    layer
        Layer id, or ``"model"`` for the whole network.
    split
        Name of the data set.
    measure
        Name of the measure, e.g. ``"trace"``.
    value
        The estimate. Never NaN or infinite: such a number raises where it arises.
    stderr
        Standard error of the value; for an eigenvalue its Ritz residual, a bound on its error.
        Infinite means unknown (a single draw).
    draws
        Probes, Lanczos steps, groups or examples that the value rests on.
    converged
        Whether the stated target of the measure was met.

    Raises
    ------
    MeasurementError
        If value is not finite or stderr is NaN.
    """

    alpha: float
    layer: str
    split: str
    measure: str
    value: float
    stderr: float
    draws: int
    converged: bool

    def __post_init__(self) -> None:
        if not math.isfinite(self.value) or math.isnan(self.stderr):
            raise MeasurementError(
                f"{self.measure} of layer {self.layer!r} on {self.split!r} at alpha {self.alpha:g} is "
                f"{self.value} +- {self.stderr}, not a finite number",
                "look at the loss there (weights that overflow, a batch with infinities), or leave that alpha out",
            )

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval, see :func:`reach`."""
        width = reach(self.measure, self.stderr, self.draws)
        return self.value - width, self.value + width


COLUMNS = tuple(f.name for f in fields(Row))


def reach(measure: str, stderr: float, draws: int) -> float:
    """Return half the width of the 95 % interval of a row.

    An eigenvalue's residual is a bound and taken as it is. A mean over draws has Student's interval. The error of a
    trace rests on the variances of all its weights and is known better than a sample of n numbers would tell:
    2 n degrees of freedom make the interval cover 92 to 98 % of the time; 77 % for a layer that one eigenvalue rules,
    nothing couples to others and the floor of the target stops.
    """
    if "lambda" in measure or stderr == 0:
        return stderr
    freedom = 2 * draws if "trace" in measure else draws - 1
    return stderr * float(stats.t.ppf(0.975, freedom)) if freedom > 0 else math.inf


@dataclass(frozen=True)
class Cell:
    """Rows that were measured together and are kept or lost together, with the samples behind them.

    ``arrays`` holds for an evaluation the per-example ``correct``, ``confidence`` and ``loss`` of shape ``(n,)``;
    for a curvature measure, per layer id, what the estimate was made of: probe values, Ritz values by step,
    or the sharpness of each group.
    """

    key: str
    rows: tuple[Row, ...]
    arrays: Mapping[str, Array] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Cell):
            return NotImplemented
        same = (self.key, self.rows, self.arrays.keys()) == (other.key, other.rows, other.arrays.keys())
        return same and all(np.array_equal(a, other.arrays[k]) for k, a in self.arrays.items())


def cell_key(alpha: float, split: str, measure: str) -> str:
    """Return the key under which a cell is stored; exact in alpha.

    >>> cell_key(0.1, "id", "trace")
    '0.1|id|trace'
    """
    return f"{float(alpha)!r}|{split}|{measure}"


def frame(rows: Iterable[Row]) -> pd.DataFrame:
    """Return the rows as a frame with the columns of :class:`Row`, float64, unrounded."""
    data = pd.DataFrame([astuple(row) for row in rows], columns=list(COLUMNS))
    return data.astype({"alpha": float, "value": float, "stderr": float, "draws": int, "converged": bool})
