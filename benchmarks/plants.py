"""Planted stragglers, found end to end through ``sharpscope.scan``; see stragglers.py for the command.

A small network is trained on data of two kinds (zero-shot) and then on one kind only (fine-tuned). Then a layer is made
a straggler in one of four ways:

* ``rescaled``: over ten fine-tunes, the layer is divided and the next one multiplied by a factor that grows with the
  model's OOD error. No function changes; the sharpness of both layers follows the OOD error. Seen across models.
* ``shuffled``: the layer alone is trained on with shuffled labels. Seen by an intervention.
* ``noise``: noise as long as the layer's zero-shot weights is added to its delta. Seen by an intervention.
* ``harmful noise``: the same, made longer by quarters until it does harm: until the layer's return to zero-shot gains
  three points on images that no scan sees. At the first length one in thirteen costs less than that, some nothing.

The intervention moves each layer alone back to zero-shot; a layer is flagged where the scan says that this is
``supported`` and that accuracy rises. What the path's own correlation says is noted beside.

Where nothing is planted, flags are counted as well:

* ``nothing``: fine-tuned as above. Layers may harm; what they do on 20,000 images of each OOD set says which.
* ``random``: every layer's delta is noise, half as long as its weights. From zero-shot each is one random direction
  more, so a flag of either sign is false.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sharpscope
from sharpscope.intervention import Interventions
from sharpscope.measures import Trace
from sharpscope.result import ScanResult
from sharpscope.stragglers.wording import BEYOND, LEVEL, STRAGGLER

DEPTH, WIDTH, CLASSES, FEATURES = 7, 24, 4, 10
ALPHAS = 11
MODELS = 10
CONTROLS = 79  # random moves of a layer where they can decide
IMAGES = 1000  # of each OOD set
MOST = 3000  # of which fewer are the first
TRUTH = 20_000  # further images of each OOD set that no scan sees
HARM = 3.0  # points of mean OOD accuracy from which a plant is harmful in truth
LONGER = 1.25  # noise that does less harm is made so much longer, again and again
STRENGTH = 1.5  # log factor of a rescaled pair per standard deviation of OOD error
KINDS = ("rescaled", "shuffled", "noise", "harmful noise", "nothing", "random")
ALONG = ("co_moves", "beyond_null", "others_beyond_null")
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """Training data of both kinds, and held-out data: ID of the first kind, OOD of the second and of a third.

    ``truth`` holds many more images of the OOD sets.
    """

    broad: Batch
    narrow: Batch
    held_out: Batch
    ood: dict[str, Batch]
    truth: dict[str, Batch]


def task(seed: int, images: int = IMAGES) -> Task:
    random = torch.Generator().manual_seed(seed)
    centres = 1.3 * torch.randn(CLASSES, FEATURES, generator=random)
    turn = torch.linalg.qr(torch.randn(FEATURES, FEATURES, generator=random))[0]

    def draw(count: int, shift: float, noise: float) -> Batch:
        labels = torch.arange(count) % CLASSES
        moved = (1 - shift) * centres + shift * centres @ turn
        return moved[labels] + noise * torch.randn(count, FEATURES, generator=random), labels

    first, second = draw(160, 0, 1.0), draw(160, 0.6, 1.0)
    broad = _joined(first, second)
    sets = {"shifted": (0.6, 1.0), "noisy": (0.3, 1.6)}
    few = {name: draw(300, *how) for name, how in sets.items()}  # drawn first: networks do not depend on the images
    narrow, held_out = draw(160, 0, 1.0), draw(200, 0, 1.0)
    more = {name: _joined(few[name], draw(MOST - 300, *how)) for name, how in sets.items()}
    ood = {name: (x[:images], y[:images]) for name, (x, y) in more.items()}
    return Task(broad, narrow, held_out, ood, {name: draw(TRUTH, *how) for name, how in sets.items()})


def _joined(one: Batch, other: Batch) -> Batch:
    return torch.cat([one[0], other[0]]), torch.cat([one[1], other[1]])


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    widths = [FEATURES, *[WIDTH] * (DEPTH - 1), CLASSES]
    parts: list[nn.Module] = []
    for size, next_size in pairwise(widths):
        parts += [nn.Linear(size, next_size), nn.ReLU()]
    model = nn.Sequential(*parts[:-1])
    for layer in linear(model):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return model


def linear(model: nn.Sequential) -> list[nn.Linear]:
    return [part for part in model if isinstance(part, nn.Linear)]


def names(model: nn.Sequential) -> list[str]:
    """Layer ids as the scan names them, in depth order."""
    return [name for name, part in model.named_children() if isinstance(part, nn.Linear)]


def trained(start: nn.Sequential, data: Batch, steps: int, rate: float, only: int | None = None) -> nn.Sequential:
    """A copy trained on from ``start``, all layers or only one."""
    model = copied(start)
    chosen = model if only is None else linear(model)[only]
    optimiser = torch.optim.Adam(chosen.parameters(), lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        cross_entropy(model(data[0]), data[1]).backward()
        optimiser.step()
    return model


def copied(model: nn.Sequential) -> nn.Sequential:
    """Another network of the same weights."""
    other = network(0).eval()
    other.load_state_dict(model.state_dict())
    return other


@torch.no_grad()
def rescaled(model: nn.Sequential, place: int, factor: float) -> nn.Sequential:
    """The same function with a layer divided by the factor and the next one multiplied."""
    first, second = linear(model)[place : place + 2]
    first.weight /= factor
    first.bias /= factor
    second.weight *= factor
    return model


@torch.no_grad()
def noisy(model: nn.Sequential, start: nn.Sequential, place: int, seed: int, length: float = 1) -> nn.Sequential:
    """A copy with noise added to the layer's delta, in units of the norm of the layer's weights at zero-shot."""
    model = copied(model)
    weight, before = linear(model)[place].weight, linear(start)[place].weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    weight += noise * (length * before.norm() / noise.norm())
    return model


@torch.no_grad()
def correct(model: nn.Module, batch: Batch) -> np.ndarray:
    return (model(batch[0]).argmax(1) == batch[1]).numpy()


def scan(
    start: nn.Module, end: nn.Module, data: Task, alphas: Any, seed: int, *, sharpness: bool = True, moves: bool = False
) -> ScanResult:
    return sharpscope.scan(
        start, end, [data.held_out], ood={name: [batch] for name, batch in data.ood.items()},
        alphas=alphas, measures=[Trace(relative=0.4)] if sharpness else [], limit=64, batch_size=MOST,
        interventions=Interventions(limit=None, most=CONTROLS) if moves else False,
        seed=seed, progress=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """What was planted and what was said of it: ``found``, ``first``; and along the path of a single model."""

    kind: str
    seed: int
    place: int | None
    gain: float | None  # in truth, in points of mean OOD accuracy, when the planted layer goes back to zero-shot
    found: bool
    first: bool
    off_zero: int  # other layers whose effect is
    others_flagged: int
    others_wrong: int  # of them, those whose flag the truth contradicts
    co_moves: bool | None  # None: not measured
    beyond_null: bool | None
    others_beyond_null: int | None
    length: float | None = None  # of noise, in units of the layer's zero-shot weights


def trial(kind: str, seed: int, strength: float = 1, images: int = IMAGES, *, along: bool = True) -> Trial:
    """Plant one of :data:`KINDS`, scan, judge; ``along`` the path as well, or by interventions alone.

    Strength multiplies log factor, steps on shuffled labels or noise.
    """
    data = task(seed, images)
    start = trained(network(seed), data.broad, 150, 3e-3)
    place = int(np.random.default_rng(seed).integers(1, DEPTH - 2))  # an inner layer with a next one
    if kind == "rescaled":
        return _rescaled_trial(seed, data, start, place, STRENGTH * strength)
    if kind == "random":
        return _random_trial(seed, data, start, strength)
    end = tuned = trained(start, data.narrow, 80, 3e-3)
    length = strength if "noise" in kind else None
    if length:
        end = noisy(tuned, start, place, seed, length)
        while kind == "harmful noise" and true_gains(start, end, data)[place] < HARM:
            length *= LONGER
            end = noisy(tuned, start, place, seed, length)
    if kind == "shuffled":
        shuffled = data.narrow[1][torch.randperm(160, generator=torch.Generator().manual_seed(seed))]
        end = trained(end, (data.narrow[0], shuffled), round(40 * strength), 5e-3, only=place)
    result = scan(start, end, data, ALPHAS if along else 2, seed, sharpness=along, moves=True)
    table, truth = _moves(result, "necessary"), true_gains(start, end, data)
    flagged = set(table.index[table["supported"] & (table["effect"] > 0)])
    own = set() if kind == "nothing" else {names(start)[place]}
    others = flagged - own
    return Trial(
        kind, seed, place if own else None, truth[place] if own else None,
        found=bool(flagged & own),
        first=bool(flagged & own) and table.loc[list(flagged), "effect"].idxmax() in own,
        off_zero=int(_off_zero(table.drop(index=list(own))).sum()),
        others_flagged=len(others),
        others_wrong=sum(gain <= 0 for name, gain in zip(names(start), truth, strict=True) if name in others),
        length=length,
        **(_path_words(result, own) if along else dict.fromkeys(ALONG)),
    )  # fmt: skip


def _random_trial(seed: int, data: Task, start: nn.Sequential, strength: float) -> Trial:
    end = start
    for place in range(DEPTH):
        end = noisy(end, start, place, seed + place * 10_000, 0.5 * strength)
    result = scan(start, end, data, 2, seed, sharpness=False, moves=True)
    table = _moves(result, "sufficient")
    flags = int(table["supported"].sum())
    return Trial(
        "random", seed, None, None,
        found=False, first=False,
        off_zero=int(_off_zero(table).sum()),
        others_flagged=flags,
        others_wrong=flags,
        **dict.fromkeys(ALONG),
    )  # fmt: skip


def _path_words(result: ScanResult, own: set[str]) -> dict[str, Any]:
    table = result.stragglers
    mine = table["layer"].isin(own)
    beyond = table["verdict"].isin([BEYOND, STRAGGLER])
    return {
        "co_moves": bool((mine & table["verdict"].isin(["co-moves", BEYOND, STRAGGLER])).any()),
        "beyond_null": bool((mine & beyond).any()),
        "others_beyond_null": int((~mine & beyond).sum()),
    }


def _rescaled_trial(seed: int, data: Task, start: nn.Sequential, place: int, strength: float) -> Trial:
    random = np.random.default_rng([seed, 1])
    models = []
    for number in range(MODELS):
        chosen = torch.from_numpy(random.integers(0, 160, 120))
        narrow = (data.narrow[0][chosen], data.narrow[1][chosen])
        models.append(trained(start, narrow, 10 + 10 * number, 3e-3))
    errors = np.array([np.mean([1 - correct(m, batch).mean() for batch in data.ood.values()]) for m in models])
    standing = (errors - errors.mean()) / errors.std()
    ends = [rescaled(m, place, float(np.exp(strength * s))) for m, s in zip(models, standing, strict=True)]
    results = [scan(start, end, data, [1], seed) for end in ends]
    table = sharpscope.across_models(results, at=1, measure="trace", seed=seed)
    layers = table[(table["kind"] == "layer") & (table["target"] == "OOD accuracy") & (table["given"] == "")]
    flagged = set(layers.loc[layers["p_family"] <= LEVEL, "predictor"])
    own = set(names(start)[place : place + 2])
    first = layers.loc[layers["tau"].abs().idxmax(), "predictor"]
    along = _path_words(scan(start, ends[-1], data, ALPHAS, seed), own)
    return Trial(
        "rescaled", seed, place, None,
        found=bool(flagged & own),
        first=bool(flagged & own) and first in own,
        off_zero=0,
        others_flagged=len(flagged - own),
        others_wrong=len(flagged - own),
        **along,
    )  # fmt: skip


def _moves(result: ScanResult, question: str) -> pd.DataFrame:
    """Effects on the mean OOD accuracy by layer."""
    table = result.interventions
    return table[(table["question"] == question) & (table["split"] == "ood mean")].set_index("layer")


def _off_zero(table: pd.DataFrame) -> pd.Series:
    return (table["low"] > 0) | (table["high"] < 0)


@torch.no_grad()
def true_gains(start: nn.Sequential, end: nn.Sequential, data: Task) -> list[float]:
    """Gain in mean OOD accuracy, in points, when each layer alone goes back to zero-shot, on images no scan sees."""
    before = np.mean([correct(end, batch).mean() for batch in data.truth.values()])
    found = []
    for place in range(DEPTH):
        back = copied(end)
        linear(back)[place].load_state_dict(linear(start)[place].state_dict())
        found.append(100 * float(np.mean([correct(back, batch).mean() for batch in data.truth.values()]) - before))
    return found
