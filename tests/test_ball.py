"""Random points of the ball are uniform, projection is idempotent and stays inside."""

import math

import numpy as np
import pytest
import torch

from sharpscope.apgd import checkpoints
from sharpscope.ball import Ball, check
from sharpscope.errors import UsageError

SCALES = {"x": torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)}


@pytest.mark.parametrize("p", ["2", "inf"])
def test_random_points_fill_the_ball_evenly(p):
    ball = Ball(0.7, p, SCALES)
    points = np.stack([(ball.random(0, k)["x"] / SCALES["x"]).numpy() for k in range(2000)])
    radii = np.linalg.norm(points, ord=float(p), axis=1) / 0.7
    assert radii.max() <= 1 + 1e-12
    # The share of points within radius r of a ball in three dimensions is r^3.
    for r in (0.5, 0.8):
        assert abs((radii < r).mean() - r**3) < 4 * math.sqrt(r**3 * (1 - r**3) / 2000)
    assert np.abs(points.mean(0)).max() < 4 * points.std() / math.sqrt(2000)


@pytest.mark.parametrize("p", ["2", "inf"])
def test_projection_stays_inside_and_leaves_inner_points_alone(p):
    ball = Ball(0.7, p, SCALES)
    outside = ball.project({"x": 5 * SCALES["x"]})
    assert np.linalg.norm((outside["x"] / SCALES["x"]).numpy(), float(p)) == pytest.approx(0.7)
    inside = ball.random(3)
    assert torch.allclose(ball.project(inside)["x"], inside["x"])


def test_checkpoints_are_those_of_the_paper():
    """AutoAttack (arXiv 2003.01690): shares 0, .22, then steps that shrink by .03 down to .06."""
    shares = [0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    assert checkpoints(100) == [math.floor(100 * s + 1e-9) for s in shares[1:-1] if s < 1]


@pytest.mark.parametrize(("rho", "p"), [(0.0, "2"), (float("nan"), "2"), (1.0, "1")])
def test_a_radius_or_norm_without_meaning_is_refused(rho, p):
    with pytest.raises(UsageError, match="cannot be meant"):
        check(rho, p)
