"""What a scan left in a folder: what it says of itself, and the page that must not stand beside new numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sharpscope.home import at_home
from sharpscope.report.gate import CHECK

TABLES = ("layers", "evals", "stragglers", "interventions", "recipes")  # of a result, kept as CSV beside it
OWN = (
    "scan.json",
    "cells.jsonl",
    "correct.npz",
    *(f"{name}.csv" for name in TABLES),
    "config.resolved.toml",
    "index.html",
)

Kind = type | tuple[type, ...]

_NUMBER = (int, float)
_ALWAYS: Mapping[str, Kind] = {
    "plan": dict,
    "alphas": list,
    "measures": dict,
    "splits": dict,
    "layers": dict,
    "seed": int,
}
_USUALLY: Mapping[str, Kind] = {
    "models": dict,
    "warnings": list,
    "unused": list,
    "provenance": dict,
    "cost": dict,
    "granularity": str,
    "objective": str,
    "curvature_split": str,
    "partition": dict,
}
_INSIDE: Mapping[str, Mapping[str, Kind]] = {
    "measures": {},
    "splits": {"role": str},
    "layers": {"delta_norm": _NUMBER, "start_norm": _NUMBER},
    "models": {},
}


_WHERE_RUN: Mapping[str, Mapping[str, Kind]] = {
    "recipes": {"trials": list},
    "interventions": {"bases": list},
}


def own_files(folder: str | Path) -> list[Path]:
    """Return where a scan, its settings and its page lie in the folder; not what the gate said of it."""
    return [at_home(folder) / name for name in OWN]


def read_meta(file: Path) -> dict[str, Any]:
    """Return what a scan says of itself, of the shape that everything else relies on; ``ValueError`` if it is not."""
    meta = json.loads(file.read_text(encoding="utf-8"))
    _check_kind("its content", meta, dict)
    for name, kind in _ALWAYS.items():
        _check_kind(name, meta.get(name), kind)
    for name in (name for name in _USUALLY if name in meta):
        _check_kind(name, meta[name], _USUALLY[name])
    for table, keys in _INSIDE.items():
        for name, facts in meta.get(table, {}).items():
            _check_table(f"{name!r} in {table}", facts, keys)
    for table in (table for table in _WHERE_RUN if meta.get(table) is not None):
        _check_table(table, meta[table], _WHERE_RUN[table])
    if not meta["alphas"]:
        raise ValueError("it has no alphas")
    for alpha in meta["alphas"]:
        _check_kind("one of its alphas", alpha, _NUMBER)
    if "id" not in (facts["role"] for facts in meta["splits"].values()):
        raise ValueError("none of its splits has the role id")
    _check_inside(meta)
    return dict(meta)


def _check_inside(meta: Mapping[str, Any]) -> None:
    """Raise for values of the right kind that nothing can be made of."""
    if meta["seed"] < 0:
        raise ValueError(f"seed is {meta['seed']}")
    if "curvature_split" in meta and meta["curvature_split"] not in meta["splits"]:
        raise ValueError(f"its curvature_split {meta['curvature_split']!r} is none of its splits")
    for layer, names in meta.get("partition", {}).items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"partition of {layer!r} is {json.dumps(names)[:60]}")


def _check_table(name: str, table: Any, keys: Mapping[str, Kind]) -> None:
    _check_kind(name, table, dict)
    for key, kind in keys.items():
        _check_kind(f"{key} of {name}", table.get(key), kind)


def _check_kind(name: str, value: Any, kind: Kind) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        found = "missing or null" if value is None else json.dumps(value)
        raise ValueError(f"{name} is {found if len(found) <= 60 else found[:57] + '...'}")


def meta_in(folder: Path) -> dict[str, Any]:
    """Return the plan and provenance of the finished scan in the folder, nothing if none can be read there."""
    try:
        found = json.loads((folder / "scan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def remove_page(folder: Path) -> None:
    """Remove the page of a scan that the folder will not hold, and what the gate said of it."""
    if any((folder / name).is_file() for name in ("index.html", CHECK)):
        from sharpscope.report.page import remove  # matplotlib, only where there is something to remove

        remove(folder)
