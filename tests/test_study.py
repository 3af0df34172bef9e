"""The study: its optimisers are sharpscope's, and its write-up is what the stored rows say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
for folder in ("glyph", "study"):
    sys.path.insert(0, str(ROOT / "benchmarks" / folder))

from updates import CLIP, HEAD, StackedUpdate  # noqa: E402

from sharpscope.optim import AdamL2SP, AdamSPD  # noqa: E402

NAMES = {HEAD: (3, 4), "vision_model.bias": (4,), "vision_model.weight": (5, 4)}
STEPS, RATE = 12, 0.05


def gradients(seed: int) -> list[dict[str, torch.Tensor]]:
    """Gradients that turn round halfway, so that SPD has something to pull back."""
    draw = torch.Generator().manual_seed(seed)
    base = {n: torch.randn(s, generator=draw, dtype=torch.float64) for n, s in NAMES.items()}
    noise = [{n: torch.randn(s, generator=draw, dtype=torch.float64) for n, s in NAMES.items()} for _ in range(STEPS)]
    return [{n: (1 if i < STEPS // 3 else -0.2) * base[n] + 0.3 * noise[i][n] for n in NAMES} for i in range(STEPS)]


def clipped(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    length = torch.stack([g.square().sum() for g in found.values()]).sum().sqrt()
    return {n: g * min(1.0, CLIP / (float(length) + 1e-6)) for n, g in found.items()}


def rival(method: str, start: dict[str, torch.Tensor], decay: float) -> dict[str, torch.Tensor]:
    """Where sharpscope's or torch's optimiser ends up."""
    weights = {n: torch.nn.Parameter(w.clone()) for n, w in start.items()}
    matrices = [(n, p) for n, p in weights.items() if p.dim() > 1]
    vectors = [(n, p) for n, p in weights.items() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    if method == "AdamW":
        groups = [g | {"params": [p for _, p in g["params"]]} for g in groups]
        update = torch.optim.AdamW(groups, lr=RATE)
    elif method == "SPD":
        update = AdamSPD(groups, lr=RATE, anchor="init", decay=1.0)
    else:
        update = AdamL2SP(groups, lr=RATE, anchor="init", strength=0.5)
    for found in gradients(1):
        for n, g in clipped(found).items():
            weights[n].grad = g.clone()
        update.step()
    return {n: p.detach() for n, p in weights.items()}


@pytest.mark.parametrize(("run", "method", "decay"), [(0, "AdamW", 0.2), (1, "L2-SP", 0.0), (2, "SPD", 0.1)])
def test_each_run_of_a_stack_moves_as_the_optimiser_of_sharpscope_does(run, method, decay):
    draw = torch.Generator().manual_seed(0)
    start = {n: torch.randn(s, generator=draw, dtype=torch.float64) for n, s in NAMES.items()}
    stacked = {n: w.expand(3, *w.shape).clone() for n, w in start.items()}
    numbers = [torch.tensor(v, dtype=torch.float64) for v in ([0.2, 0.0, 0.1], [0.0, 0.5, 0.0], [0.0, 0.0, 1.0])]
    update = StackedUpdate(stacked, *numbers)
    update.rate.fill_(RATE)
    for found in gradients(1):
        update.step({n: g.expand(3, *g.shape) for n, g in found.items()})
    for name, end in rival(method, start, decay).items():
        torch.testing.assert_close(stacked[name][run], end, rtol=1e-9, atol=1e-11)
    active = sum(int(a[2]) for a in update.active.values())
    assert active > 0  # the projection of SPD was exercised


def test_a_probing_run_moves_its_head_alone_and_starts_the_rest_afresh():
    stacked = {n: torch.zeros(2, *s, dtype=torch.float64) for n, s in NAMES.items()}
    nothing = torch.zeros(2, dtype=torch.float64)
    update = StackedUpdate(stacked, nothing, nothing, nothing)
    update.rate.fill_(RATE)
    update.probing.copy_(torch.tensor([0.0, 1.0]))
    steps = [{n: g.expand(2, *g.shape) for n, g in found.items()} for found in gradients(2)]
    update.step(steps[0])
    assert stacked[HEAD][1].abs().min() > 0
    assert not any(stacked[n][1].any() for n in NAMES if n != HEAD)
    update.probing.zero_()
    update.step(steps[1])
    first = stacked["vision_model.weight"][1]  # its first step: the rate itself, as bias correction starts with it
    torch.testing.assert_close(first.abs(), torch.full_like(first, RATE), rtol=1e-3, atol=0.0)
