"""Along each path: the path null of global and layer sharpness (H1, H2), and ranking alphas without labels (H6)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from inference import LEVEL, Effect, effect, verdict
from rows import ALPHAS, CONFIRMATORY, LAYERS, MODEL, Rows

from sharpscope.stragglers.association import association
from sharpscope.stragglers.correlation import co_movement

PERFECT, CEILING = "perfect", "ceiling"
SMALLEST = 0.1  # of tau, H6
NEEDED_POWER = 0.5


def flagged(rows: Rows, model: str, curves: pd.DataFrame) -> pd.DataFrame:
    """Return a path's straggler table, with a perfect predictor put among the layers of the trace as `ceiling`."""
    error = 1 - rows.ood.loc[model]["all"] / 100
    perfect = pd.DataFrame({"alpha": ALPHAS, "value": np.exp(10 * error.to_numpy()), "stderr": 1e-6, "converged": True})
    trace = curves[curves["measure"] == "trace"]
    planted = pd.concat([trace, perfect.assign(layer=PERFECT)]).assign(measure=CEILING)
    return co_movement(pd.concat([curves, planted], ignore_index=True), error, seed=0).assign(model=model)


@dataclass(frozen=True)
class Along:
    """Every path of the cohort."""

    rows: Rows

    @cached_property
    def table(self) -> pd.DataFrame:
        """Straggler rows of all paths."""
        tables = [flagged(self.rows, str(m), curves) for m, curves in self.rows.curves.groupby("model")]
        return pd.concat(tables, ignore_index=True)

    def by_base(self, values: pd.Series) -> dict[int, np.ndarray]:
        """Return a number per model as arrays by base."""
        base = self.rows.cohort["base"].loc[values.index]
        return {b: values[base == b].to_numpy(dtype=float) for b in self.rows.bases}

    def share(self, measure: str, layers: tuple[str, ...], column: str) -> Effect:
        """Return the per cent of paths on which a layer has a p-value of at most 5 %; an untested row has none."""
        chosen = self.table[(self.table["measure"] == measure) & self.table["layer"].isin(layers)]
        found = (chosen[column] <= LEVEL).groupby(chosen["model"]).any()
        return effect(self.by_base(100.0 * found.reindex(self.rows.cohort.index, fill_value=False)))

    @cached_property
    def summary(self) -> dict[str, object]:
        """Shares beyond the null beside the ceiling of a perfect predictor."""
        whole = {m: self.share(m, (MODEL,), "p") for m in CONFIRMATORY}
        family = {m: self.share(m, LAYERS, "p_family") for m in CONFIRMATORY}
        ceiling = {
            "single": self.share(CEILING, (PERFECT,), "p"),
            "family": self.share(CEILING, (PERFECT,), "p_family"),
        }
        enough = {name: found.value >= 100 * NEEDED_POWER for name, found in ceiling.items()}
        return {"global": whole, "layers": family, "ceiling": ceiling, "enough": enough}

    @cached_property
    def path_taus(self) -> pd.DataFrame:
        """Tau of log trace with half A's OOD error along each path: a row per model, a column per layer."""
        return self._taus("a")

    def _taus(self, half: str) -> pd.DataFrame:
        found = {}
        trace = self.rows.curves[self.rows.curves["measure"] == "trace"]
        for model, part in trace.groupby("model"):
            wide = part.pivot_table(index="layer", columns="alpha", values="value")
            error = -self.rows.ood.loc[model][half].to_numpy()
            # Ranks are those of the logarithm wherever it exists.
            found[model] = pd.Series(association(wide.to_numpy(), error[None])[:, 0], index=wide.index)
        return pd.DataFrame(found).T.loc[self.rows.cohort.index]

    @cached_property
    def stragglers(self) -> pd.Series:
        """The layer of each path whose trace has the largest tau with half A's OOD error."""
        return self.path_taus[list(LAYERS)].idxmax(axis=1)

    @cached_property
    def ranking(self) -> dict[str, pd.Series]:
        """Name -> per path, tau over alphas of an estimate with true OOD accuracy; needs no OOD labels of the base."""
        taus, base = self._taus("all"), self.rows.cohort["base"]
        found = {"straggler": pd.Series(index=taus.index, dtype=float), "global trace": taus[MODEL]}
        for b in self.rows.bases:
            found["straggler"][base == b] = taus.loc[base == b, self.elsewhere[b]]
        for name, part in self.rows.labelfree.groupby("estimator"):
            wide = part.pivot_table(index="model", columns="alpha", values="estimate").loc[taus.index]
            truth = self.rows.ood["all"].unstack().loc[taus.index]
            pairs = zip(wide.to_numpy(), truth.to_numpy(), strict=True)
            found[str(name)] = pd.Series(
                [float(association(e[None], t[None])[0, 0]) for e, t in pairs], index=taus.index
            )
        return found

    @cached_property
    def elsewhere(self) -> dict[int, str]:
        """For each base the layer with the best mean tau on the paths of the others."""
        taus, base = self._taus("all"), self.rows.cohort["base"]
        return {b: str(taus.loc[base != b, list(LAYERS)].mean().idxmax()) for b in self.rows.bases}

    def _regrets(self) -> dict[str, pd.Series]:
        """Name -> per path, points of OOD accuracy lost by taking the alpha ranked first."""
        truth = self.rows.ood["all"].unstack().loc[self.rows.cohort.index]
        picked: dict[str, pd.DataFrame] = {
            str(name): part.pivot_table(index="model", columns="alpha", values="estimate").loc[truth.index]
            for name, part in self.rows.labelfree.groupby("estimator")
        }
        trace = self.rows.curves[self.rows.curves["measure"] == "trace"]
        wide = -trace.pivot_table(index=["model", "layer"], columns="alpha", values="value")
        layer = self.rows.cohort["base"].map(self.elsewhere)
        picked["straggler"] = wide.loc[list(layer.items())].droplevel("layer")
        picked["global trace"] = wide.xs(MODEL, level="layer").loc[truth.index]
        best = truth.max(axis=1)
        return {
            name: best - pd.Series([truth.at[m, a] for m, a in score.idxmax(axis=1).items()], index=truth.index)
            for name, score in picked.items()
        }

    @cached_property
    def label_free(self) -> dict[str, object]:
        """H6: tau of each estimate, differences to ATC and DoC, regrets, verdict."""
        taus = {name: effect(self.by_base(found)) for name, found in self.ranking.items()}
        gaps = {
            rival: effect(self.by_base(self.ranking["straggler"] - self.ranking[rival])) for rival in ("ATC", "DoC")
        }
        regret = {name: effect(self.by_base(found)) for name, found in self._regrets().items()}
        good = all(gap.sign > 0 and gap.value >= SMALLEST for gap in gaps.values())
        word = verdict(good, any(gap.sign < 0 for gap in gaps.values()))
        return {"taus": taus, "gaps": gaps, "regret": regret, "layers": self.elsewhere, "verdict": word}
