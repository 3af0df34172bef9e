"""The activity figure shows what is in the audit log."""

import numpy as np
import pandas as pd
import pytest

from sharpscope.errors import UsageError
from sharpscope.optim.activity import COLUMNS, SHARPNESS, Audit
from sharpscope.report.activity_figure import MOST, activity_answer, activity_figure

LAYERS = ["visual.embed", "visual.block.00", "visual.block.01"]


def audit(windows=4, active=lambda layer, window: layer * window, relative=0.1):
    rows = [
        (10 * (window + 1), name, 3, 30, 20 * (layer > 0), active(layer, window), 0.2, 1.0, relative, 1e-3, 1.0)
        for window in range(windows)
        for layer, name in enumerate(LAYERS)
    ]
    return Audit({}, pd.DataFrame(rows, columns=list(COLUMNS)), pd.DataFrame(columns=list(SHARPNESS)))


def test_the_colours_are_shares_of_tensor_steps():
    shares = np.asarray(activity_figure(audit())[0].images[0].get_array())
    expected = np.array([[layer * window / 30 for window in range(4)] for layer in range(3)])
    np.testing.assert_allclose(shares, expected)


def test_gated_windows_without_a_hold_are_hatched_and_explained():
    made = activity_figure(audit())
    hatched = {tuple(patch.get_xy()) for patch in made[0].patches if patch.get_hatch()}
    assert hatched == {(-0.5, 0.5), (-0.5, 1.5)}
    assert "no step grew" in made[0].figure.legends[0].get_texts()[0].get_text()


def test_every_layer_is_named_and_the_last_distance_shown():
    made = activity_figure(audit())
    assert [label.get_text() for label in made[0].get_yticklabels()] == LAYERS
    assert [bar.get_width() for bar in made[1].patches] == pytest.approx([10.0] * 3)


def test_anchor_zero_has_an_absolute_distance():
    made = activity_figure(audit(relative=None))
    assert "%" not in made[1].get_xlabel()
    assert [bar.get_width() for bar in made[1].patches] == [1.0] * 3


def test_a_long_log_is_joined_into_windows_without_losing_a_count():
    found = audit(windows=3 * MOST + 1, active=lambda layer, window: 3)
    shares = np.asarray(activity_figure(found)[0].images[0].get_array())
    assert shares.shape[1] <= MOST
    np.testing.assert_allclose(shares, 0.1)


def test_steps_without_a_decision_are_missing_not_zero():
    found = audit()
    found.activity["decisions"] = [0, 30, 30] * 4
    made = np.ma.masked_invalid(activity_figure(found)[0].images[0].get_array())
    assert made.mask[0].all()
    assert not made.mask[1:].any()


def test_an_empty_log_is_refused_and_the_answer_is_the_sentence():
    with pytest.raises(UsageError, match="no entry yet"):
        activity_figure(Audit({}, pd.DataFrame(columns=list(COLUMNS)), pd.DataFrame()))
    assert activity_answer(audit(active=lambda *_: 0)).startswith("The projection was inactive")


def test_the_figure_becomes_an_svg_and_draws_into_given_axes():
    from matplotlib.figure import Figure

    from sharpscope.report.drawing import svg

    axes = Figure(layout="constrained").subplots(1, 2)
    made = activity_figure(audit(), ax=axes)
    assert list(made) == list(axes)
    assert "visual.block.01" in svg(axes[0].figure)
