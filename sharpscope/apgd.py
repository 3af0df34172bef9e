"""Auto-PGD on weights: the highest loss in a ball, found by projected ascent that halves its own step."""

from __future__ import annotations

from dataclasses import dataclass

from sharpscope.ball import Ball
from sharpscope.objective import Objective
from sharpscope.tree import Tree, axpy, scaled, zeros

MOMENTUM = 0.75
ENOUGH = 0.75  # share of steps between two checkpoints that must raise the loss


def checkpoints(steps: int) -> list[int]:
    """Return the steps at which the step size may be halved (arXiv 2003.01690).

    >>> checkpoints(20)
    [4, 8, 11, 14, 16, 17, 18, 19]
    """
    shares, width = [0.0, 0.22], 0.22
    while shares[-1] < 1:
        width = max(width - 0.03, 0.06)
        shares.append(shares[-1] + width)
    return sorted({int(share * steps) for share in shares if 0 < int(share * steps) < steps})


@dataclass
class _Best:
    loss: float
    step: Tree
    gradient: Tree


def ascend(
    objective: Objective,
    weights: Tree,
    ball: Ball,
    here: tuple[float, Tree],
    steps: int,
    restarts: int,
    key: tuple[object, ...],
) -> float:
    """Return the highest loss found in the ball around the weights: APGD from the centre, then from random points.

    Starts with steps of 2 rho, momentum .75; never below the best single ascent step. ``here`` is loss and gradient at
    the centre. Cost: ``steps * (restarts + 1)`` gradients.
    """
    loss, gradient = here
    best = _climb(objective, weights, ball, _Best(loss, zeros(gradient), gradient), steps)
    for restart in range(restarts):
        start = ball.random(*key, restart)
        found = _climb(objective, weights, ball, _at(objective, weights, start), steps)
        best = max(best, found)
    return best


def _at(objective: Objective, weights: Tree, step: Tree) -> _Best:
    there = {name: tensor + step[name] if name in step else tensor for name, tensor in weights.items()}
    loss, gradient = objective.gradient(there, step)
    return _Best(loss, step, gradient)


def _climb(objective: Objective, weights: Tree, ball: Ball, start: _Best, steps: int) -> float:
    best = here = start
    before, size, marks = here.step, 2.0, checkpoints(steps)
    rises, mark, best_then, halved = 0, 0, best.loss, False
    for step in range(1, steps + 1):
        target = ball.project(axpy(size, ball.steepest(here.gradient), here.step))
        if step > 1:
            ahead = axpy(MOMENTUM, _minus(target, here.step), here.step)
            target = ball.project(axpy(1 - MOMENTUM, _minus(here.step, before), ahead))
        before, there = here.step, _at(objective, weights, target)
        rises += there.loss > here.loss
        here, best = there, there if there.loss > best.loss else best
        if step in marks:
            stuck = rises < ENOUGH * (step - mark) or (not halved and best.loss == best_then)
            halved = stuck
            if stuck:
                size, here, before = size / 2, best, best.step
            rises, mark, best_then = 0, step, best.loss
    return best.loss


def _minus(a: Tree, b: Tree) -> Tree:
    return axpy(1.0, a, scaled(b, -1.0))
