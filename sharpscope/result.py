"""A finished scan: frames, verdict, plots. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sharpscope.errors import UsageError
from sharpscope.stragglers import barrier, effects
from sharpscope.stragglers.association import Statistic
from sharpscope.stragglers.correlation import BOOTSTRAPS, Samples, co_movement, ood_error, with_distance
from sharpscope.stragglers.label_free import Answers, label_free
from sharpscope.stragglers.recipes import COLUMNS as RECIPES
from sharpscope.stragglers.recipes import Contest, candidates, with_recipe
from sharpscope.stragglers.recommendation import Recommendation, recommend
from sharpscope.stragglers.resampling import error_draws
from sharpscope.stragglers.wording import supported
from sharpscope.table import EVALUATIONS, Array, Cell, frame

if TYPE_CHECKING:
    import xarray

    from sharpscope.adapters import Tracker
    from sharpscope.report.plots import Plots


class ScanResult:
    """Everything a scan found.

    Parameters
    ----------
    cells
        Finished cells, in any order; a result keeps them by alpha, split and measure as the plan lists them.
    meta
        Plan and provenance as JSON values: ``alphas``, ``measures``, ``splits`` (role ``"id"`` or ``"ood"``),
        ``layers`` (depth order, with ``size``, ``delta_norm``, ``start_norm``), ``unused``, ``models``,
        ``provenance``, ``cost``, ``warnings``, ``alpha_convention``, ``seed``.
    """

    def __init__(self, cells: Iterable[Cell], meta: Mapping[str, Any]) -> None:
        self.meta: dict[str, Any] = json.loads(json.dumps(meta))
        splits, measures = list(self.meta["splits"]), [*self.meta["measures"], "evaluation"]

        def place(cell: Cell) -> tuple[bool, float, int, int]:
            alpha, split, measure = cell.key.split("|", 2)
            if measure not in measures:  # of a later phase: after the path, as they came
                return True, 0.0, 0, 0
            return False, float(alpha), measures.index(measure), splits.index(split)

        self.cells: tuple[Cell, ...] = tuple(sorted(cells, key=place))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ScanResult):
            return NotImplemented
        return self.cells == other.cells and self.meta == other.meta

    __hash__ = None  # type: ignore[assignment]

    @property
    def id_split(self) -> str:
        """Name of the ID split."""
        return next(str(name) for name, facts in self.meta["splits"].items() if facts["role"] == "id")

    @property
    def curvature_split(self) -> str:
        """Name of the split that sharpness was measured on."""
        return str(self.meta.get("curvature_split", self.id_split))

    @property
    def ood_splits(self) -> list[str]:
        """Names of the OOD splits."""
        return [name for name, facts in self.meta["splits"].items() if facts["role"] == "ood"]

    @cached_property
    def _rows(self) -> pd.DataFrame:
        return frame(row for cell in self.cells for row in cell.rows)

    @property
    def layers(self) -> pd.DataFrame:
        """Curvature rows: ``alpha layer split measure value stderr draws converged``; layer ``"model"`` is global."""
        return self._rows[~self._rows["measure"].isin(EVALUATIONS)].reset_index(drop=True)

    @property
    def evals(self) -> pd.DataFrame:
        """Evaluation rows: ``alpha split measure value stderr n``."""
        chosen = self._rows[self._rows["measure"].isin(EVALUATIONS)]
        return chosen.drop(columns=["layer", "converged"]).rename(columns={"draws": "n"}).reset_index(drop=True)

    def _per_image(self, name: str) -> dict[tuple[float, str], Array]:
        """Return what evaluation kept of each image, by alpha and split."""
        found = {}
        for cell in self.cells:
            alpha, split, measure = cell.key.split("|", 2)
            if measure == "evaluation":
                view = cell.arrays[name].view()
                view.flags.writeable = False  # what is written there would be saved
                found[float(alpha), split] = view
        return found

    @property
    def correct(self) -> dict[tuple[float, str], Array]:
        """Per-example correctness, bool of shape ``(n,)``, by alpha and split."""
        return self._per_image("correct")

    @property
    def barriers(self) -> pd.DataFrame:
        """How far error and loss rise above the chord, see :func:`~sharpscope.stragglers.barrier.barriers`.

        One row per set, measure and chord: ``split measure chord value low high alpha n``.
        """
        error = {place: ~correct for place, correct in self.correct.items()}
        metrics = {"error": error, "loss": self._per_image("loss")}
        return barrier.barriers(metrics, self.id_split, self.ood_splits)

    def interpolation_failure(self, form: barrier.Form = "weak") -> barrier.InterpolationFailure:
        """Return whether, on OOD, no alpha between the ends beats zero-shot (``"weak"``), or both (``"strict"``)."""
        return barrier.interpolation_failure(self.correct, self.ood_splits, form=form)

    @property
    def label_free(self) -> pd.DataFrame:
        """OOD accuracy as estimated without OOD labels, beside the truth; see ``stragglers.label_free``.

        ``alpha split estimator estimate truth error stderr chosen``, in percent.
        """
        confidence = self._per_image("confidence")
        answers = {place: Answers(correct, confidence[place]) for place, correct in self.correct.items()}
        return label_free(answers, self.id_split, self.ood_splits)

    @property
    def stragglers(self) -> pd.DataFrame:
        """One row per layer and measure: does its sharpness run with the mean OOD error, and does chance do as well.

        Columns as of :func:`~sharpscope.stragglers.correlation.co_movement`, then ``delta_norm relative_delta``.
        Empty without OOD sets that have labels.
        """
        return self._stragglers.copy()  # frames are the caller's to edit, numbers are not

    @cached_property
    def _stragglers(self) -> pd.DataFrame:
        return self.co_movement(interventions=self._interventions)

    def co_movement(self, statistic: Statistic = "kendall", interventions: pd.DataFrame | None = None) -> pd.DataFrame:
        """Return the table of :attr:`stragglers` with another correlation (``"spearman"``, ``"pearson"``).

        ``interventions`` is a frame ``layer question split effect supported ...``; which of its rows make a straggler
        says :func:`sharpscope.stragglers.wording.supported`.
        """
        error = ood_error(self.evals, self.ood_splits)
        found = co_movement(
            self.layers,
            error,
            statistic=statistic,
            supported=supported(interventions),
            unmoved=self._unmoved,
            samples=self._samples,
            error_draws=self._error_draws(error.index.tolist()),
            seed=abs(self.meta["seed"]),
        )
        return with_distance(found, self.meta["layers"])

    @property
    def _samples(self) -> Samples:
        """Draws behind the values; Ritz values are none."""
        found: dict[tuple[str, str, float], Array] = {}
        for cell in self.cells:
            alpha, _, measure = cell.key.split("|", 2)
            if measure in self.meta["measures"] and "lambda" not in measure:
                found |= {(measure, layer, float(alpha)): drawn for layer, drawn in cell.arrays.items()}
        return found

    def _error_draws(self, alphas: list[float]) -> Array | None:
        correct = self.correct
        labelled = [s for s in self.ood_splits if all((alpha, s) in correct for alpha in alphas)]
        if not alphas or not labelled:
            return None
        generator = np.random.default_rng([abs(self.meta["seed"]), 1])
        return error_draws(correct, labelled, alphas, BOOTSTRAPS, generator)

    @property
    def interventions(self) -> pd.DataFrame:
        """What moving one layer alone does to accuracy, see :func:`~sharpscope.stragglers.effects.effects`.

        One row per layer, base and set: ``layer question base alpha split effect low high control control_low
        control_high draws as_far n supported``. Empty if interventions were not run.
        """
        return self._interventions.copy()

    @cached_property
    def _interventions(self) -> pd.DataFrame:
        layers, settings = list(self.meta["layers"]), self.meta.get("interventions")
        return effects.effects(self.cells, settings, layers, self.id_split, self.ood_splits, self._unmoved)

    @property
    def _unmoved(self) -> list[str]:
        return [name for name, facts in self.meta["layers"].items() if facts["delta_norm"] == 0]

    @property
    def cumulative(self) -> pd.DataFrame:
        """What moving the first, or the last, layers together does; see ``effects.cumulative_effects``."""
        layers, settings = list(self.meta["layers"]), self.meta.get("interventions")
        return effects.cumulative_effects(self.cells, settings, layers, self.id_split, self.ood_splits)

    @property
    def _contest(self) -> Contest:
        found = candidates(self.cells, self.meta.get("recipes"), self.correct)
        return Contest(found, self.id_split, self.ood_splits, self.meta["seed"])

    @property
    def recipes(self) -> pd.DataFrame:
        """One row per recipe that was tried, see :meth:`sharpscope.stragglers.recipes.Contest.frame`.

        ``recipe kind id ood id_low id_high ood_low ood_high versus_uniform low high score chosen``. Without a search
        these are the uniform alphas; empty if a set has a single image, as choosing and quoting take a half each.
        """
        return self._recipes.copy()

    @cached_property
    def _recipes(self) -> pd.DataFrame:
        if min(map(len, self.correct.values()), default=0) < 2:
            return pd.DataFrame(columns=list(RECIPES))
        return self._contest.frame()

    def recommend(self, keep_id: float | None = None, *, per_layer: bool = False) -> Recommendation:
        """Return what to ship.

        Parameters
        ----------
        keep_id
            How many points of ID accuracy may go, zero or negative; None: any.
        per_layer
            Whether a recipe with an alpha per layer may be shipped: the best on the choosing half, if on the other half
            it beats the best uniform alpha by more than the paired interval. Needs ``scan(..., recipes=True)``.
        """
        correct = self.correct
        found = recommend(correct, self.id_split, self.ood_splits, keep_id=keep_id, seed=self.meta["seed"])
        found = with_recipe(found, self._contest, correct, keep_id) if per_layer else found
        return replace(found, scan=self.meta)

    @property
    def plot(self) -> Plots:
        """Figures as methods, each returning matplotlib Axes."""
        from sharpscope.report.plots import Plots

        return Plots(self)

    def to_xarray(self) -> xarray.Dataset:
        """Return the numbers on labelled axes; see :func:`sharpscope.adapters.to_xarray`."""
        from sharpscope.adapters import to_xarray

        return to_xarray(self)

    def to_mlflow_metrics(self) -> dict[str, float]:
        """Return flat metrics under names that MLflow takes; see :func:`sharpscope.adapters.to_mlflow_metrics`."""
        from sharpscope.adapters import to_mlflow_metrics

        return to_mlflow_metrics(self)

    def log_to(self, tracker: Tracker) -> None:
        """Log the path to anything with ``log(dict, step=)``; see :func:`sharpscope.adapters.log_to`."""
        from sharpscope.adapters import log_to

        log_to(self, tracker)

    def save(self, folder: str | Path) -> Path:
        """Write ``scan.json``, ``cells.jsonl``, ``correct.npz`` and the frames as CSV; return the folder.

        Without ``scan.json``, which goes first and comes last, a folder is not taken for a scan. The page of another
        scan in the folder is removed.

        Raises
        ------
        OutputError
            If there is a file in the folder's place.
        """
        from sharpscope.saved import save

        return save(self, Path(folder))

    def __repr__(self) -> str:
        from sharpscope.summary import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from sharpscope.summary import as_html

        return as_html(self)


def check_opened(given: Any) -> None:
    """Raise for a folder's name in place of its result; commands take folders, functions do not."""
    if isinstance(given, str | Path):
        raise UsageError(f"{str(given)!r} is a {type(given).__name__}, no result of a scan", "sharpscope.open(FOLDER)")
