"""The smallest setting of each rival that meets the eigenvalue's target, layer by layer, found with the truth at hand.

No user can do this: it takes the reference. It is given to the rivals so that nobody can say they were run wastefully.
The search uses each tool's own algorithm, start vector and seed on an exact product, so that the timed run repeats it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from rivals import Counted, only
from task import Flat, Task
from torch import nn

Found = dict[str, Any]
TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)  # of PyHessian; 1e-3 is its default
STEPS = 50  # of Lanczos: hessian-eigenthings reorthogonalises up to here
ITERATIONS = 300  # of power iteration


class _EnoughError(Exception):
    """Ends a power iteration whose every tolerance is decided."""


def pyhessian(task: Task, module: nn.Module, names: tuple[str, ...], truth: float) -> Found:
    """Return the loosest tolerance whose answer is right, and what the default tolerance gives."""
    from pyhessian import hessian

    history = list[float]()
    with only(module, names):
        tool = hessian(module, nn.CrossEntropyLoss(), data=task.whole, cuda=task.device.startswith("cuda"))
        torch.manual_seed(task.seed)
        with _recorded(history, truth, task.target.eigenvalue):
            tool.eigenvalues(maxIter=ITERATIONS, tol=0)
        del tool
    default = _stopped(history[:100], 1e-3)
    for tolerance in TOLERANCES:
        value, products = _stopped(history, tolerance)
        if abs(value - truth) <= task.target.eigenvalue * abs(truth):
            return {"tol": tolerance, "maxIter": ITERATIONS, "met": True, "default": default, "steps": products}
    return {"tol": 1e-3, "maxIter": 100, "met": False, "default": default, "steps": default[1]}


@contextmanager
def _recorded(history: list[float], truth: float, tolerance: float) -> Iterator[None]:
    """Record the Rayleigh quotients of a power iteration; end it when it is right and still."""
    from importlib import import_module

    module = import_module("pyhessian.hessian")
    product: Callable[..., Any] = module.hessian_vector_product

    def recorded(gradient: Any, parameters: Any, v: Any) -> Any:
        image = product(gradient, parameters, v)
        history.append(float(sum((a * b).sum() for a, b in zip(image, v, strict=True))))
        still = len(history) > 1 and abs(history[-1] - history[-2]) < TOLERANCES[-1] * abs(history[-1])
        if still and abs(history[-1] - truth) <= tolerance * abs(truth):
            raise _EnoughError
        return image

    module.hessian_vector_product = recorded
    try:
        yield
    except _EnoughError:
        pass
    finally:
        module.hessian_vector_product = product


def _stopped(history: list[float], tolerance: float) -> tuple[float, int]:
    """Return value and products of PyHessian's rule: the earlier of two successive values that agree."""
    for index, (before, after) in enumerate(pairwise(history)):
        if abs(before - after) / (abs(before) + 1e-6) < tolerance:
            return before, index + 2
    return history[-1], len(history)


def hessian_eigenthings(task: Task, module: nn.Module, names: tuple[str, ...], truth: float) -> Found:
    """Return the fewest Lanczos steps whose answer is right, and what the default of two steps gives."""
    from hessian_eigenthings.algorithms.lanczos import lanczos, lanczos_tridiagonal
    from hessian_eigenthings.operators.base import LambdaOperator

    block = Flat(module, names, task.data, keep=True)
    operator = LambdaOperator(block, block.size, task.device)
    by_default = lanczos(operator, k=1, seed=task.seed)
    default = (float(by_default.eigenvalues[0]), by_default.iterations)
    generator = torch.Generator().manual_seed(task.seed)
    start = torch.randn(block.size, generator=generator).to(task.device)
    # The first steps of a longer run are the shorter run, so a prefix of the tridiagonal matrix tells its answer.
    run = lanczos_tridiagonal(operator, start, 16)
    for most in (16, STEPS):
        run = run if most == 16 else lanczos_tridiagonal(operator, start, most)
        for steps in range(1, run.iterations + 1):
            beside = run.betas[: steps - 1].double()
            matrix = torch.diag(run.alphas[:steps].double()) + torch.diag(beside, 1) + torch.diag(beside, -1)
            value = float(torch.linalg.eigvalsh(matrix)[-1])
            if abs(value - truth) <= task.target.eigenvalue * abs(truth):
                return {"max_iter": steps, "met": True, "default": default}
    return {"max_iter": STEPS, "met": False, "default": default}


def curvlinops(task: Task, module: nn.Module, names: tuple[str, ...], truth: float) -> Found:
    """Return the smallest Krylov dimension for scipy whose answer is right, and products of scipy's default."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    block = Flat(module, names, task.data, keep=True)
    start = np.random.default_rng(task.seed).standard_normal(block.size).astype(np.float32)

    def run(**chosen: Any) -> tuple[float, int]:
        product = Counted(block.numpy)
        operator = LinearOperator((block.size, block.size), matvec=product, dtype=np.float32)
        value = eigsh(operator, k=1, v0=start, return_eigenvectors=False, **chosen)[0]
        return float(value), product.calls

    default = run(which="LM")
    for width in (3, 4, 5, 6, 8, 10, 12, 15, 20, 30):
        value, products = run(which="LA", tol=0.5, ncv=min(width, block.size))  # loose: one factorisation, no restart
        if abs(value - truth) <= task.target.eigenvalue * abs(truth):
            return {"tol": 0.5, "ncv": width, "met": True, "default": default, "steps": products}
    return {"tol": 0.01, "ncv": 20, "met": False, "default": default}


SEARCHES: dict[str, Callable[[Task, nn.Module, tuple[str, ...], float], Found]] = {
    "pyhessian": pyhessian,
    "curvlinops": curvlinops,
    "hessian_eigenthings": hessian_eigenthings,
}


def search(task: Task, tool: str, truth: dict[str, Any]) -> dict[str, Found]:
    """Return the setting of every layer for a tool; none for sharpscope, which stops by itself."""
    if tool not in SEARCHES:
        return {}
    module = task.module()  # one for all layers: making one takes longer than a search
    return {
        layer: SEARCHES[tool](task, module, names, truth[layer]["lambda_max"]) for layer, names in task.layers.items()
    }
