"""Second derivatives of your model, checked against themselves and against other libraries."""

from __future__ import annotations

import copy
import importlib.metadata
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from sharpscope.batches import check_taken
from sharpscope.counts import whole
from sharpscope.curvature.point import Point
from sharpscope.data import as_split
from sharpscope.errors import UsageError, nearest
from sharpscope.evaluate import class_count
from sharpscope.losses import cross_entropy
from sharpscope.network import logits, network
from sharpscope.objective import Batch, Objective, check_differentiable
from sharpscope.partition import container_names, partition
from sharpscope.perturbation import moved
from sharpscope.precision import differentiable
from sharpscope.soundness import asymmetry, check_derivatives
from sharpscope.table import MODEL
from sharpscope.tree import Tree, axpy, gaussian, norm, rademacher, scaled

Data = list[tuple[Tensor, Tensor]]
Rival = Callable[[nn.Module, Sequence[str], Data, Tree], Tensor]
COLUMNS = ("against", "layer", "quantity", "difference", "limit", "agrees", "note")
_LIMITS = {torch.float32: 1e-3, torch.float64: 1e-8}
# Of the finite difference, for a direction of length 1: wide steps cross ReLUs' kinks, narrow ones are lost in float32.
_NARROW, _WIDE = 1e-5, 1e-3
_JUMP = 10.0  # times the difference of the wide step
_KINK = "grows as the step shrinks: the gradient is rounded, or jumps at these very weights (ReLUs given exact zeros)"


def _pyhessian(module: nn.Module, names: Sequence[str], data: Data, v: Tree) -> Tensor:
    from pyhessian import hessian

    tool = hessian(module, nn.CrossEntropyLoss(), dataloader=data, cuda=next(module.parameters()).is_cuda)
    _, found = tool.dataloader_hv_product([v[name] for name in names])
    return torch.cat([tensor.reshape(-1) for tensor in found])


def _curvlinops(module: nn.Module, names: Sequence[str], data: Data, v: Tree) -> Tensor:
    from curvlinops import HessianLinearOperator

    own = dict(module.named_parameters())
    chosen = [own[name] for name in names]
    operator = HessianLinearOperator(module, nn.CrossEntropyLoss(), chosen, data, check_deterministic=False)
    found: Tensor = operator @ _flat(v, names)
    return found


def _eigenthings(module: nn.Module, names: Sequence[str], data: Data, v: Tree) -> Tensor:
    from hessian_eigenthings import HessianOperator
    from hessian_eigenthings.loss_fns import supervised_loss

    chosen = frozenset(names)
    loss = supervised_loss(nn.CrossEntropyLoss())
    operator = HessianOperator(module, data, loss, param_filter=lambda name, _: name in chosen)
    found: Tensor = operator.matvec(_flat(v, names))
    return found


RIVALS: dict[str, Rival] = {
    "pyhessian": _pyhessian,
    "curvlinops-for-pytorch": _curvlinops,
    "hessian-eigenthings": _eigenthings,
}
_LAYER_NORM = "forward mode through LayerNorm is wrong in torch (pytorch#196700): the rival is off, not sharpscope"


class _Logits(nn.Module):
    """The model with its outputs reduced to logits, as every rival expects them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        return logits(self.inner(inputs))


def _flat(tree: Tree, names: Sequence[str]) -> Tensor:
    return torch.cat([tree[name].reshape(-1) for name in names])


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp_min(torch.finfo(theirs.dtype).tiny))


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _difference(point: Point, weights: Tree, v: Tree, step: float, dtype: torch.dtype) -> Tree:
    """Return the central difference of the gradient along v, computed in the type."""
    batches = tuple(Batch(_cast(x, dtype), y) for x, y in point.objective.batches)
    objective = Objective(point.objective.forward, point.objective.loss, batches)
    cast, way = ({name: _cast(tensor, dtype) for name, tensor in t.items()} for t in (weights, v))
    ahead, behind = (objective.gradient(moved(cast, scaled(way, s * step)), v)[1] for s in (1, -1))
    return scaled(axpy(-1.0, behind, ahead), 0.5 / step)


def _gap(point: Point, weights: Tree, v: Tree, dtype: torch.dtype, limit: float) -> tuple[float, str]:
    """Return how far the product along v is from the nearest finite difference, relative to it, and a note.

    The first within the limit will do. A forward that computes in float32 inside loses a narrow step, and may take no
    float64; no step makes a wrong product right.
    """
    found, gaps, note = point.product(v), list[float](), ""
    for step, of in ((_NARROW, torch.float64), (_WIDE, torch.float64), (_WIDE, dtype)):
        try:
            gaps.append(norm(axpy(-1.0, _difference(point, weights, v, step, of), found)) / norm(found))
        except RuntimeError as refusal:
            note = f"in {of}: {refusal}"
            continue
        if gaps[-1] <= limit:
            return gaps[-1], ""
    if gaps and gaps[0] > _JUMP * min(gaps):
        note = _KINK
    return min(gaps, default=math.inf), note


def _itself(point: Point, weights: Tree, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return symmetry, and a finite difference of the gradient, each along random directions."""
    v = gaussian(point.gradient, "verify", "v")
    near = max(_LIMITS[dtype], 1e-6)
    gap, note = _gap(point, weights, scaled(v, 1 / norm(v)), dtype, near)
    return [
        _row("itself", MODEL, "symmetry", asymmetry(point.product, point.gradient), _LIMITS[dtype], ""),
        _row("itself", MODEL, "finite difference", gap, near, note),
    ]


def _row(against: str, layer: str, quantity: str, gap: float, limit: float, note: str) -> dict[str, Any]:
    return dict(zip(COLUMNS, (against, layer, quantity, gap, limit, gap <= limit, note), strict=True))


def _compare(rival: str, module: nn.Module, names: Sequence[str], data: Data, v: Tree) -> Tensor:
    """Return the rival's product on a copy of the model in which only the named tensors need gradients."""
    theirs = _Logits(copy.deepcopy(module))
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(name.removeprefix("inner.") in names)
    v = {f"inner.{name}": tensor for name, tensor in v.items()}
    attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with attention, warnings.catch_warnings(), _environment_kept():
        warnings.simplefilter("ignore")  # the rivals' own: reference cycles, deprecated torch calls
        return RIVALS[rival](theirs, [f"inner.{name}" for name in names], data, v).detach()


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Take out of the environment what is put there: torch's compiler, which rivals load, names its cache in it."""
    before = set(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before:
            del os.environ[name]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@differentiable()
def verify(model: nn.Module, loader: Any, *, layer: str | None = None, limit: int = 64, seed: int = 0) -> pd.DataFrame:
    """Return how far sharpscope's Hessian products of your model are from what others, and mathematics, say.

    One row per check: symmetry and a finite difference of the gradient (``against`` "itself"), and the product with
    one random probe by PyHessian, curvlinops and hessian-eigenthings, those that are installed
    (``pip install "sharpscope[verify]"``), for the whole model and for one layer.

    Parameters
    ----------
    model
        A module in evaluation mode whose forward gives logits; it is not changed.
    loader
        Labelled data as for :func:`sharpscope.scan`.
    layer
        A layer id as :func:`sharpscope.layers` prints it; default the last.
    limit
        Examples, drawn by class; given to the rivals as one batch, since not all of them weigh unequal batches.
    seed
        Of the probe and the examples.

    Returns
    -------
    pandas.DataFrame
        Columns ``against layer quantity difference limit agrees note``; ``difference`` is relative. A rival that fails
        on the model has an infinite difference and its message as note.

    Raises
    ------
    UsageError, ModelError, DataError
        If the limit, the layer, the model or the labels cannot be meant.
    """
    net = network(model, "the model")
    names = tuple(net.parameters)
    layers = partition(names, containers=container_names(model)).layers
    chosen = layer or list(layers)[-1]
    if chosen not in layers:
        raise UsageError(f"there is no layer {chosen!r}", nearest(chosen, layers))
    split, limit, seed = as_split(loader, "data"), whole("limit", limit), whole("seed", seed, 0)
    check_taken(split.unread, model, split.name)
    batch = split.sample(limit, seed, limit)[0].to(next(iter(net.parameters.values())).device)
    weights = {**net.buffers, **net.parameters}
    objective = Objective(net.forward, cross_entropy, (Batch(*batch),))
    split.check_labels(class_count(objective, weights, batch.inputs, "the model", split.name))
    check_differentiable(objective, weights, names)
    check_derivatives(objective, net, weights, names, curved=False)  # how symmetric products are is a row
    point, dtype = Point(objective, weights, names), next(iter(net.parameters.values())).dtype
    rows = _itself(point, weights, dtype)
    for rival in (name for name in RIVALS if _version(name)):
        for place, mine in ((MODEL, names), (chosen, tuple(n for n in names if n in layers[chosen]))):
            rows.append(_against(rival, place, mine, model, point, [(batch.inputs, batch.targets)], seed, dtype))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _against(
    rival: str,
    place: str,
    names: Sequence[str],
    model: nn.Module,
    point: Point,
    data: Data,
    seed: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    probe = rademacher({name: point.gradient[name] for name in names}, seed, "verify", place)
    ours = _flat(point.block_product(names, probe), names)
    label, allowed = f"{rival} {_version(rival)}", _LIMITS[dtype]
    try:
        gap = _relative(ours, _compare(rival, model, names, data, probe))
    except Exception as failure:  # whatever a rival raises is its answer
        return _row(label, place, "product", float("inf"), allowed, f"{type(failure).__name__}: {failure}")
    normed = rival.startswith("curvlinops") and any(isinstance(m, nn.LayerNorm) for m in model.modules())
    return _row(label, place, "product", gap, allowed, _LAYER_NORM if normed and gap > allowed else "")
