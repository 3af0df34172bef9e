"""H3 and H5: stragglers made sparse or given their own alpha; and which layers an intervention supports."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import pandas as pd
from along import Along
from inference import Effect, effect, verdict
from rows import ALPHAS, LAYERS, Rows

POINT, HALF_POINT, NEEDED = 1.0, 0.5, 5
BASE, DROPPED = 0.5, 0.9  # of H3: the mix, and the share of the straggler's delta that is dropped
Values = dict[str, float]


class Mixes:
    """What mixes and moves of layers do, path by path.

    Parameters
    ----------
    rows, along
        Of the study; the latter says which layer is each path's straggler.
    """

    def __init__(self, rows: Rows, along: Along) -> None:
        self.rows, self.along = rows, along
        keys = ["model", "kind", "layer", "alpha", "amount"]
        self.points = rows.points.set_index(keys).sort_index()
        self.straggler = along.stragglers

    def _effect(self, values: Values) -> Effect:
        return effect(self.along.by_base(pd.Series(values)))

    @cached_property
    def failed(self) -> list[str]:
        """Paths on which, on half A, no alpha strictly inside beats zero-shot."""
        wide = self.rows.ood["a"].unstack().loc[self.rows.cohort.index]
        return wide.index[wide[list(ALPHAS[1:-1])].max(axis=1) <= wide[0.0]].tolist()

    def _at(self, model: str, kind: str, layer: str, alpha: float, amount: float, column: str = "ood_b") -> float:
        return float(self.points.at[(model, kind, f"visual.{layer}", alpha, amount), column])

    def _gap(self, model: str, kind: str, dropped: float, layers: list[str]) -> float:
        """Return points of half B's OOD accuracy: the layer made sparse less the layer shrunk as much."""
        kept = round(1 - dropped, 12)
        gaps = [self._at(model, kind, la, BASE, dropped) - self._at(model, "layer", la, BASE, kept) for la in layers]
        return float(np.mean(gaps))

    def _mended(self, model: str, kind: str, amount: float, layer: str) -> float:
        """Return points of half B's OOD accuracy that a change of the straggler adds to the mix."""
        return self._at(model, kind, layer, BASE, amount) - float(self.rows.ood.at[(model, BASE), "b"])

    @cached_property
    def sparse(self) -> dict[str, object]:
        """H3: failed paths, the confirmatory gap, its controls and relatives, verdict."""
        others = {m: [la for la in LAYERS if la != own] for m, own in self.straggler.items()}

        def over(paths: list[str], kind: str, dropped: float) -> Effect:
            return self._effect({m: self._gap(m, kind, dropped, [self.straggler[m]]) for m in paths})

        everything = list(self.straggler.index)
        relatives = {
            f"{kind} {p:g} {name}": over(paths, kind, p)
            for name, paths in (("failed", self.failed), ("all", everything))
            for kind in ("sparse", "zeroed")
            for p in (0.5, 0.9)
            if paths
        }
        found: dict[str, object] = {"failed": self.failed, "relatives": relatives, "verdict": "undecided"}
        found["any layer"] = self._effect({m: self._gap(m, "sparse", DROPPED, list(LAYERS)) for m in everything})
        if self.failed:
            main = relatives[f"sparse {DROPPED:g} failed"]
            found["main"] = main
            found["others"] = self._effect({m: self._gap(m, "sparse", DROPPED, others[m]) for m in self.failed})
            for name, kind, amount in (
                ("sparse", "sparse", DROPPED),
                ("shrunk", "layer", round(1 - DROPPED, 12)),
                ("reset", "layer", 0.0),
            ):
                found[f"mended {name}"] = self._effect(
                    {m: self._mended(m, kind, amount, self.straggler[m]) for m in self.failed}
                )
            if len(self.failed) >= NEEDED:
                found["verdict"] = verdict(main.sign > 0 and main.value >= POINT, main.high < POINT)
        return found

    @cached_property
    def _tried(self) -> dict[str, pd.DataFrame]:
        """Model -> every recipe with a row of its own: kind, layer, and OOD on both halves."""
        recipes = self.rows.points[self.rows.points["kind"].isin(["layer", "LiNeS"])]
        recipes = recipes.assign(layer=recipes["layer"].str.removeprefix("visual."))[
            ["model", "kind", "layer", "ood_a", "ood_b"]
        ]
        uniform = (
            self.rows.ood.reset_index().rename(columns={"a": "ood_a", "b": "ood_b"}).assign(kind="uniform", layer="all")
        )
        both = pd.concat([uniform[recipes.columns], recipes], ignore_index=True)  # uniform first: it wins ties
        return {str(model): part for model, part in both.groupby("model") if model in self.straggler.index}

    def _chosen(self, allowed: Callable[[str, pd.DataFrame], pd.Series]) -> pd.Series:
        """Return half B's OOD accuracy of the recipe best on half A among uniform ones and those allowed."""
        found = {}
        for model, part in self._tried.items():
            some = part[(part["kind"] == "uniform") | allowed(model, part)]
            found[model] = float(some.at[some["ood_a"].idxmax(), "ood_b"])
        return pd.Series(found)

    @cached_property
    def recipes(self) -> dict[str, object]:
        """H5: gaps to the best uniform alpha and LiNeS, controls, verdict."""
        uniform = self._chosen(lambda _, part: part["kind"] == "uniform")
        lines = self._chosen(lambda _, part: part["kind"] == "LiNeS")
        own = self._chosen(lambda model, part: part["layer"] == self.straggler[model])
        free = self._chosen(lambda _, part: part["kind"] == "layer")
        each = {layer: self._chosen(lambda _, part, la=layer: part["layer"] == la) for layer in LAYERS}
        table = pd.DataFrame(each)
        other = pd.Series({m: float(table.loc[m].drop(layer).mean()) for m, layer in self.straggler.items()})
        gaps = {"uniform": own - uniform, "LiNeS": own - lines, "random layer": own - other, "free layer": own - free}
        found = {name: effect(self.along.by_base(gap)) for name, gap in gaps.items()}
        levels = {
            name: effect(self.along.by_base(v))
            for name, v in {
                "uniform": uniform,
                "LiNeS": lines,
                "straggler": own,
                "random layer": other,
                "free layer": free,
            }.items()
        }
        main = [found["uniform"], found["LiNeS"]]
        word = verdict(all(g.sign > 0 and g.value >= HALF_POINT for g in main), any(g.high < HALF_POINT for g in main))
        return {"gaps": found, "levels": levels, "verdict": word}

    @cached_property
    def moves(self) -> list[dict[str, object]]:
        """Each layer of the fine-tuned model back at zero-shot, beside random moves as long, over all models."""
        table = []
        end = self.rows.ood["all"].xs(1.0, level="alpha")
        for layer in LAYERS:
            reset, random = {}, {}
            for model in self.straggler.index:
                back, *noise = (
                    np.mean([self._at(model, kind, layer, 1.0, amount, c) for c in ("ood_a", "ood_b")]) - end[model]
                    for kind, amount in (("layer", 0.0), ("random", 0.0), ("random", 1.0))
                )
                reset[model], random[model] = float(back), float(np.mean(noise))
            beyond = {m: reset[m] - random[m] for m in reset}
            row = {
                "layer": layer,
                "reset": self._effect(reset),
                "random": self._effect(random),
                "beyond": self._effect(beyond),
            }
            table.append(row | {"supported": row["reset"].sign > 0 and row["beyond"].sign > 0})
        return table
