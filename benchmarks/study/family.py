"""Fine-tune all runs of a base side by side, as one stack; on a GPU the step is one CUDA graph."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from finetune import WARM_UP, _as_pixels, zero_shot_head
from runs import TARGETS, Run
from torch import Tensor
from tower import Weights, encoded_images, image_weights
from updates import StackedUpdate, per_run

BATCH, LOOK, RHO, STRENGTH = 128, 10, 0.05, 1e-2


@dataclass(frozen=True)
class Family:
    """What a base's fine-tunes came to: weights stacked by run, and what is known of their training."""

    end: Weights
    matched: Weights  # where the clean training loss met the target first
    reached: np.ndarray  # (runs,) step of that, -1 where never
    target: float
    losses: np.ndarray  # (looks, runs) clean training loss
    activity: dict[str, np.ndarray]  # tensor -> (2, runs) shares of steps gated, active


def factor(step: int, total: int) -> float:
    """Return the share of the peak rate: linear warm-up, then a cosine to zero; zero outside the run."""
    if not 0 <= step < total:
        return 0.0
    warm = WARM_UP * total
    return min((step + 1) / warm, 1.0) * (1 + math.cos(math.pi * max(step - warm, 0) / (total - warm))) / 2


def plan_of(run: Run, step: int) -> tuple[float, float]:
    """Return the rate at a step and whether it is one of probing."""
    if step < run.probe:
        return run.rate * factor(step, run.probe), 1.0
    return run.rate * factor(step - run.probe, run.steps), 0.0


def batches(tried: list[Run], images: int, steps: int) -> tuple[Tensor, Tensor]:
    """Return rendering and image numbers, each (steps, runs, batch); epochs without replacement."""
    rendering, image = [], []
    for run in tried:
        draw = np.random.default_rng([run.seed, run.renderings, 7])
        order = np.concatenate([draw.permutation(images) for _ in range(math.ceil(steps * BATCH / images))])
        image.append(order[: steps * BATCH].reshape(steps, BATCH))
        rendering.append(draw.integers(run.renderings, size=(steps, BATCH)))
    return torch.from_numpy(np.stack(rendering, 1)), torch.from_numpy(np.stack(image, 1))


def augmented(pixels: Tensor) -> Tensor:
    """Return (n, 3, 32, 32) images turned by up to 15 degrees, shifted by up to 3 pixels, with noise."""
    draw = torch.rand(len(pixels), 4, device=pixels.device) * 2 - 1
    angle = draw[:, 0] * math.radians(15)
    rows = torch.stack(
        [angle.cos(), -angle.sin(), draw[:, 1] * 3 / 16, angle.sin(), angle.cos(), draw[:, 2] * 3 / 16], 1
    )
    grid = F.affine_grid(rows.view(-1, 2, 3), list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    contrast = (0.8 + 0.2 * draw[:, 3])[:, None, None, None]
    return (moved * contrast + 0.1 * torch.randn_like(moved)).clamp(-1, 1)


def loss_of(head: Tensor) -> Callable[[Weights, Tensor, Tensor, Tensor], Tensor]:
    """Return one run's loss as a function of tower, pixels, targets and label smoothing."""

    def loss(tower: Weights, pixels: Tensor, target: Tensor, smoothing: Tensor) -> Tensor:
        logits = encoded_images(tower, pixels) @ head.T
        even = -logits.log_softmax(-1).mean()
        return (1 - smoothing) * F.cross_entropy(logits, target) + smoothing * even

    return loss


class Stack:
    """All runs of a base in training."""

    def __init__(self, base: Weights, tried: list[Run], pool: dict[str, np.ndarray]) -> None:
        device = base["logit_scale"].device
        with torch.no_grad():
            self.head = zero_shot_head(base)
        self.runs = tried
        self.weights = {n: w.detach().expand(len(tried), *w.shape).clone() for n, w in image_weights(base).items()}

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, device=device)

        self.update = StackedUpdate(
            self.weights,
            column([r.decay for r in tried]),
            column([STRENGTH * (r.method == "L2-SP") for r in tried]),
            column([float(r.method == "SPD") for r in tried]),
        )
        self.smoothing = column([r.smoothing for r in tried])
        self.pages = torch.from_numpy(pool["images"]).to(device)
        self.labels = torch.from_numpy(pool["labels"]).to(device)
        self.rendering = torch.zeros(len(tried), BATCH, dtype=torch.long, device=device)
        self.image = torch.zeros_like(self.rendering)
        self.gradient = torch.vmap(torch.func.grad(loss_of(self.head)))
        self.sharp = next((i for i, r in enumerate(tried) if r.method == "SAM"), len(tried))
        self.turned = next((i for i, r in enumerate(tried) if r.augmented), len(tried))

    def step(self) -> None:
        """Make one step of every run on the images that `rendering` and `image` name."""
        pixels = _as_pixels(self.pages[self.rendering, self.image])
        chosen = slice(self.turned, self.turned + sum(r.augmented for r in self.runs))
        if chosen.start < len(self.runs):
            bent = augmented(pixels[chosen].flatten(0, 1)).view_as(pixels[chosen])
            pixels = torch.cat([pixels[: chosen.start], bent, pixels[chosen.stop :]])
        target = self.labels[self.image]
        gradients = self.gradient(self.weights, pixels, target, self.smoothing)
        sharp = slice(self.sharp, self.sharp + sum(r.method == "SAM" for r in self.runs))
        if sharp.start < len(self.runs):
            ascended = self._ascended({n: g[sharp] for n, g in gradients.items()}, sharp)
            own = self.gradient(ascended, pixels[sharp], target[sharp], self.smoothing[sharp])
            gradients = {n: torch.cat([g[: sharp.start], own[n], g[sharp.stop :]]) for n, g in gradients.items()}
        self.update.step(gradients)

    def _ascended(self, gradients: Weights, sharp: slice) -> Weights:
        """Return SAM's weights: rho along the gradient (arXiv 2010.01412)."""
        length = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()
        share = RHO / (length + 1e-12)
        return {n: self.weights[n][sharp] + per_run(share, g) * g for n, g in gradients.items()}

    def set_step(self, step: int, rendering: Tensor, image: Tensor) -> None:
        """Put the step's batches and rates where the step reads them."""
        self.rendering.copy_(rendering[step])
        self.image.copy_(image[step])
        rate, probing = zip(*(plan_of(run, step) for run in self.runs), strict=True)
        self.update.rate.copy_(torch.tensor(rate))
        self.update.probing.copy_(torch.tensor(probing))

    @torch.no_grad()
    def clean_loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Return each run's plain cross-entropy on fixed images, (runs,)."""
        logits = torch.vmap(encoded_images, in_dims=(0, None))(self.weights, pixels) @ self.head.T
        return F.cross_entropy(logits.transpose(1, 2), labels.expand(len(logits), -1), reduction="none").mean(1)


def captured(stack: Stack) -> Callable[[], None]:
    """Return the step as a CUDA graph that starts from the stack's present state."""
    state = [*stack.weights.values(), *stack.update.first.values(), *stack.update.second.values()]
    state += [*stack.update.count.values(), *stack.update.gated.values(), *stack.update.active.values()]
    before = [tensor.clone() for tensor in state]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            stack.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stack.step()
    torch._foreach_copy_(state, before)
    return graph.replay


def trained(base: Weights, tried: list[Run], pool: dict, train: dict, *, graph: bool, shorten: int = 1) -> Family:
    """Fine-tune all runs. `shorten` divides the number of steps, for trials."""
    stack = Stack(base, tried, pool)
    device, steps = stack.head.device, max(run.steps + run.probe for run in tried) // shorten
    rendering, image = (t.to(device) for t in batches(tried, len(pool["labels"]), steps))
    pixels, labels = (
        _as_pixels(torch.from_numpy(train["images"]).to(device)),
        torch.from_numpy(train["labels"]).to(device),
    )
    snaps = [{n: w.clone() for n, w in stack.weights.items()} for _ in TARGETS]
    reached, looks = torch.full((len(TARGETS), len(tried)), -1, device=device), []
    step = captured(stack) if graph else stack.step
    for number in range(steps):
        stack.set_step(number, rendering, image)
        step()
        if (number + 1) % LOOK == 0:
            looks.append(stack.clean_loss(pixels, labels))
            for place, target in enumerate(TARGETS):
                new = (looks[-1] <= target) & (reached[place] < 0)
                reached[place] = torch.where(new, number + 1, reached[place])
                for n, w in stack.weights.items():
                    snaps[place][n] = torch.where(per_run(new, w), w, snaps[place][n])
    chosen = target_of(reached.cpu().numpy(), tried)
    own = np.array([run.steps + run.probe for run in tried])
    counts = {n: torch.stack([stack.update.gated[n], stack.update.active[n]]) for n in stack.weights}
    activity = {n: c.cpu().numpy() / own for n, c in counts.items()}
    met = reached[chosen].cpu().numpy()
    return Family(stack.weights, snaps[chosen], met, TARGETS[chosen], torch.stack(looks).cpu().numpy(), activity)


def target_of(reached: np.ndarray, tried: list[Run]) -> int:
    """Return the number of the smallest target that at least 90 % of pool B reached; the largest if none is."""
    mine = [i for i, run in enumerate(tried) if run.pool == "B"]
    met = [i for i in range(len(reached)) if (reached[i, mine] >= 0).mean() >= 0.9]
    return met[0] if met else len(reached) - 1
