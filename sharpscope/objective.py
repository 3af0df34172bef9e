"""The function whose curvature is measured: mean loss over fixed batches, as a function of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from sharpscope.errors import MeasurementError, ModelError, UsageError
from sharpscope.losses import COUPLED, Loss
from sharpscope.ranks import ALONE, Ranks
from sharpscope.tree import Tree
from sharpscope.weight_norm import PlainWeightNorm


class Batch(NamedTuple):
    """Inputs, first axis examples, and targets, usually class numbers of shape ``(n,)``.

    Inputs are a tensor, or a mapping of tensors for a forward that takes several (image and text).
    """

    inputs: Any
    targets: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on the device."""
        if isinstance(self.inputs, Mapping):
            inputs: Any = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        else:
            inputs = self.inputs.to(device)
        return Batch(inputs, self.targets.to(device))

    def copy(self) -> Batch:
        """Return the batch in memory of its own."""
        if isinstance(self.inputs, Mapping):
            return Batch({name: tensor.clone() for name, tensor in self.inputs.items()}, self.targets.clone())
        return Batch(self.inputs.clone(), self.targets.clone())

    def take(self, other: Batch) -> None:
        """Overwrite the examples with those of a batch of the same shapes."""
        pairs = [(self.inputs, other.inputs)]
        if isinstance(self.inputs, Mapping):
            pairs = [(tensor, other.inputs[name]) for name, tensor in self.inputs.items()]
        for mine, theirs in [*pairs, (self.targets, other.targets)]:
            mine.data.copy_(theirs)  # .data: a graph that saved them is computed anew, and autograd need not know

    def split(self, pieces: int | list[int]) -> list[Batch]:
        """Return the examples in so many batches, as even as may be, or fewer; or cut before the numbered ones."""
        targets = self.targets.tensor_split(pieces)
        if isinstance(self.inputs, Mapping):
            columns = {name: tensor.tensor_split(pieces) for name, tensor in self.inputs.items()}
            inputs: list[Any] = [{name: parts[i] for name, parts in columns.items()} for i in range(len(targets))]
        else:
            inputs = list(self.inputs.tensor_split(pieces))
        return [Batch(x, y) for x, y in zip(inputs, targets, strict=True) if len(y)]


Forward = Callable[[Tree, Any], Tensor]
# A tensor that autograd saves -> how to make it again, or None for one that must be kept.
Again = Callable[[Tensor], Callable[[], Tensor] | None]


@dataclass(frozen=True)
class Objective:
    """Mean loss over fixed batches.

    Summed losses are divided once by the number of examples, so unequal batches weigh right by construction.

    Parameters
    ----------
    forward
        ``(weights, inputs) -> outputs``.
    loss
        ``(outputs, targets) -> sum over examples``.
    batches
        Fixed; the same at every point of a path.
    pieces
        That each batch is computed in, where it would take too much memory as a whole: no number changes beyond
        rounding, and probes go with batches, not pieces.
    ranks
        Processes that all hold this objective and share its batches: each computes on a run of them, and all have
        the same sums. Then every method but :meth:`outputs` and :meth:`part` is collective.
    again
        Which tensors graphs need not hold, as they can be made again: weights gathered from shards.

    Raises
    ------
    UsageError
        If the loss couples the examples of a batch, and batches differ in size or are to be computed in pieces: the
        mean over batches of one size is then the definition.
    """

    forward: Forward
    loss: Loss
    batches: tuple[Batch, ...]
    pieces: int = 1
    ranks: Ranks = ALONE
    again: Again | None = None

    def __post_init__(self) -> None:
        sizes = sorted({len(batch.targets) for batch in self.batches})
        if self.coupled and (self.pieces > 1 or len(sizes) > 1):
            cut = f"{self.pieces} pieces" if self.pieces > 1 else f"sizes {', '.join(map(str, sizes))}"
            raise UsageError(f"a contrastive loss on batches in {cut}", "batches of one size, each computed as a whole")

    @property
    def coupled(self) -> bool:
        """Whether each batch is one term of the mean loss, as a contrastive loss has it, not each example."""
        return self.loss in COUPLED

    @property
    def examples(self) -> int:
        """Number of examples over all batches."""
        return sum(len(batch.targets) for batch in self.batches)

    @property
    def share(self) -> range:
        """Numbers of the batches that this rank computes on."""
        return self.ranks.share(len(self.batches))

    @property
    def own_batches(self) -> tuple[Batch, ...]:
        """The batches that this rank computes on."""
        return self.batches[self.share.start : self.share.stop]

    def summed(self, parts: Iterable[Tree], like: Tree) -> Tree:
        """Return the sum over all batches of trees, of which this rank gives those of its own batches."""
        return self.ranks.summed(parts, like, len(self.batches))

    def outputs(self, weights: Tree, inputs: Any) -> Tensor:
        """Return the outputs; attention and weight norm run unfused: kernels have no second derivative, or err."""
        with unfused():
            return self.forward(weights, inputs)

    def part(self, weights: Tree, batch: Batch) -> Tensor:
        """Return what the batch adds to the mean loss: its summed loss over the number of all examples."""
        return self.loss(self.outputs(weights, batch.inputs), batch.targets) / self.examples

    def gradient(self, weights: Tree, names: Iterable[str]) -> tuple[float, Tree]:
        """Return the mean loss and its gradient by the named tensors, zero where the loss does not touch one.

        Cost: one gradient, without a graph to differentiate again.
        """
        leaves = {name: weights[name].detach().requires_grad_() for name in names}
        here, losses = {**weights, **leaves}, list[float]()

        def parts() -> Iterator[Tree]:
            for batch in self.own_batches:
                total = [torch.zeros_like(leaf) for leaf in leaves.values()]
                for piece in batch.split(self.pieces):
                    with torch.enable_grad(), saving(self.again):
                        part = self.part(here, piece)
                    found = torch.autograd.grad(part, list(leaves.values()), materialize_grads=True)
                    total = [t + f for t, f in zip(total, found, strict=True)]
                    losses.append(float(part.detach()))
                yield dict(zip(leaves, total, strict=True))

        total = self.summed(parts(), leaves)
        return sum(self.ranks.gathered(losses)), total

    @torch.no_grad()
    def __call__(self, weights: Tree) -> float:
        """Return the mean loss. Cost: one forward."""
        parts = [float(self.part(weights, batch)) for batch in self.own_batches]
        return sum(self.ranks.gathered(parts))


@contextmanager
def unfused() -> Iterator[None]:
    """Run attention and weight norm by operations that have second derivatives."""
    with sdpa_kernel(SDPBackend.MATH), PlainWeightNorm():
        yield


def saving(again: Again | None) -> AbstractContextManager[Any]:
    """Return a context in which autograd keeps no tensor that can be made again."""
    if again is None:
        return nullcontext()
    return saved_tensors_hooks(lambda tensor: again(tensor) or tensor.detach(), restored)


def restored(saved: Tensor | Callable[[], Tensor]) -> Tensor:
    """Return a saved tensor, made again if it was not kept."""
    return saved if isinstance(saved, Tensor) else saved()


def check_finite(loss: float, place: str) -> None:
    """Raise if the loss is not a finite number."""
    if not torch.isfinite(torch.tensor(loss)):
        raise MeasurementError(
            f"the loss at {place} is {loss}",
            "check the inputs for NaN or infinities, and the two checkpoints for weights that overflow",
        )


def check_finite_gradient(gradient: Tree, place: str, what: str = "gradient") -> None:
    """Raise if a derivative is not finite though the loss is, as where a root or a norm of zero is differentiated."""
    whole = {name: slope for name, slope in gradient.items() if not hasattr(slope, "placements")}  # no shard: all ranks
    if bad := next((name for name, slope in whole.items() if not slope.isfinite().all()), None):
        raise MeasurementError(
            f"the {what} by {bad!r} at {place} holds NaN or infinities",
            "look for weights that overflow, or a root, a norm or a quotient of zero in the forward",
        )


_SUM = 'a function of outputs and targets that returns the sum over examples, such as reduction="sum"'


def check_additive(objective: Objective, weights: Tree) -> None:
    """Raise unless the loss of the first batch is that of its halves together. Cost: a forward of a batch.

    Raises
    ------
    UsageError
        If it is not, as of a loss that is a mean; a contrastive loss has a batch as its unit and is not asked.
    """
    batch = objective.batches[0]
    if objective.coupled or len(batch.targets) < 2:
        return
    with torch.no_grad():
        outputs = objective.outputs(weights, batch.inputs)
        whole, *halves = _additive_parts(objective.loss, outputs, batch.targets)
        if whole == 0 and not any(halves):  # of a saturated model: what the loss does with others tells
            others = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype, device=outputs.device)
            whole, *halves = _additive_parts(objective.loss, others.view_as(outputs), batch.targets)
    # Of the largest part: a loss of 1e-9 is a loss too, and parts of both signs may cancel.
    most = 0.02 * max(map(abs, (whole, *halves)))
    if math.isfinite(whole + sum(halves)) and abs(whole - sum(halves)) > most:
        raise UsageError(
            f"the loss of a batch is {whole:.6g}, that of its halves together {sum(halves):.6g}: it is no sum over "
            "examples",
            _SUM,
        )


def _additive_parts(loss: Loss, outputs: Tensor, targets: Tensor) -> list[float]:
    """Return the loss of all examples and of each half."""
    half = len(targets) // 2
    try:
        found = [loss(outputs[part], targets[part]) for part in (slice(None), slice(half), slice(half, None))]
    except (RuntimeError, ValueError, TypeError, IndexError) as refusal:
        raise UsageError(
            f"the loss fails on outputs {tuple(outputs.shape)} {outputs.dtype} and class numbers "
            f"{tuple(targets.shape)}: {refusal}",
            f"{_SUM}; for targets in another form it makes them of the class numbers, e.g. by one_hot",
        ) from refusal
    odd = next((part for part in found if not isinstance(part, Tensor) or part.ndim), None)
    if odd is not None:
        shape = f"a tensor of shape {tuple(odd.shape)}" if isinstance(odd, Tensor) else type(odd).__name__
        raise UsageError(f"the loss of a batch is {shape}, not a tensor of one number", _SUM)
    return [float(part) for part in found]


def check_differentiable(objective: Objective, weights: Tree, names: Iterable[str]) -> None:
    """Raise unless autograd sees the outputs depend on the named tensors, and the loss on the outputs.

    Cost: a forward of the first batch, with its gradient graph.

    Raises
    ------
    ModelError, UsageError
        If the outputs do not, or the loss does not.
    """
    batch, leaves = objective.batches[0], {name: weights[name].detach().requires_grad_() for name in names}
    with torch.enable_grad(), saving(objective.again):
        outputs = objective.outputs({**weights, **leaves}, batch.inputs)
        if not outputs.requires_grad:
            raise ModelError(
                "autograd sees no weight in the model's logits, so there is no curvature",
                "a forward without detach(), torch.no_grad() or torch.inference_mode() around all of it",
            )
        if not objective.loss(outputs, batch.targets).requires_grad:
            raise UsageError(
                "the loss does not depend on the model's outputs as far as autograd sees",
                "a function that computes on the outputs it is given, without detach() or .item()",
            )


def check_deterministic(objective: Objective, weights: Tree) -> None:
    """Raise unless two evaluations of the first batch give the same loss, bit for bit. Cost: two forwards of a batch.

    Raises
    ------
    MeasurementError
        If the loss of the same batch differs: dropout that ignores ``eval()``, a random augmentation in ``forward``.
    """
    with torch.no_grad():
        first, second = (float(objective.part(weights, objective.batches[0])) for _ in range(2))
    # NaN is reported as NaN, not as non-determinism.
    if first != second and first == first:
        raise MeasurementError(
            f"the loss of one batch is {first!r}, then {second!r}: the model is random in evaluation mode",
            "switch off dropout or random augmentation inside forward",
        )
