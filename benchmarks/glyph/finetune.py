"""Fine-tune the image tower on book pages against the frozen zero-shot head, many runs side by side."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from captions import CLASSES, LENGTH, TEMPLATES, vocabulary
from torch import Tensor
from tower import Weights, encoded_images, encoded_texts, image_weights

STEPS, BATCH, DECAY, CLIP, WARM_UP = 400, 128, 0.01, 1.0, 0.1
RATES, RENDERINGS, SEEDS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (1, 16), (0, 1, 2)


@dataclass(frozen=True)
class Run:
    """One fine-tune: learning rate, how many renderings of each page it sees, and its seed."""

    rate: float
    renderings: int
    seed: int


def runs() -> list[Run]:
    """Return every fine-tune tried."""
    return [Run(*choice) for choice in itertools.product(RATES, RENDERINGS, SEEDS)]


def prompts() -> Tensor:
    """Return token ids of every class in every template, (classes, templates, 32)."""
    tokens, _ = vocabulary()
    begin, end = tokens["<|startoftext|>"], tokens["<|endoftext|>"]
    rows = [[tokens[word + "</w>"] for word in t.format(c).split()] for c in CLASSES for t in TEMPLATES]
    padded = [[begin, *row, *[end] * (LENGTH - 1 - len(row))] for row in rows]
    return torch.tensor(padded).view(len(CLASSES), len(TEMPLATES), LENGTH)


def zero_shot_head(weights: Weights) -> Tensor:
    """Return (36, 64): the logit scale times the unit mean of each class's unit text embeddings."""
    ids = prompts().to(weights["logit_scale"].device)
    embedded = encoded_texts(weights, ids.flatten(0, 1)).view(*ids.shape[:2], -1)
    return weights["logit_scale"].exp() * F.normalize(embedded.mean(1), dim=-1)


def batches(tried: list[Run], images: int) -> tuple[Tensor, Tensor]:
    """Return rendering and image numbers of every batch, each (steps, runs, batch); epochs without replacement."""
    rendering, image = [], []
    for run in tried:
        draw = np.random.default_rng([run.seed, run.renderings])
        epochs = math.ceil(STEPS * BATCH / images)
        order = np.concatenate([draw.permutation(images) for _ in range(epochs)])[: STEPS * BATCH]
        image.append(order.reshape(STEPS, BATCH))
        rendering.append(draw.integers(run.renderings, size=(STEPS, BATCH)))
    return torch.from_numpy(np.stack(rendering, 1)), torch.from_numpy(np.stack(image, 1))


def rate_factor(step: int) -> float:
    """Return the share of the peak learning rate at a step: linear warm-up, then a cosine to zero."""
    warm = WARM_UP * STEPS
    return min((step + 1) / warm, 1.0) * (1 + math.cos(math.pi * max(step - warm, 0) / (STEPS - warm))) / 2


def _as_pixels(raw: Tensor) -> Tensor:
    """Return (..., 32, 32, 3) bytes as normalised (..., 3, 32, 32) pixels."""
    return (raw.float() / 127.5 - 1).movedim(-1, -3)


class StackedAdamW:
    """AdamW over a stack of runs: every tensor has a leading run dimension, every run its own rate and clipping."""

    def __init__(self, weights: Weights, rates: Tensor) -> None:
        self.weights, self.rates, self.count = weights, rates, 0
        self.first = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.second = {name: torch.zeros_like(w) for name, w in weights.items()}

    @torch.no_grad()
    def step(self, gradients: Weights, factor: float) -> None:
        """Update the weights in place with gradients clipped to norm CLIP per run."""
        self.count += 1
        norm = sum(g.flatten(1).square().sum(1) for g in gradients.values()).sqrt()  # type: ignore[union-attr]
        shrink = (CLIP / (norm + 1e-6)).clamp(max=1)
        for name, w in self.weights.items():
            shape = (-1, *[1] * (w.dim() - 1))
            g, rate = gradients[name] * shrink.view(shape), factor * self.rates.view(shape)
            m, v = self.first[name].lerp_(g, 0.1), self.second[name].lerp_(g * g, 0.001)
            if w.dim() > 2:  # matrices; vectors are not decayed
                w.mul_(1 - rate * DECAY)
            unbiased = (v / (1 - 0.999**self.count)).sqrt() + 1e-8
            w.sub_(rate * (m / (1 - 0.9**self.count)) / unbiased)


def finetuned(base: Weights, tried: list[Run], pool: np.ndarray, labels: np.ndarray) -> tuple[Weights, Tensor]:
    """Return the image towers of all runs, stacked (runs, ...), and the loss of each run's last 50 steps (runs,)."""
    device = base["logit_scale"].device
    with torch.no_grad():
        head = zero_shot_head(base)
    weights = {n: w.detach().expand(len(tried), *w.shape).clone() for n, w in image_weights(base).items()}
    update = StackedAdamW(weights, torch.tensor([run.rate for run in tried], device=device))
    pages, targets = torch.from_numpy(pool).to(device), torch.from_numpy(labels).to(device)
    rendering, image = (t.to(device) for t in batches(tried, len(labels)))

    def loss(tower: Weights, pixels: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(encoded_images(tower, pixels) @ head.T, target)

    gradient = torch.vmap(torch.func.grad_and_value(loss))
    tail = []
    for step in range(STEPS):
        pixels = _as_pixels(pages[rendering[step], image[step]])
        gradients, value = gradient(weights, pixels, targets[image[step]])
        update.step(gradients, rate_factor(step))
        tail = [*tail[-49:], value]
    return weights, torch.stack(tail).mean(0)
