"""The stored rows as tables, after the plan's exclusions. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

RESULTS = Path(__file__).parents[1] / "results" / "study"
LAYERS = ("embed", *(f"block.{i:02d}" for i in range(6)), "norm", "proj")
MODEL = "model"  # the layer of global sharpness
CONFIRMATORY = ("trace", "m_sharpness", "m_sharpness_adaptive")
OOD = ("sans", "mono", "script", "decorative", "color", "rotation", "corruption", "scans")
ALPHAS = tuple(round(0.1 * i, 1) for i in range(11))


@dataclass(frozen=True)
class Rows:
    """Everything that was measured."""

    models: pd.DataFrame  # indexed by model
    paths: pd.DataFrame  # model alpha set a b loss: per cent right on both halves
    labelfree: pd.DataFrame
    points: pd.DataFrame
    sharpness: pd.DataFrame
    activity: pd.DataFrame
    pretraining: pd.DataFrame

    @cached_property
    def ood(self) -> pd.DataFrame:
        """Mean OOD accuracy: columns a, b, all; indexed by model and alpha."""
        mean = self.paths[self.paths["set"].isin(OOD)].groupby(["model", "alpha"])[["a", "b"]].mean()
        return mean.assign(all=mean.mean(axis=1))

    @cached_property
    def id(self) -> pd.Series:
        """ID accuracy, indexed by model and alpha."""
        chosen = self.paths[self.paths["set"] == "id"].set_index(["model", "alpha"])
        return (chosen["a"] + chosen["b"]) / 2

    @cached_property
    def collapsed(self) -> list[str]:
        """Models whose ID accuracy at alpha 1 is below zero-shot's and below 10 %."""
        end, start = self.id.xs(1.0, level="alpha"), self.id.xs(0.0, level="alpha")
        return end.index[(end < start) & (end < 10)].tolist()

    @cached_property
    def missed(self) -> list[str]:
        """Models of pool B that never met the training loss."""
        return self.models.index[self.models["steps_done"] < 0].tolist()

    @cached_property
    def cohort(self) -> pd.DataFrame:
        """Models of pools A and B that sharpness was measured of, with log rate and distance, ID loss and error."""
        found = self.models[self.models.index.isin(self.sharpness["model"]) & ~self.models.index.isin(self.collapsed)]
        distance = np.sqrt(found.filter(like="distance ").pow(2).sum(axis=1))
        held_out = self.paths[(self.paths["set"] == "id") & (self.paths["alpha"] == 1)].set_index("model")["loss"]
        logs = {"log_rate": np.log(found["rate"]), "log_distance": np.log(distance)}
        return found.assign(**logs, id_loss=held_out, id_error=100 - self.id.xs(1.0, level="alpha"))

    def members(self, pool: str, base: int) -> list[str]:
        """Return the models of a pool and base."""
        return self.cohort.index[(self.cohort["pool"] == pool) & (self.cohort["base"] == base)].tolist()

    @property
    def bases(self) -> list[int]:
        """The bases."""
        return sorted(self.models["base"].unique())

    @cached_property
    def ends(self) -> pd.DataFrame:
        """Sharpness at alpha 1: a column per (on, measure, layer), a row per model."""
        chosen = self.sharpness[self.sharpness["alpha"] == 1]
        return chosen.pivot_table(index="model", columns=["on", "measure", "layer"], values="value")

    @cached_property
    def curves(self) -> pd.DataFrame:
        """Rows on training images that a path has: zero-shot's are those of its base."""
        chosen = self.sharpness[(self.sharpness["on"] == "train") & self.sharpness["measure"].isin(CONFIRMATORY)]
        starts = chosen[chosen["model"].str.endswith("-start")]
        tuned = chosen[chosen["model"].isin(self.cohort.index)]
        copies = [
            starts[starts["model"] == f"b{base}-start"].assign(model=name) for name, base in self.cohort["base"].items()
        ]
        return pd.concat([*copies, tuned], ignore_index=True).sort_values(["model", "measure", "layer", "alpha"])


def rows(folder: Path = RESULTS) -> Rows:
    """Return the stored rows."""
    names = ("models", "paths", "labelfree", "points", "sharpness", "activity")
    tables = {name: pd.read_csv(folder / f"{name}.csv.gz") for name in names}
    tables["models"] = tables["models"].set_index("model")
    return Rows(**tables, pretraining=pd.read_csv(folder / "pretraining.csv"))
