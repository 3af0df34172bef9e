"""What a merge is going to do, tensor by tensor, checked before anything is written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpscope._version import __version__
from sharpscope.errors import MismatchError, ModelError, UsageError
from sharpscope.merging.names import alphas_of, layers_of
from sharpscope.merging.pairing import check_configurations, partners_of
from sharpscope.models.weight_files import TorchFile
from sharpscope.models.weights import Weights
from sharpscope.models.wrappers import AVERAGED
from sharpscope.partition import Granularity
from sharpscope.path import mix
from sharpscope.recipe import CONVENTION, Recipe

BUFFERS = "integers"  # what counts and indexes is in no layer
_COUNTERS = ("num_batches_tracked", AVERAGED)


@dataclass(frozen=True)
class Line:
    """One line of the table: a layer, its alpha, how many tensors and bytes it has."""

    layer: str
    alpha: float
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class MergePlan:
    """Two checkpoints and the alpha of each tensor; :meth:`tensor` computes one.

    Attributes
    ----------
    zero_shot, fine_tuned
        The sources.
    recipe, granularity
        Layer patterns and what they are patterns of.
    partners
        Key in the fine-tuned checkpoint -> key in the zero-shot one.
    homes
        Key -> layer id, :data:`BUFFERS` for integers.
    alphas
        Layer id -> alpha, in depth order.
    remarks
        What else the result must be read with.
    """

    zero_shot: Weights
    fine_tuned: Weights
    recipe: Recipe
    granularity: Granularity
    partners: Mapping[str, str]
    homes: Mapping[str, str]
    alphas: Mapping[str, float]
    remarks: tuple[str, ...] = ()

    def lines(self) -> Iterator[Line]:
        """Yield the table, layer by layer; integers last, with the alpha of the source that they are copied from."""
        for layer in [*self.alphas, *([BUFFERS] if BUFFERS in self.homes.values() else [])]:
            keys = [key for key, home in self.homes.items() if home == layer]
            size = sum(self.fine_tuned.spec(key).nbytes for key in keys)
            yield Line(layer, self.alphas.get(layer, self._integers_from), len(keys), size)

    @property
    def _integers_from(self) -> float:
        """The end that integers are copied from: the fine-tuned one, unless nothing else is."""
        return 0.0 if set(self.alphas.values()) == {0.0} else 1.0

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(line.nbytes for line in self.lines())

    def tensor(self, key: str) -> Tensor:
        """Return the merged tensor in the fine-tuned model's dtype; at alpha 0 and 1 the source's bytes.

        Cost: both sources' tensors are read, nothing else is held.

        Raises
        ------
        MismatchError
            If integers differ between the ends.
        ModelError
            If the result is not finite.
        """
        alpha = self.alphas.get(self.homes[key])
        end = self.fine_tuned.tensor(key)
        if alpha == 1.0 or key not in self.partners:
            return end
        start = self.zero_shot.tensor(self.partners[key])
        if alpha is None:
            return self._integers(key, start, end)
        if alpha == 0.0 and start.dtype == end.dtype:
            return start
        wide = torch.float64 if torch.float64 in (start.dtype, end.dtype) else torch.float32
        first, second = start.to(wide), end.to(wide)
        merged = mix(first, second, alpha).to(end.dtype)
        # Infinities that both have are meant: attention masks.
        if not _is_finite(merged.to(wide)) and not torch.equal(first, second):
            raise ModelError(
                f"{key!r} is not finite at alpha {alpha:g}",
                "look for infinities in both checkpoints; outside of [0, 1] half precision may overflow",
            )
        return merged

    def _integers(self, key: str, start: Tensor, end: Tensor) -> Tensor:
        """Return the fine-tuned model's; those of the zero-shot model must be the same, but for counters."""
        if set(self.alphas.values()) in ({0.0}, {1.0}):
            return start if self._integers_from == 0.0 else end
        if not key.endswith(_COUNTERS) and not torch.equal(start, end):
            raise MismatchError(
                f"{key!r} holds {str(end.dtype).removeprefix('torch.')} that differ between the models: there is "
                "nothing between them",
                "make them the same in both checkpoints",
            )
        return end

    @property
    def mixes_text(self) -> bool:
        """Whether layers of a text tower lie between the ends."""
        return any(layer.startswith("text") and alpha not in (0.0, 1.0) for layer, alpha in self.alphas.items())

    @property
    def notes(self) -> list[str]:
        """What the result must be read with."""
        chosen = [*self.zero_shot.notes, *self.fine_tuned.notes]
        return [*self.remarks, *chosen, *self._beyond(), *self._casts(), *self._statistics(), *self._left_out()]

    def _beyond(self) -> Iterator[str]:
        if beyond := [f"{alpha:g}" for alpha in sorted(set(self.alphas.values())) if not 0 <= alpha <= 1]:
            yield f"alpha {', '.join(beyond)} lies beyond the two models, outside of [0, 1]"

    def _casts(self) -> Iterator[str]:
        kinds = {
            key: (self.zero_shot.spec(p).dtype, self.fine_tuned.spec(key).dtype) for key, p in self.partners.items()
        }
        mixed = [key for key, (start, end) in kinds.items() if start != end]
        if mixed:
            start, end = (str(kind).removeprefix("torch.") for kind in kinds[mixed[0]])
            yield (
                f"{len(mixed)} tensors are {start} in the zero-shot and {end} in the fine-tuned model "
                f"({mixed[0]}, ...); they are written as {end}"
            )

    def _statistics(self) -> Iterator[str]:
        inner = (key for key, home in self.homes.items() if self.alphas.get(home, 1.0) not in (0.0, 1.0))
        if found := [key for key in inner if key.endswith(("running_mean", "running_var"))]:
            yield (
                f"{len(found)} tensors are batch-norm statistics ({found[0]}, ...); between the ends they are wrong "
                "without recalibration"
            )

    def _left_out(self) -> Iterator[str]:
        for file in self.fine_tuned.files:
            if isinstance(file, TorchFile) and file.besides:
                yield f"{file.path} holds {', '.join(file.besides)} beside the weights; they are left out"

    @property
    def hashes(self) -> dict[str, str]:
        """What tells both models from others, as recipes hold it among their sources."""
        return {"zero_shot_sha256": self.zero_shot.sha256, "fine_tuned_sha256": self.fine_tuned.sha256}

    def facts(self) -> dict[str, str]:
        """Return what is stored in the metadata of each file of the result."""
        return {
            "sharpscope.version": __version__,
            "sharpscope.alpha_convention": CONVENTION,
            "sharpscope.recipe": json.dumps(self.recipe.rules),
            "sharpscope.granularity": self.granularity,
            "sharpscope.zero_shot.sha256": self.zero_shot.sha256,
            "sharpscope.fine_tuned.sha256": self.fine_tuned.sha256,
        }

    def __repr__(self) -> str:
        rows = [("layer", "alpha", "tensors", "bytes")]
        rows += [(ln.layer, f"{ln.alpha:g}", str(ln.tensors), f"{ln.nbytes:,}") for ln in self.lines()]
        rows.append(("all", "", str(len(self.homes)), f"{self.nbytes:,}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            row[0].ljust(widths[0]) + "".join("  " + t.rjust(w) for t, w in zip(row[1:], widths[1:], strict=True))
            for row in rows
        )


def merge_plan(
    zero_shot: Weights,
    fine_tuned: Weights,
    recipe: Recipe,
    *,
    granularity: Granularity = "block",
    scanned: Mapping[str, Sequence[str]] | None = None,
) -> MergePlan:
    """Return what a merge would do.

    Parameters
    ----------
    zero_shot, fine_tuned
        See :func:`sharpscope.models.weights.read_weights`. The result has the keys, dtypes and files of the second.
    recipe
        Layer patterns and alphas.
    granularity, scanned
        What a layer is; ``scanned`` are the layers of a scan, tensor by tensor.

    Raises
    ------
    MismatchError
        If a key, a shape or a kind of number differs between the two, or their configurations do.
    UsageError
        If a rule of the recipe matches no layer.
    """
    partners = partners_of(zero_shot, fine_tuned)
    check_configurations(zero_shot, fine_tuned)
    whole = {key: name for key, name in zero_shot.names.items() if zero_shot.spec(key).dtype.is_floating_point}
    names = {key: whole[partner] for key, partner in partners.items() if partner in whole}
    homes = layers_of(names, whole.values(), granularity, scanned, uniform=len(recipe.rules) == 1)
    alphas = alphas_of(recipe, list(dict.fromkeys(homes.values())))
    _check_size(alphas)
    homes |= dict.fromkeys((key for key in fine_tuned.keys if key not in homes), BUFFERS)
    plan = MergePlan(zero_shot, fine_tuned, recipe, granularity, partners, homes, alphas)
    _check_shared(plan)
    return plan


def _check_size(alphas: Mapping[str, float]) -> None:
    """Raise for an alpha that no float32 holds, in which tensors are mixed."""
    most = torch.finfo(torch.float32).max
    if beyond := next((layer for layer, alpha in alphas.items() if abs(alpha) > most), None):
        raise UsageError(f"the recipe gives {beyond!r} the alpha {alphas[beyond]:g}", "0 to 1, or not far beyond")


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite, without a second tensor of the size."""
    return not tensor.numel() or all(bool(end.isfinite()) for end in tensor.aminmax())


def _check_shared(plan: MergePlan) -> None:
    """Raise if one tensor under two names would get two alphas."""
    for file in plan.fine_tuned.files:
        for keys in file.shared() if isinstance(file, TorchFile) else []:
            found = {plan.alphas.get(plan.homes[key], 1.0): key for key in keys}
            if len(found) > 1:
                (a, one), (b, other) = [*found.items()][:2]
                raise MismatchError(
                    f"{one!r} and {other!r} are one tensor, but the recipe gives them alpha {a:g} and {b:g}",
                    "one rule for both their layers",
                )
