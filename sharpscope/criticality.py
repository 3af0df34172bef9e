"""Module criticality: how far a layer can be taken back to zero-shot, and how much noise it bears there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from sharpscope.data import as_split
from sharpscope.errors import UsageError
from sharpscope.evaluate import joined, judged
from sharpscope.job import Job
from sharpscope.moves import replays_exactly
from sharpscope.objective import Batch
from sharpscope.partition import Granularity
from sharpscope.path import mix
from sharpscope.plan import Plan
from sharpscope.precision import differentiable
from sharpscope.preparation import prepare
from sharpscope.replay import Replay
from sharpscope.stragglers.interval import Interval, mean_interval
from sharpscope.tree import Tree, gaussian, select

COLUMNS = ("layer", "criticality", "low", "high", "alpha", "sigma", "rise", "draws", "n", "converged")
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
SIGMAS = tuple(round(10 ** (k / 4), 6) for k in range(-16, 1))  # 1e-4 to 1, a factor of 1.8 apart


class _Place(NamedTuple):
    """A place tried: how far the layer goes to fine-tuned, the noise there, and the rise in error."""

    alpha: float
    sigma: float
    rise: Interval


@dataclass(frozen=True)
class _Setting:
    """What is tried and what is allowed."""

    allowed: float
    alphas: tuple[float, ...]
    sigmas: tuple[float, ...]
    draws: int
    seed: int


@differentiable()
def criticality(
    model_a: Any,
    model_b: Any,
    loader: Any,
    *,
    allowed: float = 0.01,
    alphas: Sequence[float] = ALPHAS,
    sigmas: Sequence[float] = SIGMAS,
    draws: int = 3,
    limit: int | None = 256,
    granularity: Granularity = "block",
    seed: int = 0,
    device: str | None = None,
) -> pd.DataFrame:
    """Return the criticality of every layer of the fine-tuned model, arXiv 1912.00528.

    ``min over alpha, sigma of alpha^2 ||delta_l||^2 / sigma^2``, such that the mean error with only layer l at
    ``(1 - alpha) zero-shot + alpha fine-tuned + sigma N(0, 1)`` exceeds that of the fine-tuned model by at most
    ``allowed``. 0: the layer can go back to zero-shot and bear noise there. Infinite: not even the least noise is
    borne at any alpha. The layer's running statistics go with it, without noise, and count in no distance.

    Parameters
    ----------
    model_a, model_b, loader, limit, granularity, seed, device
        As for :func:`sharpscope.scan`.
    allowed
        Rise in error, a fraction.
    alphas, sigmas
        What is tried; for each alpha sigma grows until the error does. The minimum is that of this grid.
    draws
        Noises per place, 2 or more, the same at every alpha and sigma.

    Returns
    -------
    DataFrame
        ``layer criticality low high alpha sigma rise draws n converged``: ``low`` and ``high`` take the
        constraint at the ends of the 95 % interval of the rise (points, over images and draws); ``converged`` is false
        where sigma stopped at an end of its grid, so that the value is a bound only.

    Notes
    -----
    Cost per layer: at most ``alphas * sigmas * draws`` forwards over the images, from the layer on where that is exact.
    """
    setting = _Setting(allowed, tuple(sorted(alphas)), tuple(sorted(sigmas)), draws, seed)
    _check(setting)
    data = as_split(loader, "id")
    job = prepare((model_a, model_b), data, [], data, Plan((0.0, 1.0), (), seed, limit, 64, granularity), None, device)
    bench = _Bench(job)
    rows = [_row(layer, bench, setting) for layer in job.layers.layers]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _check(setting: _Setting) -> None:
    if not math.isfinite(setting.allowed) or setting.allowed < 0:
        raise UsageError(f"allowed={setting.allowed}: a rise in error, 0 or more", "allowed=0.01")
    if setting.draws < 2 or not setting.alphas or not setting.sigmas or setting.sigmas[0] <= 0:
        raise UsageError("criticality needs two draws, an alpha and sigmas above 0", "leave the defaults")


class _Bench:
    """The fine-tuned model on its images, with one layer replaced at a time."""

    def __init__(self, job: Job) -> None:
        self.job, self.batches, self.weights = job, job.objective.batches, job.weights(1.0)
        exact = replays_exactly(job, self.batches[0])
        self._forwards = [self._from_moved(batch) if exact else self._full(batch) for batch in self.batches]
        self.base = self._correct(self.weights, [])

    def _from_moved(self, batch: Batch) -> Callable[[Tree, Sequence[str]], torch.Tensor]:
        replay = Replay(self.job.network)
        replay.record(self.weights, batch.inputs)
        return lambda weights, moved: replay(weights, batch.inputs, moved)

    def _full(self, batch: Batch) -> Callable[[Tree, Sequence[str]], torch.Tensor]:
        return lambda weights, _: self.job.network.forward(weights, batch.inputs)

    @torch.no_grad()
    def _correct(self, weights: Tree, moved: Sequence[str]) -> np.ndarray:
        pairs = zip(self._forwards, self.batches, strict=True)
        found = joined([judged(forward(weights, moved), batch.targets) for forward, batch in pairs])
        # The largest of NaN is class 0, which may be the right one.
        return np.where(np.isfinite(found["loss"]), found["correct"], 0.0)

    def rise(self, layer: str, alpha: float, sigma: float, draws: int, seed: int) -> Interval:
        """Return the rise in error, in points, with the layer at alpha and noise of that size, averaged over draws."""
        names, path = self.job.path_layers.layers[layer], self.job.path
        centre = {name: mix(path.start[name], path.end[name], alpha) for name in names}
        parameters, gaps = select(centre, self.job.layers.layers[layer]), []
        for draw in range(draws):
            noise = gaussian(parameters, "criticality", seed, draw)
            noisy = {name: torch.add(tensor, noise[name], alpha=sigma) for name, tensor in parameters.items()}
            gaps.append(self.base - self._correct({**self.weights, **centre, **noisy}, names))
        return mean_interval([np.mean(gaps, axis=0)], [100 * float(gap.mean()) for gap in gaps])


def _tried(layer: str, bench: _Bench, setting: _Setting) -> Iterator[_Place]:
    """Yield places, the noise growing at each alpha until the error surely does."""
    for alpha in setting.alphas:
        for sigma in setting.sigmas:
            rise = bench.rise(layer, alpha, sigma, setting.draws, setting.seed)
            yield _Place(alpha, sigma, rise)
            if rise.low > 100 * setting.allowed:
                break


def _row(layer: str, bench: _Bench, setting: _Setting) -> dict[str, object]:
    places = list(_tried(layer, bench, setting))
    delta = select(bench.job.path.delta, bench.job.layers.layers[layer])
    squared = float(sum(torch.sum(d.double() ** 2) for d in delta.values()))
    allowed = 100 * setting.allowed + 1e-9  # a rise of just that is allowed, however it is rounded
    value, place = _least(places, squared, [p.rise.value for p in places], allowed)
    low, _ = _least(places, squared, [p.rise.low for p in places], allowed)
    high, _ = _least(places, squared, [p.rise.high for p in places], allowed)
    inside = place is not None and setting.sigmas[0] < place.sigma < setting.sigmas[-1]
    return {
        "layer": layer, "criticality": value, "low": low, "high": high,
        "alpha": place.alpha if place else math.nan, "sigma": place.sigma if place else math.nan,
        "rise": place.rise.value if place else math.nan, "draws": setting.draws, "n": len(bench.base),
        "converged": inside or value == 0,
    }  # fmt: skip


def _least(
    places: Sequence[_Place], squared: float, rises: Sequence[float], allowed: float
) -> tuple[float, _Place | None]:
    """Return the least ``alpha^2 ||delta||^2 / sigma^2`` among places reached without exceeding what is allowed."""
    best, found, shut = math.inf, None, set[float]()
    for place, rise in zip(places, rises, strict=True):
        if rise > allowed:
            shut.add(place.alpha)
        elif place.alpha not in shut and (value := place.alpha**2 * squared / place.sigma**2) < best:
            best, found = value, place
    return best, found
