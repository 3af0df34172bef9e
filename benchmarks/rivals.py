"""Each tool as its user would run it layer by layer, one answer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import count
from typing import Any

import numpy as np
import torch
from task import Answer, Task, Tool, trace_answer
from torch import nn

from sharpscope.curvature.estimate import Estimate
from sharpscope.curvature.point import Point
from sharpscope.curvature.workspace import Workspace
from sharpscope.measures import MEASURES
from sharpscope.network import network
from sharpscope.objective import Batch, Objective
from sharpscope.partition import Partition
from sharpscope.table import MODEL


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self.calls = 0

    def __call__(self, *args: Any) -> Any:
        """Return what the function returns."""
        self.calls += 1
        return self._function(*args)


def sharpscope(task: Task) -> Iterator[Answer]:
    """Yield sharpscope's answers: the measures as shipped, the model's own eigenvalue as a stage of its own."""
    net = network(task.module("sdpa"), "the tower")  # sharpscope unfuses attention itself
    summed = partial(nn.functional.cross_entropy, reduction="sum")
    x, y = task.whole
    own = task.size.probe_batch
    batches = tuple(Batch(*pair) for pair in zip(x.split(own), y.split(own), strict=True))
    objective = Objective(net.forward, summed, batches)
    names, weights = tuple(net.parameters), {**net.parameters, **net.buffers}
    if task.device.startswith("cuda"):
        compiled = Point(Objective(net.forward, summed, batches[:1]), weights, names)
        compiled.product(compiled.gradient)
        compiled.block_product(names[:1], compiled.gradient)
        del compiled
        yield Answer("kernels", MODEL)  # once in a process: no cost of an alpha
    point = Point(objective, weights, names, workspace=Workspace())
    partition = Partition(task.layers)
    yield Answer("setup", MODEL)
    target = task.target
    limits = {"relative": target.relative, "absolute": target.absolute, "most": target.most}
    trace = replace(MEASURES["trace"], **limits)
    top = replace(MEASURES["lambda_max"], tolerance=target.eigenvalue)
    for measure, seed in ((trace, task.seed + task.round), (top, task.seed)):
        before = point.counts.total()
        for layer, estimate in measure(point, partition, seed):
            paid, before = point.counts.total() - before, point.counts.total()
            stage = "model" if layer == MODEL else measure.name
            yield _answer(stage, layer, estimate, paid)


def _answer(stage: str, layer: str, estimate: Estimate, products: int) -> Answer:
    history = tuple(float(sample) for sample in estimate.samples)
    return Answer(stage, layer, estimate.value, estimate.stderr, estimate.draws, products, estimate.converged, history)


@contextmanager
def only(module: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """Freeze all other parameters, and drop the gradients that PyHessian leaves behind."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in names)
    yield
    module.zero_grad()


def _pyhessian(task: Task, loader: bool) -> Iterator[Answer]:
    from pyhessian import hessian

    module = task.module()
    data: dict[str, Any] = {"dataloader": task.data} if loader else {"data": task.whole}
    for layer, names in task.layers.items():
        with only(module, names):
            tool = hessian(module, nn.CrossEntropyLoss(), cuda=task.device.startswith("cuda"), **data)
            yield Answer("setup", layer)
            torch.manual_seed(task.seed + task.round)
            yield trace_answer(layer, lambda tool=tool: tool.trace(maxIter=1)[0], task.target)
            yield _power(task, tool, layer)
            del tool


def _power(task: Task, tool: Any, layer: str) -> Answer:
    chosen = task.settings[layer]
    torch.manual_seed(task.seed)
    with counted_products() as products:
        values, _ = tool.eigenvalues(maxIter=chosen["maxIter"], tol=chosen["tol"])
    return Answer("lambda_max", layer, values[0], draws=products.calls, products=products.calls, met=chosen["met"])


@contextmanager
def counted_products() -> Iterator[Counted]:
    """Count PyHessian's products while the context lasts."""
    from pyhessian import hessian as kind  # the package exports the class under its module's name

    module = import_module("pyhessian.hessian")
    single, loaded = module.hessian_vector_product, kind.dataloader_hv_product
    counter = Counted(single)
    module.hessian_vector_product = counter

    def product(self: Any, v: Any) -> Any:
        counter.calls += 1
        return loaded(self, v)

    kind.dataloader_hv_product = product
    try:
        yield counter
    finally:
        module.hessian_vector_product, kind.dataloader_hv_product = single, loaded


def pyhessian(task: Task) -> Iterator[Answer]:
    """Yield PyHessian's answers, all images as one batch, so that it keeps the graph; other layers frozen."""
    return _pyhessian(task, loader=False)


def pyhessian_loader(task: Task) -> Iterator[Answer]:
    """Yield PyHessian's answers with the images as a loader: every product recomputes the gradient."""
    return _pyhessian(task, loader=True)


def curvlinops(task: Task) -> Iterator[Answer]:
    """Yield curvlinops's answers: an operator on the parameters of each layer, scipy for the eigenvalue."""
    from curvlinops import HessianLinearOperator, hutchinson_trace

    module = task.module()
    own = dict(module.named_parameters())
    for layer, names in task.layers.items():
        # check_deterministic (two gradients, two products a layer) is switched off in curvlinops's favour.
        operator = HessianLinearOperator(
            module, nn.CrossEntropyLoss(), [own[n] for n in names], task.data, check_deterministic=False
        )
        yield Answer("setup", layer)
        torch.manual_seed(task.seed + task.round)
        yield trace_answer(layer, lambda op=operator: float(hutchinson_trace(op, num_matvecs=1)), task.target)
        yield arpack(task, layer, operator.to_scipy(dtype=np.float32))


def arpack(task: Task, layer: str, operator: Any) -> Answer:
    """Return the largest eigenvalue that scipy finds with the settings of the layer."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    chosen = task.settings[layer]
    product = Counted(operator.matvec)
    counted = LinearOperator(operator.shape, matvec=product, dtype=operator.dtype)
    start = np.random.default_rng(task.seed).standard_normal(operator.shape[0]).astype(operator.dtype)
    values = eigsh(counted, k=1, which="LA", tol=chosen["tol"], ncv=chosen["ncv"], v0=start, return_eigenvectors=False)
    return Answer("lambda_max", layer, float(values[0]), draws=product.calls, products=product.calls)


def hessian_eigenthings(task: Task) -> Iterator[Answer]:
    """Yield hessian-eigenthings's answers: a filter per layer; batches must be equal, it averages their means."""
    from hessian_eigenthings import HessianOperator, lanczos
    from hessian_eigenthings.algorithms.trace import hutchinson
    from hessian_eigenthings.loss_fns import supervised_loss

    module, loss = task.module(), supervised_loss(nn.CrossEntropyLoss())
    for layer, names in task.layers.items():
        chosen = frozenset(names)
        operator = HessianOperator(module, task.data, loss, param_filter=lambda name, _, mine=chosen: name in mine)
        yield Answer("setup", layer)
        seeds = count(task.seed + 10**6 * task.round)
        yield trace_answer(
            layer,
            lambda op=operator, s=seeds: hutchinson(op, num_samples=1, seed=next(s)).estimate,
            task.target,
        )
        steps = task.settings[layer]["max_iter"]
        found = lanczos(operator, k=1, max_iter=steps, which="LA", seed=task.seed)
        value, residual = float(found.eigenvalues[0]), float(found.residuals[0])
        yield Answer("lambda_max", layer, value, residual, found.iterations, found.iterations)


TOOLS: dict[str, Tool] = {
    "sharpscope": sharpscope,
    "pyhessian": pyhessian,
    "pyhessian_loader": pyhessian_loader,
    "curvlinops": curvlinops,
    "hessian_eigenthings": hessian_eigenthings,
}
