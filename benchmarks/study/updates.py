"""AdamW, L2-SP, SPD and probing first, for a stack of runs at once: every tensor has a leading run dimension.

The rules are those of `sharpscope.optim` (tests/test_study.py compares them step by step). All that changes from step
to step is read from tensors, so that a CUDA graph may hold the step.
"""

import torch
from torch import Tensor

Weights = dict[str, Tensor]
CLIP, HEAD = 1.0, "visual_projection.weight"


def per_run(values: Tensor, like: Tensor) -> Tensor:
    """Return numbers per run (runs,) shaped to multiply a stacked tensor."""
    return values.view(-1, *[1] * (like.dim() - 1))


def norms(stacked: Tensor) -> Tensor:
    """Return the Euclidean norm of each run's tensor, (runs,)."""
    return stacked.flatten(1).square().sum(1).sqrt()


class StackedUpdate:
    """The optimisers of a stack of runs.

    Parameters
    ----------
    weights
        Stacked, changed in place; what they are now is every run's anchor.
    decay, strength, projection
        Per run: decoupled weight decay (matrices only), L2-SP's strength, SPD's lambda; 0 for none.
    """

    def __init__(self, weights: Weights, decay: Tensor, strength: Tensor, projection: Tensor) -> None:
        self.weights, self.decay, self.strength, self.projection = weights, decay, strength, projection
        self.anchors = {name: w.clone() for name, w in weights.items()}
        self.first = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.second = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.rate, self.probing = torch.zeros_like(decay), torch.zeros_like(decay)  # set before each step
        self.count = {True: torch.zeros_like(decay), False: torch.zeros_like(decay)}  # of the head, of the rest
        self.gated = {name: torch.zeros_like(decay) for name in weights}
        self.active = {name: torch.zeros_like(decay) for name in weights}

    @torch.no_grad()
    def step(self, gradients: Weights) -> None:
        """Update in place; gradients of all but the head are dropped where a run is probing."""
        kept = {n: g if n == HEAD else g * per_run(1 - self.probing, g) for n, g in gradients.items()}
        length = torch.stack([norms(g).square() for g in kept.values()]).sum(0).sqrt()
        shrink = (CLIP / (length + 1e-6)).clamp(max=1)
        self.count[True] += 1
        self.count[False] += 1 - self.probing
        for name, w in self.weights.items():
            raw = kept[name] * per_run(shrink, w)
            self._one(name, w, raw, self.count[name == HEAD].clamp(min=1))

    def _one(self, name: str, w: Tensor, raw: Tensor, count: Tensor) -> None:
        away = w - self.anchors[name]
        before, pulled = norms(away), (raw * away).flatten(1).sum(1) > 0
        rate = self.rate if name == HEAD else self.rate * (1 - self.probing)
        g = raw + per_run(self.strength, w) * away * (1 if name == HEAD else per_run(1 - self.probing, w))
        m, v = self.first[name].lerp_(g, 0.1), self.second[name].lerp_(g * g, 0.001)
        if w.dim() > 2:  # matrices; vectors are not decayed
            w.mul_(1 - per_run(rate * self.decay, w))
        unbiased = (v / per_run(1 - 0.999**count, w)).sqrt() + 1e-8
        w.sub_(per_run(rate / (1 - 0.9**count), w) * m / unbiased)
        self._project(name, w, before, pulled)

    def _project(self, name: str, w: Tensor, before: Tensor, pulled: Tensor) -> None:
        """Selective projection (arXiv 2411.01713) of the runs that have a lambda."""
        away = w - self.anchors[name]
        after = norms(away)
        ratio = ((after - before) / after.clamp(min=1e-30)).clamp(0, 1) * pulled
        w.sub_(per_run((self.projection * ratio).clamp(max=1), w) * away)
        moving = self.rate > 0  # a run that is over makes no decisions
        self.gated[name] += pulled & moving
        self.active[name] += (ratio > 0) & moving
