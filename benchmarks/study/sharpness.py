"""Sharpness of one fine-tuned model by `sharpscope.scan`: every variant at its end, three measures along its path."""

import numpy as np
import pandas as pd
import torch
from finetune import _as_pixels
from torch import Tensor, nn
from tower import Weights, encoded_images

import sharpscope as ss
from sharpscope.curvature.lanczos import Eigenvalue
from sharpscope.curvature.trace import Trace
from sharpscope.measures import Measure
from sharpscope.perturbation import AverageMSharpness, MSharpness

IMAGES, GROUP = 72, 36  # images that sharpness is measured on, and those of a group or batch
TRACE = Trace(relative=0.2, absolute=0.02, most=16)


def worst(name: str, rho: float, **how: object) -> MSharpness:
    """Return a worst-case variant: one ascent step."""
    return MSharpness(rho=rho, m=GROUP, label=name, **how)  # type: ignore[arg-type]


def average(name: str, rho: float, **how: object) -> AverageMSharpness:
    """Return an average-case variant."""
    return AverageMSharpness(rho=rho, draws=2, label=name, **how)  # type: ignore[arg-type]


CORE: tuple[Measure, ...] = (TRACE, worst("m_sharpness", 0.05), worst("m_sharpness_adaptive", 0.5, adaptive=True))
MORE: tuple[Measure, ...] = (
    Eigenvalue(tolerance=0.05, most=20),
    worst("m_sharpness rho .01", 0.01),
    worst("m_sharpness rho .2", 0.2),
    worst("m_sharpness_adaptive rho .1", 0.1, adaptive=True),
    worst("m_sharpness_inf", 0.001, norm="inf"),
    worst("m_sharpness_logit_normalised", 0.05, logits="normalised"),
    worst("m_sharpness_adaptive_logit_normalised", 0.5, adaptive=True, logits="normalised"),
    average("m_sharpness_average rho .003", 0.003),
    average("m_sharpness_average", 0.01),
    average("m_sharpness_average rho .03", 0.03),
    average("m_sharpness_average_adaptive", 0.1, adaptive=True),
    average("m_sharpness_average_logit_normalised", 0.01, logits="normalised"),
    average("m_sharpness_average_adaptive_logit_normalised", 0.1, adaptive=True, logits="normalised"),
)


class Classifier(nn.Module):
    """An image tower under CLIP's tensor names with a fixed head: what `scan` takes."""

    def __init__(self, tower: Weights, head: Tensor) -> None:
        super().__init__()
        self.register_buffer("head_rows", head)
        for name, tensor in tower.items():
            module: nn.Module = self
            *parts, last = name.split(".")
            for part in parts:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, nn.Parameter(tensor.clone()))
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (n, 36)."""
        return encoded_images(dict(self.named_parameters()), pixels) @ self.head_rows.T


def loader(part: dict[str, np.ndarray]) -> list[tuple[Tensor, Tensor]]:
    """Return a set as one batch of normalised pixels and labels."""
    return [(_as_pixels(torch.from_numpy(part["images"])), torch.from_numpy(part["labels"]).long())]


def scanned(
    ends: tuple[Weights, Weights],
    head: Tensor,
    data: dict,
    alphas: list[float],
    measures: tuple[Measure, ...],
) -> pd.DataFrame:
    """Return curvature rows of the path between two towers on a set."""
    few = {key: data[key][:GROUP] for key in ("images", "labels")}
    found = ss.scan(
        *(Classifier(end, head) for end in ends), loader(few), sharpness_on=loader(data), alphas=alphas,
        measures=measures, limit=IMAGES, batch_size=GROUP, interventions=False, device="cpu", progress=False,
    )  # fmt: skip
    rows = found.layers.drop(columns="split")
    return rows.assign(layer=rows["layer"].str.removeprefix("visual."))
