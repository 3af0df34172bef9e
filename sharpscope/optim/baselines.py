"""What Selective Projection Decay is compared with: L2-SP, projection to a radius, linear probing first, SAM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sharpscope.errors import ModelError, UsageError
from sharpscope.optim import projection, shards
from sharpscope.optim.anchor import Parameters, Source, checked_patterns, excluded
from sharpscope.optim.anchored import Anchored, as_groups
from sharpscope.optim.chunk import Entry, chunks


class AdamL2SP(Anchored, torch.optim.AdamW):
    """AdamW on the loss plus ``strength / 2 * ||theta - theta_0||^2`` (L2-SP, arXiv 1802.01483).

    Parameters
    ----------
    params, lr, anchor, betas, eps, weight_decay, exclude, store_anchor, maximize, foreach
        See :class:`~sharpscope.optim.adam_spd.AdamSPD`. The penalty's gradient is added to ``.grad`` in every step,
        after any clipping; the method asks for no penalty towards the anchor on a new head: exclude it.
    strength
        Of the penalty; groups may have their own.
    """

    rule = torch.optim.AdamW

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        *,
        anchor: Source,
        strength: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        exclude: str | Iterable[str] = (),
        store_anchor: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        if not 0 <= strength < float("inf"):
            raise UsageError(f"strength={strength}", "a number from 0")
        self._start(anchor, exclude, store_anchor, strength=strength)
        rest: dict[str, Any] = {"maximize": maximize, "foreach": foreach}
        torch.optim.AdamW.__init__(self, as_groups(params), lr, betas, eps, weight_decay, **rest)
        self._finish()

    def _before_update(self) -> None:
        for group, name, parameter in self.anchored():
            if parameter.grad is not None and group["strength"]:
                shards.check_gradient(name, parameter, parameter.grad)
                anchor = self.anchor_of(name, parameter)
                known = None if anchor is None else [anchor]
                moved = projection.deviations([shards.local(parameter)], known)
                sign = -1 if group["maximize"] else 1
                shards.local(parameter.grad).add_(moved[0], alpha=sign * group["strength"])


class AdamRadius(Anchored, torch.optim.AdamW):
    """AdamW whose every tensor stays within a fixed distance of its anchor: projection as in TPGM and FTP.

    Those methods learn the radii from validation data or gradients (arXiv 2303.10720, 2310.19182); here one number
    holds for all.

    Parameters
    ----------
    params, lr, anchor, betas, eps, weight_decay, exclude, store_anchor, foreach, fused
        See :class:`~sharpscope.optim.adam_spd.AdamSPD`.
    radius
        Largest ``||theta - theta_0|| / ||theta_0||`` of a tensor; for anchor zero the largest norm.
    """

    rule = torch.optim.AdamW

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        *,
        anchor: Source,
        radius: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        exclude: str | Iterable[str] = (),
        store_anchor: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        if not radius > 0:
            raise UsageError(f"radius={radius}", "a number above 0")
        self._start(anchor, exclude, store_anchor, radius=radius)
        rest: dict[str, Any] = {"foreach": foreach, "fused": fused}
        torch.optim.AdamW.__init__(self, as_groups(params), lr, betas, eps, weight_decay, **rest)
        self._finish()

    def _after_update(self) -> None:
        entries = [
            Entry(group, name, p, name, shards.groups(p), self.anchors[name] is not None)
            for group, name, p in self.anchored()
            if p.grad is not None
        ]
        for chunk in chunks(entries, self.anchor_of):
            (part,) = chunk.parts  # a tensor is a unit: one device and dtype
            weights, anchors = part.weights, part.anchors
            deviation = part.deviations(weights)
            distance = chunk.pooled([projection.squares(deviation)[None]])[0].sqrt()
            size = torch.ones_like(distance)
            if anchors is not None:
                length = chunk.pooled([projection.squares(projection.widened(anchors))[None]])[0].sqrt()
                size = torch.where(length > 0, length, size)
            share = 1 - (chunk.option("radius") * size / distance.clamp_min(1e-300)).clamp(max=1)
            for _, values in chunk.spread(share):
                projection.pull(weights, deviation, values.unbind())


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation (arXiv 2010.01412) around any optimiser.

    Groups, their options and the state are those of the wrapped optimiser, so a learning rate scheduler of torch takes
    either of the two.

    Parameters
    ----------
    optimizer
        Makes the step with the gradient at ``theta + rho * g / ||g||``.
    rho
        Radius of the perturbation; of groups that are maximised it goes down their gradient.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, rho: float = 0.05) -> None:
        if not rho > 0:
            raise UsageError(f"rho={rho}", "a number above 0")
        self.optimizer = optimizer
        self.rho = rho
        # In the place of torch's constructor, which would make groups and a state beside those of the wrapped one.
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "rho": self.rho}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of the wrapped optimiser."""
        return self.optimizer.param_groups

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The options of the wrapped optimiser."""
        return self.optimizer.defaults

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the wrapped optimiser."""
        return self.optimizer.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimiser."""
        self.optimizer.add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step; the closure clears gradients, computes the loss, calls backward, and returns the loss.

        It is called twice; the value of the first call, at the weights themselves, is returned.

        Raises
        ------
        UsageError
            Without a closure.
        """
        if closure is None:
            raise UsageError("SAM computes the loss at two places, and step() got no closure", "step(closure)")
        with torch.enable_grad():
            loss = closure()
        with self._perturbed(), torch.enable_grad():
            closure()
        self.optimizer.step()
        return loss

    @contextmanager
    def _perturbed(self) -> Iterator[None]:
        """Move the weights along their gradient; afterwards they are as they were, also of an interrupted step."""
        uphill = {p: -1 if group.get("maximize") else 1 for group in self.param_groups for p in group["params"]}
        weights = [weight for weight in uphill if weight.grad is not None]
        saved = [weight.clone() for weight in weights]
        try:
            self._perturb(weights, [uphill[weight] for weight in weights])
            yield
        finally:
            if weights:
                torch._foreach_copy_(weights, saved)

    def _perturb(self, weights: list[Tensor], uphill: list[int]) -> None:
        """Move to where what is minimised is larger, what is maximised smaller."""
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        if sparse := [gradient for gradient in gradients if gradient.layout != torch.strided]:
            raise ModelError(f"a gradient of shape {tuple(sparse[0].shape)} is sparse", "sparse=False in the embedding")
        sums = [projection.squares([shards.whole(gradient)])[0] for gradient in gradients]
        norm = sum(sums, torch.zeros((), dtype=torch.float64)).sqrt()
        for weight, gradient, sign in zip(weights, gradients, uphill, strict=True):
            weight.add_(gradient * (sign * self.rho / (norm + 1e-12)).to(gradient.dtype))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the wrapped optimiser; SAM has none."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of the wrapped optimiser."""
        self.optimizer.load_state_dict(state_dict)


@contextmanager
def probing(module: nn.Module, head: str | Iterable[str]) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Freeze all but the head within the block: the first half of LP-FT (arXiv 2202.10054).

    Parameters
    ----------
    module
        The network.
    head
        Regular expressions; parameters whose name one is found in are trained.

    Yields
    ------
    list
        The named parameters of the head, for an optimiser.

    Raises
    ------
    UsageError
        If no parameter matches.
    """
    patterns = checked_patterns(head)
    before = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    chosen = [(name, p) for name, p in module.named_parameters() if excluded(name, patterns)]
    if not chosen:
        raise UsageError(f"head={head!r} matches no parameter", f"names such as {next(iter(before), '')!r}")
    try:
        module.requires_grad_(False)
        for _, parameter in chosen:
            parameter.requires_grad_()
        yield chosen
    finally:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(before[name])
