"""Eigenvalues against dense ones, residuals as true bounds, and start vectors that must not mislead."""

import numpy as np
import pytest
import torch
from nets import block, dense_hessian, made, objective

from sharpscope import tree
from sharpscope.curvature.lanczos import Eigenvalue, Krylov, largest
from sharpscope.curvature.point import Point
from sharpscope.objective import Batch, Objective
from sharpscope.partition import container_names, partition
from sharpscope.table import MODEL


def matrix_product(matrix):
    return lambda v: {"x": matrix @ v["x"]}


def symmetric(eigenvalues, seed=0):
    random = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64, generator=random))
    return q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T, q


@pytest.mark.parametrize("kind", ["mlp", "conv", "vit"])
def test_every_layers_eigenvalue_is_the_dense_one(kind):
    net = made(kind)
    fn, weights, names = objective(net)
    layers = partition(names, containers=container_names(net))
    hessian, places = dense_hessian(net)
    measure = Eigenvalue(tolerance=1e-9, most=200)
    for layer, found in measure(Point(fn, weights, names), layers, seed=0):
        mine = hessian if layer == MODEL else block(hessian, places, layers.layers[layer])
        top = float(torch.linalg.eigvalsh(mine)[-1])
        assert found.value == pytest.approx(top, rel=1e-8, abs=1e-10), layer
        assert found.converged, layer


def test_an_eigenvalue_lies_within_the_residual():
    matrix, _ = symmetric(np.linspace(-1, 3, 40))
    for tolerance in (0.3, 0.1, 0.01):
        start = {"x": torch.ones(40, dtype=torch.float64)}
        (ritz,) = largest(matrix_product(matrix), start, tolerance=tolerance, most=40)
        assert np.abs(np.linspace(-1, 3, 40) - ritz.value).min() <= ritz.residual * (1 + 1e-9) + 1e-12
        image = matrix @ ritz.vector["x"]
        assert float((image - ritz.value * ritz.vector["x"]).norm()) == pytest.approx(
            ritz.residual, rel=1e-6, abs=1e-12
        )
        assert ritz.residual <= tolerance * ritz.value


def test_the_largest_signed_eigenvalue_is_found_when_the_smallest_is_as_large():
    """PyHessian returns .398 where the truth is 1.260 and -1.259."""
    matrix, _ = symmetric([1.260, -1.259, *np.linspace(-0.4, 0.4, 30)])
    (ritz,) = largest(matrix_product(matrix), {"x": torch.ones(32, dtype=torch.float64)}, tolerance=1e-6, most=32)
    assert ritz.value == pytest.approx(1.260, abs=1e-6)


def test_reorthogonalisation_keeps_long_runs_free_of_ghosts():
    """200 steps on a spectrum with one far outlier: without reorthogonalisation the basis collapses onto it."""
    matrix, _ = symmetric([1000.0, *np.linspace(0, 1, 219)])
    seen = []

    def product(v):
        seen.append(v["x"])
        return {"x": matrix @ v["x"]}

    largest(product, {"x": torch.ones(220, dtype=torch.float64)}, tolerance=0.0, most=200)
    basis = torch.stack(seen)
    assert (basis @ basis.T - torch.eye(len(basis), dtype=torch.float64)).abs().max() < 1e-10


def test_float32_keeps_its_basis_and_its_value():
    """A million entries, so that inner products round: 40 steps, of which the first pair converges in a few."""
    diagonal = torch.linspace(0, 1, 1_000_000, dtype=torch.float64)
    diagonal[7] = 100.0
    krylovs = [Krylov({"x": torch.ones(1_000_000, dtype=dtype)}) for dtype in (torch.float32, torch.float64)]
    for krylov in krylovs:
        for _ in range(40):
            krylov.add({"x": diagonal.to(krylov.next["x"].dtype) * krylov.next["x"]})
    basis = torch.stack(krylovs[0]._basis).double()
    assert (basis @ basis.T - torch.eye(40, dtype=torch.float64)).abs().max() < 1e-6
    assert krylovs[0].values[-1] == pytest.approx(krylovs[1].values[-1], rel=1e-6)


def test_an_exhausted_krylov_space_ends_the_run_with_the_exact_value():
    matrix, q = symmetric([5.0, 2.0, 1.0, 0.5])
    (ritz,) = largest(matrix_product(matrix), {"x": q[:, 0] + q[:, 1]}, tolerance=0.0, most=4)
    assert (ritz.value, len(ritz.history)) == (pytest.approx(5.0), 2)


def test_a_block_without_curvature_is_zero_and_converged():
    flat = Krylov({"x": torch.ones(5)})
    flat.add({"x": torch.zeros(5)})
    assert flat.done(0.01, 5)
    found = Eigenvalue()._estimate(flat)
    assert (found.value, found.stderr, found.converged) == (0.0, 0.0, True)


def test_too_few_steps_are_said_to_be_unconverged():
    net = made("vit")
    fn, weights, names = objective(net)
    layers = partition(names, containers=container_names(net))
    found = dict(Eigenvalue(tolerance=1e-6, most=3)(Point(fn, weights, names), layers, seed=0))
    assert not found[MODEL].converged
    assert found[MODEL].stderr > 0
    assert found[MODEL].draws == 3


def test_neighbours_eigenvectors_save_steps_and_change_no_value():
    net = made("vit")
    fn, weights, names = objective(net)
    layers = partition(names, containers=container_names(net))
    cold = Point(fn, weights, names)
    first = dict(Eigenvalue(tolerance=1e-3)(cold, layers, seed=0))
    near = {n: w + 1e-3 * torch.randn_like(w) if n in names else w for n, w in weights.items()}
    warm = dict(Eigenvalue(tolerance=1e-3)(Point(fn, near, names, memory=cold.found), layers, seed=0))
    anew = dict(Eigenvalue(tolerance=1e-3)(Point(fn, near, names), layers, seed=0))
    assert sum(e.draws for e in warm.values()) < sum(e.draws for e in anew.values())
    for layer, estimate in warm.items():
        assert estimate.value == pytest.approx(anew[layer].value, rel=2e-3), layer
    assert first.keys() == warm.keys()


def test_a_start_at_the_second_eigenvector_still_finds_the_first():
    """Along a path the order of eigenvectors can swap: the noise in the start vector is there for this case."""
    matrix, q = symmetric([1.0, 0.9, *np.linspace(0, 0.2, 38)])
    start = Eigenvalue()._start({"x": q[:, 1].clone()}, (0, "lambda_max", "x"))
    (ritz,) = largest(matrix_product(matrix), start, tolerance=0.01, most=40)
    assert ritz.value == pytest.approx(1.0, rel=0.01)
    assert tree.norm(ritz.vector) == pytest.approx(1.0)


def quadratic(matrix, memory=None, at=None):
    """The point of ``w' A w / 2``, whose Hessian is A and whose gradient is A w."""
    fn = Objective(
        lambda w, x: (w["x"] @ matrix @ w["x"] / 2).expand(len(x)),
        lambda z, t: z.sum(),
        (Batch(torch.ones(1), torch.zeros(1)),),
    )
    return Point(fn, {"x": torch.ones(len(matrix), dtype=torch.float64) if at is None else at}, ["x"], memory=memory)


@pytest.mark.parametrize("seed", range(3))
def test_a_gradient_along_the_second_eigenvector_does_not_hide_the_first(seed):
    """After three steps the answer is .85, with a residual below a hundredth of it; the fourth shows that it is not."""
    matrix, q = symmetric([1.0, 0.85, *np.linspace(0, 0.1, 898)])
    found = dict(Eigenvalue()(quadratic(matrix, at=q[:, 1].clone()), partition(["x"]), seed=seed))["x"]
    assert found.samples[2] == pytest.approx(0.85, rel=1e-3)
    assert found.value == pytest.approx(1.0, rel=0.01)


def test_an_eigenvector_that_takes_the_lead_between_two_alphas_is_seen():
    """1 and .9 become .9 and 1: started at the old leader alone, Lanczos is content with .9."""
    bulk = np.linspace(0, 0.2, 898)
    before, q = symmetric([1.0, 0.9, *bulk])
    after = q @ torch.diag(torch.tensor([0.9, 1.0, *bulk], dtype=torch.float64)) @ q.T
    layers, old = partition(["x"]), quadratic(before)
    assert dict(Eigenvalue()(old, layers, seed=0))["x"].value == pytest.approx(1.0, rel=0.01)
    found = dict(Eigenvalue()(quadratic(after, old.found), layers, seed=0))["x"]
    assert found.value == pytest.approx(1.0, rel=0.01)
    assert found.draws <= 5
