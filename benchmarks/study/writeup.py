"""From rows to the write-up: every number in figures/STUDY.md is put there by the build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from across import pools
from activity import Projection
from along import Along
from definitions import definitions, variants
from inference import Effect
from jinja2 import Environment, StrictUndefined
from mixes import Mixes
from predictors import global_sharpness, layers
from rows import CONFIRMATORY, LAYERS, Rows
from supplement_rows import failures

TEMPLATE = Path(__file__).parent / "STUDY.md.jinja"
CONFIRMED = {"H1": 6, "H2": 6, "H3": 1, "H4": 4, "H5": 2, "H6": 2}  # comparisons of the plan


def findings(rows: Rows) -> dict[str, Any]:
    """Return all results by hypothesis."""
    across, along = pools(rows), Along(rows)
    mixes = Mixes(rows, along)
    found: dict[str, Any] = {
        "h1": global_sharpness(across),
        "h2": layers(across),
        "along": along.summary,
        "variants": variants(across),
        "h3": mixes.sparse,
        "h4": Projection(rows).summary,
        "h5": mixes.recipes,
        "h6": along.label_free,
        "moves": mixes.moves,
        "stragglers": along.stragglers.value_counts().to_dict(),
        "supplement": failures(),
    }
    return found | {
        "family": _family(rows),
        "counts": _counts(found, along),
        "definitions": definitions(found["variants"]),
    }


def _family(rows: Rows) -> dict[str, Any]:
    models = rows.models
    zero = {b: rows.members("A", b)[0] for b in rows.bases}
    pool_b = rows.cohort[rows.cohort["pool"] == "B"]
    inside = rows.ood["all"].unstack().loc[rows.cohort.index]
    return {
        "trained": int((~models.index.str.endswith("-end")).sum()),
        "measured": len(rows.cohort),
        "bases": len(rows.bases),
        "A": int((rows.cohort["pool"] == "A").sum()),
        "B": len(pool_b),
        "missed": len(rows.missed),
        "missed_settings": ", ".join(sorted(models.loc[rows.missed, "setting"].unique())),
        "collapsed": len(rows.collapsed),
        "targets": ", ".join(f"{t:g}" for t in sorted(models["target"].unique())),
        "loss": (float(pool_b["loss"].min()), float(pool_b["loss"].max())),
        "zero_id": [float(rows.id[m, 0.0]) for m in zero.values()],
        "zero_ood": [float(rows.ood.at[(m, 0.0), "all"]) for m in zero.values()],
        "gain": int((inside.iloc[:, 1:-1].max(axis=1) > inside[[0.0, 1.0]].max(axis=1) + 0.5).sum()),
        "worse": int((inside[1.0] < inside[0.0]).sum()),
        "rows": len(rows.sharpness),
        "settings": int(pool_b["setting"].nunique()),
    }


def _counts(found: dict[str, Any], along: Along) -> dict[str, int]:
    """How many comparisons were made."""
    tables = 2 * (2 + len(LAYERS)) * len(found["variants"])
    return {"confirmatory": sum(CONFIRMED.values()), "variants": tables, "paths": len(along.table)}


def _points(value: Effect | float, digits: int = 2) -> str:
    return (
        format(value, f"+.{digits}f") if isinstance(value, Effect) else format(value, f"+.{digits}f").replace("-", "−")
    )


def _triple(found: tuple[float, float, float], digits: int = 2) -> str:
    return _points(Effect(*found, (), 0), digits)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def _plain(value: Effect | float, digits: int = 1) -> str:
    return (
        format(value, f".{digits}f").replace("-", "−")
        if not isinstance(value, Effect)
        else format(value, f".{digits}f")
    )


def rendered(found: dict[str, Any]) -> str:
    """Return the text of figures/STUDY.md."""
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"e": _points, "p": _p, "n": _plain, "t": _triple}
    environment.globals |= {"CONFIRMATORY": CONFIRMATORY, "LAYERS": LAYERS}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(**found)
