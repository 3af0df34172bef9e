"""The study's figures, from its findings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from inference import Effect
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rows import ALPHAS, CONFIRMATORY, LAYERS, MODEL, Rows

from sharpscope.report.canvas import INK, MISSING, MUTED, SERIES, styled

POOLS = {"A": "A, learning rate", "B": "B, matched training loss"}
Named = Sequence[tuple[str, Effect]]


def forest(ax: Axes, rows: Named, unit: str, color: str = SERIES[0], shift: float = 0.0, marker: str = "o") -> None:
    """Draw effects with their intervals as rows from the top."""
    for place, (_, e) in enumerate(rows):
        ax.plot([e.low, e.high], [place + shift] * 2, color=color, lw=1.6, solid_capstyle="butt")
        ax.plot(e.value, place + shift, marker, color=color, ms=5)
    ax.axvline(0, color=MUTED, lw=0.7)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_yticks(range(len(rows)), [name for name, _ in rows])
    ax.set_xlabel(unit)


def family(rows: Rows) -> Figure:
    """Every path: mean OOD against ID accuracy, from zero-shot on; a colour per base, a panel per pool."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for ax, (pool, name) in zip(figure.subplots(1, 2, sharey=True), POOLS.items(), strict=True):
        for model, facts in rows.cohort[rows.cohort["pool"] == pool].iterrows():
            ax.plot(rows.id[model], rows.ood.loc[model]["all"], color=SERIES[facts["base"]], lw=0.6, alpha=0.7)
            ax.plot(rows.id[model, 1.0], rows.ood.at[(model, 1.0), "all"], ".", color=SERIES[facts["base"]], ms=4)
        for base in rows.bases:
            start = (rows.members(pool, base)[0], 0.0)
            ax.plot(rows.id[start], rows.ood.at[start, "all"], "s", color=SERIES[base], label=f"base {base}")
        ax.set(title=f"Pool {name}", xlabel="ID accuracy (%)")
    figure.axes[0].set_ylabel("mean of 8 OOD sets (%)")
    figure.axes[0].legend(title="squares: zero-shot, dots: fine-tuned")
    return figure


def models(rows: Rows) -> Figure:
    """Global trace on training images against OOD error at alpha 1."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for ax, (pool, name) in zip(figure.subplots(1, 2, sharex=True, sharey=True), POOLS.items(), strict=True):
        for base in rows.bases:
            names = rows.members(pool, base)
            facts = rows.cohort.loc[names]
            error = 100 - rows.ood["all"].xs(1.0, level="alpha").loc[names]
            sharp = rows.ends.loc[names, ("train", "trace", MODEL)]
            for k, mark in ((1, "o"), (16, "^")):
                mine = (facts["renderings"] == k).to_numpy()
                ax.plot(sharp[mine], error[mine], mark, color=SERIES[base], ms=4, label=f"base {base}, {k} per page")
        ax.set(title=f"Pool {name}", xlabel="Hessian trace, training images", xscale="log")
    figure.axes[0].set_ylabel("OOD error at alpha 1 (%)")
    figure.axes[0].legend(fontsize=7)
    return figure


def taus(found: dict[str, Any]) -> Figure:
    """H1 and H2: global and layer tau in both pools."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    table, layers = found["h1"]["table"], found["h2"]["table"]
    names = [f"{r['pool']}  {r['measure']}" for r in table]
    looks = (
        (left, table, "raw", SERIES[0], -0.12, "o"),
        (left, table, "held", SERIES[1], 0.12, "s"),
        (right, layers, "tau", SERIES[2], -0.12, "o"),
        (right, layers, "global", SERIES[1], 0.12, "s"),
    )
    for ax, some, key, *look in looks:
        forest(ax, list(zip(names, [r[key] for r in some], strict=True)), "Kendall tau with OOD error", *look)
    left.plot([r["held_chance"] for r in table], np.arange(len(table)) + 0.12, "|", color=INK, ms=10)
    right.plot([r["chance"] for r in layers], np.arange(len(layers)) - 0.12, "|", color=INK, ms=10)
    left.set_title("H1, global: blue raw, orange held", fontsize=8.5)
    right.set_title("H2, held: green layer, orange global", fontsize=8.5)
    return figure


def variants(found: dict[str, Any]) -> Figure:
    """Global tau of all variants, raw, in both pools, on training and on held-out images."""
    table = found["variants"]
    names = [row["measure"] for row in table if row["on"] == "train"]
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    for ax, (pool, name) in zip(figure.subplots(1, 2, sharey=True), POOLS.items(), strict=True):
        for on, color, shift, mark in (("train", SERIES[0], -0.15, "o"), ("heldout", SERIES[1], 0.15, "s")):
            effects = {row["measure"]: row[f"{pool} raw"] for row in table if row["on"] == on}
            forest(ax, [(n, effects[n]) for n in names], "Kendall tau with OOD error", color, shift, mark)
        ax.set_title(f"Pool {name}")
    said = "sharpness of the whole; blue: on training images, orange: on held-out ID images"
    figure.suptitle(said, fontsize=8.5, color=MUTED)
    return figure


def mixes(found: dict[str, Any]) -> Figure:
    """H3 and H5, and each layer's return to zero-shot."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    h3, h5 = found["h3"], found["h5"]
    sparse = [(f"drop {p:.0%}, all paths", h3["relatives"][f"sparse {p:g} all"]) for p in (0.5, 0.9)]
    rows = [
        *sparse,
        ("drop 90%, any layer", h3["any layer"]),
        *((f"recipe − {name}", e) for name, e in h5["gaps"].items()),
    ]
    forest(left, rows, "points of OOD accuracy (half B)")
    left.set_title("H3: sparse − shrunk; H5: recipe − rival", fontsize=8.5)
    moves = found["moves"]
    forest(right, [(row["layer"], row["reset"]) for row in moves], "points of OOD accuracy", SERIES[0], -0.12)
    forest(right, [(row["layer"], row["random"]) for row in moves], "points of OOD accuracy", MISSING, 0.12, "s")
    right.set_title("Layer at zero-shot; grey: random move", fontsize=8.5)
    return figure


def projection(found: dict[str, Any]) -> Figure:
    """H4: gaps and activity."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    h4 = found["h4"]
    gaps = [(f"{rival}, {on.upper()}", e) for (rival, on), e in h4["gaps"].items()]
    gaps += [(f"AdamW path at equal ID, {on.upper()}", e) for on, e in h4["interpolated"].items()]
    forest(left, gaps, "points, SPD minus")
    left.set_title("H4: SPD against its rivals")
    forest(right, [(name, h4["rates"][name]) for name in LAYERS], "% of steps with r > 0")
    right.set_xlim(0, 100)
    right.set_title("Where SPD is active")
    return figure


def label_free(found: dict[str, Any]) -> Figure:
    """H6: how well each estimate ranks alphas, and what its pick costs."""
    figure = Figure(figsize=(8, 2.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    h6 = found["h6"]
    names = ["ATC", "DoC", "AC", "straggler", "global trace"]
    forest(left, [(name, h6["taus"][name]) for name in names], "tau with true OOD accuracy over alphas")
    forest(right, [(name, h6["regret"][name]) for name in names], "points lost by its pick")
    left.set_title("H6: ranking alphas without labels")
    return figure


def drawn(rows: Rows, found: dict[str, Any]) -> dict[str, Figure]:
    """Return all figures by file name."""
    assert len(ALPHAS) == 11 and len(CONFIRMATORY) == 3  # noqa: PT018 - what titles say
    with styled():
        made = {"family": family(rows), "models": models(rows)}
        makers = {
            "taus": taus,
            "variants": variants,
            "mixes": mixes,
            "projection": projection,
            "label-free": label_free,
        }
        made |= {name: make(found) for name, make in makers.items()}
        for figure in made.values():
            figure.draw_without_rendering()
    return {f"study-{name}.png": figure for name, figure in made.items()}
