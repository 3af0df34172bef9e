"""The network, the images and the weights that the benchmark measures: nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

Data = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class Size:
    """A CLIP vision configuration with a linear head, the images it is measured on and how it is trained."""

    config: dict[str, int]
    classes: int
    images: int
    batch: int
    rate: float
    steps: dict[str, int]  # state -> optimiser steps
    probe_batch: int  # of sharpscope, whose groups within a batch have probes of their own; of the reference too

    @property
    def pixels(self) -> int:
        """Side of an image."""
        return self.config["image_size"]


SIZES = {
    # 1.25 M weights; embedding, 7 blocks, post norm, head: 10 layers.
    "tiny": Size(
        {
            "hidden_size": 120,
            "intermediate_size": 480,
            "num_hidden_layers": 7,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "projection_dim": 64,
        },
        classes=10,
        images=64,
        batch=32,
        rate=3e-4,
        steps={"random": 0, "trained": 30, "converged": 300},
        probe_batch=64,
    ),
    # The vision configuration of CLIP ViT-B/32: 87.5 M weights, 15 layers.
    "b32": Size(
        {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": 32,
            "projection_dim": 512,
        },
        classes=100,
        images=512,
        batch=256,
        rate=3e-5,
        steps={"random": 0, "trained": 100, "converged": 600},
        probe_batch=512,
    ),
    # The vision configuration of CLIP ViT-L/14: 303 M weights, 27 layers.
    "l14": Size(
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
            "projection_dim": 768,
        },
        classes=100,
        images=256,
        batch=32,
        rate=1e-5,
        steps={"random": 0, "trained": 50, "converged": 200},
        probe_batch=32,
    ),
}
# The vision configuration of CLIP ViT-B/16: 86.3 M weights, 15 layers.
SIZES["b16"] = replace(SIZES["b32"], config={**SIZES["b32"].config, "patch_size": 16}, batch=64, probe_batch=64)
STATES = ("random", "trained", "converged")


class Tower(nn.Module):
    """CLIP's image tower and a linear head, with the tensor names of a CLIP model."""

    def __init__(self, size: Size, attention: str) -> None:
        super().__init__()
        vision = CLIPVisionModel(CLIPVisionConfig(**size.config, attn_implementation=attention))
        self.vision_model = getattr(vision, "vision_model", vision)  # transformers 5 has no inner model
        self.head = nn.Linear(size.config["hidden_size"], size.classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(n, classes)``."""
        return self.head(self.vision_model(pixel_values=images).pooler_output)


def tower(size: Size, attention: str) -> Tower:
    """Return the network in evaluation mode with the random weights of a fixed seed."""
    torch.manual_seed(0)
    return Tower(size, attention).eval()


def draw(size: Size, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return ``count`` images and labels: a smooth pattern per class under noise, separable."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(size.classes, (count,), generator=generator)
    noise = torch.randn(count, 3, size.pixels, size.pixels, generator=generator)
    return _patterns(size.classes, size.pixels)[labels] + noise, labels


@lru_cache(maxsize=2)
def _patterns(classes: int, pixels: int) -> Tensor:
    coarse = torch.randn(classes, 3, 8, 8, generator=torch.Generator().manual_seed(12345))
    return nn.functional.interpolate(coarse, size=(pixels, pixels), mode="bilinear")


def images(size: Size, count: int) -> Data:
    """Return the images that are measured, in equal batches where the count allows."""
    inputs, labels = draw(size, count, seed=1)
    return tuple(zip(inputs.split(size.batch), labels.split(size.batch), strict=True))


def train(size: Size, state: str, device: str) -> tuple[dict[str, Tensor], float]:
    """Return the weights of a state and the mean loss of the last ten steps."""
    model = tower(size, "sdpa").to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=size.rate)
    losses = []
    for step in range(size.steps[state]):
        inputs, labels = draw(size, 32, seed=1000 + step)
        loss = nn.functional.cross_entropy(model(inputs.to(device)), labels.to(device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    return weights, sum(losses[-10:]) / max(len(losses[-10:]), 1)
