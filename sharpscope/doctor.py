"""What an installation can do: versions, attention, and whether its second derivatives are right."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sharpscope.curvature.point import Point
from sharpscope.errors import ModelError, UsageError
from sharpscope.models.installed import TORCHVISION_FIX, distribution, imported, torchvision_mismatch
from sharpscope.objective import Batch, Objective
from sharpscope.soundness import asymmetry
from sharpscope.tree import Tree, axpy, gaussian, norm, scaled

PACKAGES = ("numpy", "scipy", "pandas", "matplotlib", "safetensors", "pillow", "tqdm", "psutil", "typer", "pydantic")
_READERS = (("transformers", "CLIPModel"), ("open_clip", None), ("timm", None))
_STEP = 1e-5  # of the finite difference, for a vector of length 1
_TOLERANCE = 1e-7  # relative; a wrong rule of differentiation is off by 1e-2, rounding by 1e-10


@dataclass(frozen=True)
class Check:
    """One line of the examination; ``passed`` is None where there is nothing to pass."""

    name: str
    found: str
    passed: bool | None = None

    def __str__(self) -> str:
        word = {True: "PASS", False: "FAIL", None: ""}[self.passed]
        return f"{self.name:<28} {word:<4}  {self.found}".rstrip()


class _Small(nn.Module):
    """Layer norm and attention, one head of width 8: what second derivatives went wrong on in the wild."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (n, 5) of inputs (n, tokens, 8)."""
        q, k, v = self.qkv(self.norm(inputs)).unsqueeze(1).chunk(3, dim=-1)
        mixed: Tensor = nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)
        logits: Tensor = self.out(nn.functional.gelu(mixed.mean(dim=1)))
        return logits


def small_problem(device: torch.device) -> tuple[Objective, Tree]:
    """Return an objective of a small attention net in float64 and its weights, the same ones each time."""
    net = _Small().double().to(device)
    like = {name: parameter.detach() for name, parameter in net.named_parameters()}
    weights = scaled(gaussian(like, "doctor", "weights"), 0.5)
    inputs = gaussian({"inputs": torch.empty(12, 4, 8, dtype=torch.float64, device=device)}, "doctor")["inputs"]
    targets = torch.arange(12, device=device) % 5

    def forward(at: Tree, batch: Tensor) -> Tensor:
        found: Tensor = functional_call(net, at, (batch,))
        return found

    return Objective(forward, nn.CrossEntropyLoss(reduction="sum"), (Batch(inputs, targets),)), weights


def second_derivative_errors(objective: Objective, weights: Tree) -> tuple[float, float]:
    """Return how far ``H`` is from symmetric and from a finite difference of the gradient, both relative.

    ``|u'Hv - v'Hu| / |Hv|``, see :func:`sharpscope.soundness.asymmetry`, and for a random unit vector
    ``|Hv - (g(w + h v) - g(w - h v)) / 2h| / |Hv|``, which holds in float64 only. Cost: three products and three
    gradients.
    """
    v = gaussian(weights, "doctor", "v")
    v = scaled(v, 1 / norm(v))
    point = Point(objective, weights, tuple(weights))
    product = point.product(v)
    ahead, behind = (Point(objective, axpy(s * _STEP, v, weights), tuple(weights)).gradient for s in (1, -1))
    difference = scaled(axpy(-1.0, behind, ahead), 0.5 / _STEP)
    return asymmetry(point.product, point.gradient), norm(axpy(-1.0, difference, product)) / norm(product)


def examine() -> Iterator[Check]:
    """Yield the checks, one after the other; whether the installation is sound is in their ``passed``."""
    yield Check("python", f"{platform.python_version()} on {platform.platform(terse=True)}")
    yield from (Check(name, importlib.metadata.version(name)) for name in ("sharpscope", "torch", *PACKAGES))
    yield from (_reader(name, member) for name, member in _READERS)
    yield _torchvision()
    yield from _machine()
    for device in _devices():
        yield _second_derivatives(device)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _reader(name: str, member: str | None) -> Check:
    version = _installed(distribution(name))
    if version is None:
        return Check(name, "not installed; only its own models need it")
    try:
        imported(name, member)
    except UsageError as error:
        return Check(name, f"{version}: {error.problem}", False)
    return Check(name, f"{version}, {member or name} can be imported", True)


def _torchvision() -> Check:
    """A torchvision built for another torch breaks the libraries that look for it; none at all is fine."""
    version = _installed("torchvision")
    if version is None:
        return Check("torchvision", "not installed, not needed by transformers")
    if (reason := torchvision_mismatch()) is not None:
        return Check("torchvision", f"{reason}; {TORCHVISION_FIX}", False)
    return Check("torchvision", f"{version} can be imported", True)


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _machine() -> Iterator[Check]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Check("GPUs", ", ".join(gpus) or "none")
    yield Check("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores")
    yield Check("float32 matmul precision", torch.get_float32_matmul_precision())
    flag = "on" if torch.are_deterministic_algorithms_enabled() else "off"
    benchmark = "on" if torch.backends.cudnn.benchmark else "off"
    yield Check("deterministic algorithms", f"{flag}; cudnn.benchmark {benchmark}")
    kernels = ("flash", "mem_efficient", "cudnn", "math")
    on = [name for name in kernels if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()]
    yield Check("attention kernels", f"{', '.join(on)}; curvature uses math, the others have no second derivative")


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def _second_derivatives(device: torch.device) -> Check:
    name = f"second derivatives on {device}"
    try:
        skew, difference = second_derivative_errors(*small_problem(device))
    except (ModelError, RuntimeError) as error:
        return Check(name, f"attention cannot be differentiated twice: {_line(error)}", False)
    found = f"|u'Hv - v'Hu| {skew:.1e}, against a finite difference {difference:.1e} (limit {_TOLERANCE:.0e})"
    return Check(name, found, skew < _TOLERANCE and difference < _TOLERANCE)
