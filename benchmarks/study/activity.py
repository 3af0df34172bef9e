"""H4: SPD beside AdamW and L2-SP, AdamW's own path at the same ID accuracy, and where SPD is active."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import pandas as pd
from inference import LEVEL, Effect, effect, verdict
from rows import Rows
from scipy import stats

from sharpscope.partition import partition

POINT, TIMES = 1.0, 1.5
Trio = tuple[int, str, str, str]  # base, and the models of AdamW, L2-SP and SPD


class Projection:
    """Selective projection decay against its rivals, paired by base, rate and seed."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    @cached_property
    def trios(self) -> list[Trio]:
        """The twelve pairs."""
        return list(self._found())

    def _found(self) -> Iterator[Trio]:
        models = self.rows.models
        ends = models[(models["pool"] != "B") | models.index.str.endswith("-end")]
        settings = (("plain", "L2-SP", "SPD"), ("rate 0.003, 16", "L2-SP 3e-3", "SPD 3e-3"))
        for base in self.rows.bases:
            for names in settings:
                for seed in sorted(ends["seed"].unique()):
                    mine = ends[(ends["base"] == base) & (ends["seed"] == seed)]
                    yield (base, *(str(mine.index[mine["setting"] == name][0]) for name in names))  # type: ignore[misc]

    def _accuracy(self, model: str, on: str, alpha: float = 1.0) -> float:
        return float(self.rows.id[model, alpha] if on == "id" else self.rows.ood.at[(model, alpha), "all"])

    def _matched(self, adamw: str, spd: str) -> float:
        """Return the alpha of AdamW's path whose ID accuracy is nearest to SPD's; the largest of equals."""
        own, wanted = self.rows.id[adamw], self._accuracy(spd, "id")
        return float((own[own.index > 0] - wanted).abs()[::-1].idxmin())

    def gap(self, rival: int, on: str) -> Effect:
        """Return SPD less a rival (1 AdamW, 2 L2-SP), in points."""
        gaps: dict[int, list[float]] = {}
        for trio in self.trios:
            gaps.setdefault(trio[0], []).append(self._accuracy(trio[3], on) - self._accuracy(trio[rival], on))
        return effect({b: np.array(v) for b, v in gaps.items()})

    @cached_property
    def interpolated(self) -> dict[str, Effect]:
        """SPD less AdamW's path at SPD's ID accuracy, ID and OOD."""
        found: dict[str, dict[int, list[float]]] = {"id": {}, "ood": {}}
        for base, adamw, _, spd in self.trios:
            alpha = self._matched(adamw, spd)
            for on, gaps in found.items():
                gaps.setdefault(base, []).append(self._accuracy(spd, on) - self._accuracy(adamw, on, alpha))
        return {on: effect({b: np.array(v) for b, v in gaps.items()}) for on, gaps in found.items()}

    @cached_property
    def rates(self) -> pd.DataFrame:
        """Per cent of steps in which SPD was active: a row per run, a column per layer, tensors weighing the same."""
        names = self.rows.activity["tensor"].unique().tolist()
        home = {n: layer.removeprefix("visual.") for layer, some in partition(names).layers.items() for n in some}
        found = self.rows.activity.assign(layer=self.rows.activity["tensor"].map(home))
        return 100 * found.pivot_table(index="model", columns="layer", values="active")

    @cached_property
    def summary(self) -> dict[str, object]:
        """H4: four comparisons, controls, activity, verdicts."""
        gaps = {(name, on): self.gap(i, on) for i, name in ((1, "AdamW"), (2, "L2-SP")) for on in ("id", "ood")}
        base = self.rows.models["base"].loc[self.rates.index]
        by_layer = {
            str(c): effect({b: self.rates.loc[base == b, c].to_numpy() for b in self.rows.bases}) for c in self.rates
        }
        p = float(stats.friedmanchisquare(*(self.rates[c] for c in self.rates)).pvalue)
        most = max(by_layer, key=lambda name: by_layer[name].value)
        times = by_layer[most].value / float(np.mean([e.value for e in by_layer.values()]))
        good = all(g.sign > 0 for g in gaps.values())
        bad = any(g.sign < 0 for g in gaps.values()) or all(g.high < POINT for g in gaps.values())
        concentrated = p <= LEVEL and times >= TIMES
        return {
            "gaps": gaps,
            "interpolated": self.interpolated,
            "rates": by_layer,
            "friedman": p,
            "most": most,
            "times": times,
            "concentrated": verdict(concentrated, p <= LEVEL and times < TIMES),
            "verdict": verdict(good, bad),
            "runs": len(self.rates),
            "gated": float(100 * self.rows.activity["gated"].mean()),
            "active": float(100 * self.rows.activity["active"].mean()),
        }
