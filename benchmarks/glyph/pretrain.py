"""Pre-train the pair contrastively on scenes rendered inside the training step."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from captions import Captioner, vocabulary
from render import Fonts, fonts, images, normalized
from scenes import choice, cumulative_shares, wild
from torch import Tensor
from tower import Weights, configuration, encoded_images, encoded_texts

WARM_UP, LARGEST_SCALE = 500, math.log(100.0)


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of the pre-training."""

    steps: int
    batch: int = 1024
    rate: float = 1.5e-3
    decay: float = 0.1
    seed: int = 0


def initial_weights(seed: int) -> Weights:
    """Return the named weights of a fresh CLIPModel, float32 on the CPU."""
    from transformers import CLIPModel

    torch.manual_seed(seed)
    model = CLIPModel(configuration(vocabulary()[0]))
    return {name: w.detach().clone() for name, w in model.state_dict().items()}


class Renderer:
    """Image-caption pairs from the pre-training faces, drawn where the bitmaps are."""

    def __init__(self, coverage: Tensor, faces: list[dict], device: torch.device) -> None:
        rows = [i for i, f in enumerate(faces) if f["split"] == "pretrain"]
        kept = [faces[i] for i in rows]
        self.fonts: Fonts = fonts(coverage[rows].to(device))
        styles = [f["style"] for f in kept]
        self.shares = cumulative_shares(styles).to(device)
        self.caption = Captioner(styles, [f["weight"] for f in kept], [f["upright"] for f in kept], device)

    def __call__(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return normalised pixels (batch, 3, 32, 32) and token ids (batch, 32)."""
        face = choice(self.shares, batch, None)
        scene = wild(face, torch.randint(36, (batch,), device=face.device))
        return normalized(images(self.fonts, scene)), self.caption(scene)


def contrastive_loss(weights: Weights, pixels: Tensor, ids: Tensor) -> Tensor:
    """Return the symmetric cross-entropy of matching each image with its caption."""
    scale = weights["logit_scale"].clamp(max=LARGEST_SCALE).exp()
    logits = scale * encoded_images(weights, pixels) @ encoded_texts(weights, ids).T
    targets = torch.arange(len(ids), device=ids.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def optimizer(weights: Weights, recipe: Recipe, rate: Tensor) -> torch.optim.AdamW:
    """Return AdamW with the rate in a tensor, that a captured step may read; vectors are not decayed."""
    matrices = [w for w in weights.values() if w.dim() > 1]
    vectors = [w for w in weights.values() if w.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), capturable=rate.is_cuda)


def training_step(
    weights: Weights, renderer: Renderer, recipe: Recipe, rate: Tensor
) -> tuple[Callable[[], None], Tensor]:
    """Return a function making one step (one CUDA graph on a GPU), and the tensor holding its loss."""
    update, loss_now = optimizer(weights, recipe, rate), torch.zeros((), device=rate.device)
    leaves = list(weights.values())

    def step() -> None:
        update.zero_grad(set_to_none=True)
        with torch.no_grad():
            pixels, ids = renderer(recipe.batch)
        loss = contrastive_loss(weights, pixels, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        update.step()
        loss_now.copy_(loss.detach())

    return (_captured(step) if rate.is_cuda else step), loss_now


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    """Return the step as a graph replay: a thousand small kernels would otherwise wait for the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(keep: Callable[[], None] = step) -> None:  # noqa: ARG001
        # The graph writes to the bitmaps' and the optimizer's addresses without owning them: `keep` does. Freed, their
        # memory goes to the next evaluation, and the loss jumps to log(batch) from there on.
        graph.replay()

    return replay


def rate_at(step: int, recipe: Recipe) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine to zero."""
    warm = min(WARM_UP, recipe.steps // 10 + 1)
    done = max(step - warm, 0) / max(recipe.steps - warm, 1)
    return recipe.rate * min((step + 1) / warm, 1.0) * (1 + math.cos(math.pi * done)) / 2


def pretrained(
    coverage: Tensor, faces: list[dict], recipe: Recipe, device: torch.device, every: int = 1000
) -> Iterator[tuple[int, float, float, Weights]]:
    """Yield (steps done, loss, seconds, weights) every so many steps and at the end."""
    weights = {name: w.to(device).requires_grad_() for name, w in initial_weights(recipe.seed).items()}
    torch.manual_seed(recipe.seed + 1)
    rate = torch.tensor(1e-6, device=device)
    step, loss = training_step(weights, Renderer(coverage, faces, device), recipe, rate)
    begin = time.perf_counter()
    for done in range(1, recipe.steps + 1):
        rate.fill_(rate_at(done - 1, recipe))
        step()
        if done % every == 0 or done == recipe.steps:
            if not loss.item() < math.log(recipe.batch) - 1 and done > 4 * WARM_UP:
                raise FloatingPointError(f"pre-training learns nothing: loss {loss.item():.2f} after {done} steps")
            now = {name: w.detach().clone() for name, w in weights.items()}
            yield done, loss.item(), time.perf_counter() - begin, now
