"""Each figure returns its Axes and shows what was planted."""

from __future__ import annotations

import warnings
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from planted import ALPHAS, LAYERS, NOISY, OOD, SINGLE, UNCONVERGED, UNUSED, planted

from sharpscope.errors import UsageError
from sharpscope.report.curves import layer_grid, wilson
from sharpscope.report.drawing import inlined, svg
from sharpscope.report.health_figure import running, worst_cells
from sharpscope.result import ScanResult
from sharpscope.stragglers.paired import Z95

SMALL = {"alphas": (0.0, 0.1, 0.5, 1.0), "measures": ("trace", "lambda_max")}
FULL = planted()
METHODS = {"path": 2, "plane": 1, "heatmap": 2, "health": 2, "stragglers": 2}


@pytest.mark.parametrize("method", METHODS)
def test_each_figure_returns_its_axes(method: str) -> None:
    found = np.atleast_1d(getattr(FULL.plot, method)())
    assert len(found) == METHODS[method]
    assert all(isinstance(ax, Axes) for ax in found)


@pytest.mark.parametrize("method", METHODS)
def test_each_figure_draws_into_the_axes_given(method: str) -> None:
    mine = Figure().subplots(1, METHODS[method], squeeze=False)[0]
    found = getattr(FULL.plot, method)(ax=mine if METHODS[method] > 1 else mine[0])
    assert list(np.atleast_1d(found)) == list(mine)
    assert all(ax.has_data() for ax in mine)


@pytest.mark.parametrize("method", METHODS)
def test_a_figure_shows_itself_in_a_notebook(method: str) -> None:
    assert getattr(FULL.plot, method)()._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", [{}, {"failure": True}, {"converged": False}])
def test_panels_keep_their_room_beside_labels_and_legends(method: str, how: dict[str, bool]) -> None:
    found = np.atleast_1d(getattr(planted(**how).plot, method)())
    found[0].figure.draw_without_rendering()
    assert all(ax.get_position().width > 0.2 and ax.get_position().height > 0.2 for ax in found)


def test_drawing_leaves_the_rc_settings_of_the_caller_alone() -> None:
    before = dict(mpl.rcParams)
    svg(FULL.plot.path()[0].figure)
    assert dict(mpl.rcParams) == before


def test_the_wrong_number_of_axes_is_refused() -> None:
    with pytest.raises(UsageError, match="has 2 panels, but ax holds 3"):
        FULL.plot.path(ax=Figure().subplots(3))


def test_an_unknown_measure_names_those_there_are() -> None:
    with pytest.raises(UsageError, match="'tracy' is not in this scan, which holds: trace, lambda_max"):
        FULL.plot.heatmap("tracy")


@pytest.mark.parametrize(("method", "match"), [("plane", "needs an OOD set"), ("stragglers", "no OOD error")])
def test_figures_of_robustness_need_an_ood_set(method: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        getattr(planted(ood=()).plot, method)()


def test_the_path_shows_every_split_and_names_both_ends() -> None:
    upper, lower = FULL.plot.path()
    drawn = {line.get_label(): line for line in upper.lines}
    assert {"id", *OOD, "mean OOD", "recommended: 0.4"} <= drawn.keys()
    assert drawn["id"].get_linewidth() > 1.5 * drawn["scans"].get_linewidth()
    assert drawn["scans"].get_ydata()[4] == FULL.correct[0.4, "scans"].mean()
    assert [tick.get_text() for tick in lower.get_xticklabels()][:: len(ALPHAS) - 1] == [
        "0\nzero-shot",
        "1\nfine-tuned",
    ]
    assert lower.get_yscale() == "log"


def test_the_heatmap_marks_what_was_planted() -> None:
    grid = layer_grid(FULL, "trace")
    assert grid.layers == (*LAYERS, UNUSED)
    missing = {(grid.layers[row], grid.alphas[column]) for row, column in np.argwhere(~grid.measured)}
    assert missing == {("visual.embed", 0.5), *((UNUSED, alpha) for alpha in ALPHAS)}
    unsure = {(grid.layers[row], grid.alphas[column]) for row, column in np.argwhere(grid.unsure)}
    assert unsure == {(SINGLE, 0.0), *((NOISY, alpha) for alpha in ALPHAS)}


def test_the_heatmap_draws_a_minus_for_each_value_without_logarithm() -> None:
    first, _ = FULL.plot.heatmap()
    (minus,) = (line for line in first.lines if line.get_marker() == "_")
    row = LAYERS.index(NOISY)
    negative = [i for i, alpha in enumerate(ALPHAS) if np.cos(3 * alpha) < 0]  # the planted sign
    assert list(zip(minus.get_xdata(), minus.get_ydata(), strict=True)) == [(i, row) for i in negative]


def test_the_eigenvalue_heatmap_hatches_the_layer_that_did_not_converge() -> None:
    grid = layer_grid(FULL, "lambda_max")
    assert {grid.layers[row] for row, _ in np.argwhere(grid.unsure)} == {UNCONVERGED}


def test_health_names_the_worst_layers() -> None:
    assert [layer for layer, _, _ in worst_cells(layer_grid(FULL, "trace"))[:2]] == [SINGLE, NOISY]
    left, _ = FULL.plot.health()
    labels = left.get_legend_handles_labels()[1]
    assert any(label.startswith(f"{SINGLE} at alpha 0: relative error unknown") for label in labels)
    assert any(label.startswith(NOISY) for label in labels)


def test_the_running_estimate_is_mean_and_standard_error_of_the_draws_so_far() -> None:
    samples = np.random.default_rng(0).normal(3, 2, 12)
    estimate, stderr = running(samples, ritz=False)
    assert estimate == pytest.approx([samples[: i + 1].mean() for i in range(12)])
    assert np.isnan(stderr[0])
    assert stderr[1:] == pytest.approx([samples[:i].std(ddof=1) / np.sqrt(i) for i in range(2, 13)])


def test_wilson_keeps_a_width_where_nothing_was_right() -> None:
    low, high = wilson(np.array([0.0]), np.array([10.0]))
    assert low[0] == 0
    assert high[0] == pytest.approx(Z95**2 / (10 + Z95**2))


def test_a_dollar_in_a_name_is_no_formula() -> None:
    result = planted(**SMALL)
    renamed = _with_layer(result, "visual.embed", "a$b$c_{d")
    assert "a$b$c_{d" in svg(renamed.plot.heatmap()[0].figure)
    assert "a$b$c_{d" in svg(renamed.plot.health()[0].figure)


def test_letters_that_the_drawing_font_lacks_reach_the_browser() -> None:
    renamed = _with_layer(planted(**SMALL), "visual.embed", "視覚")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "視覚" in svg(renamed.plot.heatmap()[0].figure)


def _with_layer(result: ScanResult, old: str, new: str) -> ScanResult:
    meta = {**result.meta, "layers": {new if k == old else k: v for k, v in result.meta["layers"].items()}}
    cells = [
        replace(
            cell,
            rows=tuple(replace(row, layer=new) if row.layer == old else row for row in cell.rows),
            arrays={new if k == old else k: v for k, v in cell.arrays.items()},
        )
        for cell in result.cells
    ]
    return ScanResult(cells, meta)


def test_inlined_drawings_prefix_ids_in_tags_and_leave_text_alone() -> None:
    document = (
        '<svg viewBox="0 0 1 1"><g id="a"><use xlink:href="#a" clip-path="url(#a)"/><text>id="a"</text></g></svg>'
    )
    document = document.replace("<text>", '<text id="unused">')
    body = inlined(document, "f1", 'say "hi"')
    assert '<g id="f1-a"><use href="#f1-a" clip-path="url(#f1-a)"/><text>id="a"</text>' in body
    assert 'aria-label="say &quot;hi&quot;"' in body
