"""Figure 11: does it depend on the measure which layers are sharp? Rank agreement of the measures over layers."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize

from sharpscope.errors import UsageError
from sharpscope.report.canvas import MARK, PAPER, axes, literal, styled
from sharpscope.report.curves import layer_grid, measures
from sharpscope.report.words import measure_name, titled
from sharpscope.result import ScanResult
from sharpscope.table import MODEL, Array

DRAWS = 200  # bootstrap samples of layers
NEEDED = 4  # layers
HOW = "scan with more measures, e.g. measures=('trace', 'lambda_max', 'm_sharpness')"


def agreement(result: ScanResult) -> pd.DataFrame:
    """Return one row per pair of measures: ``first second tau low high layers alphas``.

    ``tau`` is Kendall's tau-b over layers, averaged over the alphas where both measures have at least four layers;
    ``low`` and ``high`` its 95 % bootstrap interval over layers (a pair drawn twice says nothing). Empty with fewer
    than two measures.
    """
    kinds = [kind for kind in measures(result) if not kind.endswith("lambda_min")]
    signs = {kind: _signs(result, kind) for kind in kinds}
    rows = []
    for first, second in combinations(kinds, 2):
        shared = sorted(signs[first].keys() & signs[second].keys())
        usable = [(signs[first][alpha], signs[second][alpha]) for alpha in shared]
        usable = [pair for pair in usable if _layers(*pair) >= NEEDED]
        if usable:
            draws = _bootstrap(usable, abs(result.meta["seed"]))
            tau = float(np.mean([_tau(*pair, np.ones((1, len(pair[0]))))[0] for pair in usable]))
            low, high = np.nanquantile(draws, (0.025, 0.975))
            facts = {"layers": max(_layers(*pair) for pair in usable), "alphas": len(usable)}
            ends = {"low": min(float(low), tau), "high": max(float(high), tau)}
            rows.append({"first": first, "second": second, "tau": tau, **ends, **facts})
    return pd.DataFrame(rows, columns=["first", "second", "tau", "low", "high", "layers", "alphas"])


def _signs(result: ScanResult, kind: str) -> dict[float, Array]:
    """Return by alpha the signs of all differences between layers, ``(layers, layers)``, 0 where one is missing."""
    grid = layer_grid(result, kind)
    kept = [row for row, name in enumerate(grid.layers) if name != MODEL]
    return {alpha: np.nan_to_num(_order(grid.value[kept, i])) for i, alpha in enumerate(grid.alphas)}


def _order(values: Array) -> Array:
    return np.asarray(np.sign(values[:, None] - values[None, :]))


def _layers(first: Array, second: Array) -> int:
    return int(((first != 0).any(axis=1) & (second != 0).any(axis=1)).sum())


def _tau(first: Array, second: Array, weights: Array) -> Array:
    """Return tau-b under layer weights ``(draws, layers)``; NaN where nothing can be compared."""
    known = (first != 0).any(axis=1) & (second != 0).any(axis=1)
    weights = weights * known
    both, own, other = first * second, first**2, second**2
    sums = [np.einsum("di,di->d", weights @ matrix, weights) for matrix in (both, own, other)]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sums[0] / np.sqrt(sums[1] * sums[2]))


def _bootstrap(usable: list[tuple[Array, Array]], seed: int) -> Array:
    count = len(usable[0][0])
    generator = np.random.default_rng([seed, 11])
    weights = generator.multinomial(count, np.full(count, 1 / count), size=DRAWS).astype(float)
    drawn = np.stack([_tau(*pair, weights) for pair in usable])
    return np.asarray(drawn.mean(axis=0))


def agreement_figure(result: ScanResult, *, ax: Axes | None = None) -> Axes:
    """Return Axes with a matrix: Kendall's tau between two measures over layers, mean over alphas, 95 % interval below.

    Raises
    ------
    UsageError
        If there are no two measures with values in at least four layers.
    """
    found = agreement(result)
    if found.empty:
        raise UsageError("agreement of measures needs two of them in four layers", HOW)
    kinds = [kind for kind in measures(result) if kind in {*found["first"], *found["second"]}]
    grid = np.full((len(kinds), len(kinds)), np.nan)
    colours = ListedColormap(colormaps["RdBu"](np.linspace(0.2, 0.8, 256))).with_extremes(bad=PAPER)
    with styled():
        made = axes(ax, (7.2, 1.4 + 0.62 * len(kinds)))
        for row in found.itertuples():
            i, j = kinds.index(str(row.first)), kinds.index(str(row.second))
            grid[i, j] = grid[j, i] = float(row.tau)
            for x, y in ((i, j), (j, i)):
                text = f"{row.tau:.2f}\n{row.low:.2f} to {row.high:.2f}".replace("-", "−")
                made.text(x, y, text, ha="center", va="center", fontsize=8, color=MARK)
        made.imshow(grid, cmap=colours, norm=Normalize(-1, 1), aspect="auto", interpolation="nearest")
        names = [titled(measure_name(kind)).replace(" ", "\n", 1) for kind in kinds]
        made.set_xticks(range(len(kinds)), names)
        made.set_yticks(range(len(kinds)), names)
        literal([*made.get_xticklabels(), *made.get_yticklabels()])
        made.spines[:].set_visible(False)
        made.tick_params(length=0)
        return made
