"""Each figure returns its Axes and shows what was planted."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from planted import (
    ALPHAS,
    GAIN,
    LAYERS,
    NOISY,
    OOD,
    SCALE,
    SINGLE,
    STRAGGLER,
    UNCONVERGED,
    UNUSED,
    planted,
    true_accuracy,
    true_sharpness,
)
from scipy.stats import kendalltau
from scipy.stats import t as student

from sharpscope.errors import UsageError
from sharpscope.report.agreement_figure import agreement
from sharpscope.report.canvas import SERIES
from sharpscope.report.curves import layer_grid
from sharpscope.report.distance_figure import ways
from sharpscope.report.drawing import inlined, svg
from sharpscope.report.health_figure import running, worst_cells
from sharpscope.report.words import layer_label
from sharpscope.result import ScanResult
from sharpscope.stragglers.interval import wilson
from sharpscope.stragglers.paired import Z95
from sharpscope.table import Cell

SMALL = {"alphas": (0.0, 0.1, 0.5, 1.0), "measures": ("trace", "lambda_max")}
LONG = "model.backbone.stages.7.a_very_long_name_of_a_module.collection_of_blocks.7.attention_output_projection"
LAYER_ORDER = (*LAYERS, UNUSED)
SMALLER = {"measures": ("trace", "lambda_max")}
FULL = planted()
STUDIED = planted(studied=True)
METHODS = {
    "path": 2, "plane": 1, "heatmap": 2, "health": 2, "forest": 2, "multiples": 8, "interventions": 2, "recipe": 1,
    "pareto": 1, "distance": 1, "agreement": 1,
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_each_figure_returns_its_axes(method: str) -> None:
    found = np.atleast_1d(getattr(STUDIED.plot, method)())
    assert len(found) == METHODS[method]
    assert all(isinstance(ax, Axes) for ax in found)


@pytest.mark.parametrize("method", METHODS)
def test_each_figure_draws_into_the_axes_given(method: str) -> None:
    mine = Figure().subplots(1, METHODS[method], squeeze=False)[0]
    found = getattr(STUDIED.plot, method)(ax=mine if METHODS[method] > 1 else mine[0])
    assert list(np.atleast_1d(found)) == list(mine)
    assert all(ax.has_data() for ax in mine)


@pytest.mark.parametrize("method", METHODS)
def test_a_figure_shows_itself_in_a_notebook(method: str) -> None:
    assert getattr(STUDIED.plot, method)()._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", [{}, {"failure": True, "converged": False}])
def test_panels_keep_their_room_beside_labels_and_legends(method: str, how: dict[str, bool]) -> None:
    found = np.atleast_1d(getattr(planted(**SMALLER, **how, studied=True).plot, method)())
    found[0].figure.draw_without_rendering()
    least = 0.14 if method == "multiples" else 0.2
    assert all(ax.get_position().width > least and ax.get_position().height > 0.2 for ax in found)


def test_drawing_leaves_the_rc_settings_of_the_caller_alone() -> None:
    before = dict(mpl.rcParams)
    svg(FULL.plot.path()[0].figure)
    assert dict(mpl.rcParams) == before


def test_the_wrong_number_of_axes_is_refused() -> None:
    with pytest.raises(UsageError, match="has 2 panels, but ax holds 3"):
        FULL.plot.path(ax=Figure().subplots(3))
    with pytest.raises(UsageError, match=r"has one panel, but ax is a ndarray\n  fix: one Axes"):
        FULL.plot.plane(ax=Figure().subplots(2))


def test_an_unknown_measure_names_those_there_are() -> None:
    with pytest.raises(UsageError, match="'tracy' is not in this scan, which holds: trace, lambda_max"):
        FULL.plot.heatmap("tracy")


@pytest.mark.parametrize(
    ("method", "match"),
    [
        ("plane", "needs an OOD set"),
        ("forest", "no OOD error"),
        ("multiples", "no OOD error"),
        ("pareto", "an OOD set"),
    ],
)
def test_figures_of_robustness_need_an_ood_set(method: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        getattr(planted(ood=()).plot, method)()


@pytest.mark.parametrize(
    ("method", "match"), [("interventions", "were not run in this scan"), ("recipe", "no recipes with an alpha per")]
)
def test_what_was_not_run_is_asked_for_by_its_flag(method: str, match: str) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        getattr(FULL.plot, method)()
    assert f"--{'recipes' if method == 'recipe' else method}" in caught.value.fix


def test_the_forest_shows_chance_whiskers_and_p_of_every_row() -> None:
    first, _ = FULL.plot.forest()
    table = FULL.stragglers
    tested = table[np.isfinite(table["null_low"])]
    bars = sorted(
        (bar.get_x(), bar.get_x() + bar.get_width()) for bar in first.patches if round(bar.get_height(), 6) == 0.1
    )
    np.testing.assert_allclose(bars, sorted(zip(tested["null_low"], tested["null_high"], strict=True)))
    whiskers = sorted(tuple(part[:, 0]) for lines in first.collections for part in lines.get_segments())
    np.testing.assert_allclose(whiskers, sorted(zip(tested["tau_low"], tested["tau_high"], strict=True)))
    filled = [line.get_xdata()[0] for line in first.lines if line.get_mfc() in SERIES and len(line.get_xdata()) == 1]
    assert sorted(filled) == sorted(table.loc[table["layer"] == STRAGGLER, "tau"])
    assert len([text for text in first.texts if text.get_text()]) == len(tested)


def test_the_curves_stand_above_the_error_and_its_surrogates() -> None:
    made = FULL.plot.multiples()
    top, below = made[0], made[len(made) // 2]
    assert top.get_title("left").startswith(STRAGGLER)
    assert [len(line.get_xdata()) for line in top.lines] == [len(ALPHAS)]
    error = 100 * np.array([1 - np.mean([true_accuracy(alpha, name) for name in OOD]) for alpha in ALPHAS])
    *chance, drawn = (line.get_ydata() for line in below.lines)
    np.testing.assert_allclose(drawn, error, atol=0.1)  # 500 images a set
    assert len(chance) == 20
    assert all(sorted(curve) == sorted(drawn) for curve in chance)  # the error's own values, in another order


def test_interventions_show_the_planted_gain_of_the_straggler_alone() -> None:
    for panel, sign in zip(STUDIED.plot.interventions(), (1, -1), strict=True):
        filled = [line for line in panel.lines if line.get_marker() == "o" and line.get_mfc() == line.get_color()]
        assert [tuple(line.get_xdata()) for line in filled] == [pytest.approx((sign * 100 * GAIN,))]
        assert round(filled[0].get_ydata()[0] + 0.18) == LAYERS.index(STRAGGLER)
    assert [ax.get_title("left").split(":")[0] for ax in STUDIED.plot.interventions()] == ["Necessary", "Sufficient"]


def test_the_recipe_figure_shows_the_planted_recipe() -> None:
    made = STUDIED.plot.recipe()
    dots = {LAYER_ORDER[int(line.get_ydata()[0])]: line for line in made.lines if line.get_marker() == "o"}
    alphas = {layer: line.get_xdata()[0] for layer, line in dots.items()}
    assert alphas == {layer: 0.1 if layer == STRAGGLER else 0.4 for layer in LAYER_ORDER}
    assert [layer for layer, line in dots.items() if line.get_mfc() == line.get_color()] == [STRAGGLER]


def test_pareto_rings_what_was_chosen_and_counts_what_was_tried() -> None:
    labels = STUDIED.plot.pareto().get_legend_handles_labels()[1]
    assert {"uniform alpha (11)", "per-layer (1)", "LiNeS (1)"} <= set(labels)
    assert "best uniform alpha: alpha 0.4" in labels
    assert "recipe chosen: straggler at 0.1" in labels


@pytest.mark.parametrize(
    "alphas",
    [
        (0.0, 0.001, 0.002, 0.5, 0.99, 1.0),
        (0.5,),
        (0.0, 1.0),
        *(np.linspace(0, 1, n).tolist() for n in (9, 11, 12, 41)),
    ],
)
@pytest.mark.parametrize("method", ["path", "heatmap"])
@pytest.mark.parametrize("name", ["visual.block.00", LONG])
def test_labels_of_alphas_do_not_stand_on_each_other(method: str, alphas: tuple[float, ...], name: str) -> None:
    few = planted([round(alpha, 12) for alpha in alphas], measures=("trace",), n=20, unmeasured=())
    panel = getattr(_with_layer(few, "visual.block.00", name).plot, method)()[-1]
    panel.figure.draw_without_rendering()
    numbers = [text.get_text().split("\n")[0] for text in panel.get_xticklabels()]  # a word below is in nobody's way
    digit = 0.64 * 8.5 * panel.figure.dpi / 72  # pixels
    middles = [(box.x0 + box.x1) / 2 for box in (text.get_window_extent() for text in panel.get_xticklabels())]
    assert all(
        right - left > digit * (len(one) + len(other)) / 2
        for (left, one), (right, other) in pairwise(zip(middles, numbers, strict=True))
    )
    assert [number for number in numbers if number in "01"] == [f"{end:g}" for end in (0, 1) if end in alphas]
    assert len(numbers) >= min(len(alphas), 3)


@pytest.mark.parametrize(
    ("alphas", "ends"), [((0.0, 0.5, 1.0), (0.0, 1.0)), ((-0.5, 0.0, 0.5, 1.0, 1.5), (0.0, 1.0)), ((0.25, 0.5), ())]
)
def test_only_the_two_models_are_marked_as_ends_in_the_plane(
    alphas: tuple[float, ...], ends: tuple[float, ...]
) -> None:
    result = planted(alphas, ood=("scans",), measures=("trace",), unmeasured=())
    marks = [line for line in result.plot.plane().lines if line.get_markersize() == 9]
    right = result.correct
    assert [(float(x), float(y)) for line in marks for x, y in zip(*line.get_data(), strict=True)] == [
        (right[alpha, "id"].mean(), right[alpha, "scans"].mean()) for alpha in ends
    ]


def test_panels_of_layers_with_long_names_have_titles_that_differ() -> None:
    names = [LONG.replace("7", str(i)) for i in range(4)]
    result = planted(measures=("trace",))
    for i, name in enumerate(names):
        result = _with_layer(result, f"visual.block.{i:02d}", name)
    titles = [panel.get_title("left") for panel in result.plot.multiples()[:4]]
    assert len(set(titles)) == 4
    assert len({layer_label(f"encoder.layers.1.mlp.fc{i}.weight", 18) for i in (1, 2)}) == 2


def test_nothing_is_written_over_the_data_of_pareto() -> None:
    drawn = FULL.plot.pareto()
    assert [text.get_text() for text in drawn.texts if text.get_text()] == []
    assert "no recipes were tried" in drawn.get_legend().get_title().get_text()
    assert "no recipes" not in STUDIED.plot.pareto().get_legend().get_title().get_text()


def test_names_of_layers_that_lie_close_do_not_stand_on_each_other() -> None:
    layers = {
        name: {**facts, "delta_norm": 1.0 + i / 50} for i, (name, facts) in enumerate(FULL.meta["layers"].items())
    }
    drawn = ScanResult(FULL.cells, {**FULL.meta, "layers": layers}).plot.distance()
    drawn.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in drawn.texts if text.get_text()]
    assert len(boxes) >= 6
    assert not any(box.count_overlaps(boxes[:i]) for i, box in enumerate(boxes))


def test_of_names_that_find_no_place_none_is_written_over_another() -> None:
    # Ten layers in one place: there is room for the names of some.
    names = {name: f"encoder.layers.{i}.self_attn.q_proj" for i, name in enumerate(LAYERS)}
    result = planted(measures=("trace",))
    for old, new in names.items():
        result = _with_layer(result, old, new)
    layers = {name: {**facts, "delta_norm": 1.0, "size": 1000} for name, facts in result.meta["layers"].items()}
    cells = [
        replace(cell, rows=tuple(replace(row, value=5.0) if row.measure == "trace" else row for row in cell.rows))
        for cell in result.cells
    ]
    drawn = ScanResult(cells, {**result.meta, "layers": layers}).plot.distance()
    drawn.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in drawn.texts if text.get_text()]
    assert 1 <= len(boxes) < len(LAYERS)
    assert not any(box.count_overlaps(boxes[:i]) for i, box in enumerate(boxes))


def test_many_sets_leave_the_accuracy_its_height() -> None:
    few = FULL.plot.path()[0]
    names = [f"set {i}" for i in range(14)]
    facts = {name: {**FULL.meta["splits"]["scans"]} for name in names}
    cells = [
        Cell(
            cell.key.replace("|scans|", f"|{name}|"), tuple(replace(row, split=name) for row in cell.rows), cell.arrays
        )
        for cell in FULL.cells
        for name in (names if "|scans|" in cell.key else ["id"] if "|id|" in cell.key else [])
    ]
    many = ScanResult(cells, {**FULL.meta, "splits": {"id": FULL.meta["splits"]["id"], **facts}}).plot.path()[0]
    for panel in (few, many):
        panel.figure.draw_without_rendering()
    assert many.get_position().height > 0.9 * few.get_position().height
    told = [text.get_text() for text in many.figure.legends[0].get_texts()]
    assert told == ["id", *names, "mean OOD", *(name for name in told if name.startswith("recommended"))]


def test_distance_and_mean_curvature_are_the_planted_ones() -> None:
    found = ways(planted(**SMALLER))
    facts = FULL.meta["layers"]
    error = 1 - np.mean([true_accuracy(0.4, name) for name in OOD])
    assert (found.alpha, found.along) == (0.4, False)
    for i, layer in enumerate(found.layers):
        curvature = SCALE["trace"] * true_sharpness(0.4, layer, error) / facts[layer]["size"]
        assert found.distance[i] == facts[layer]["delta_norm"]
        assert found.curvature[i] == pytest.approx(curvature, rel=0.01)
        assert found.rise[i] == pytest.approx(curvature * facts[layer]["delta_norm"] ** 2 / 2, rel=0.01)


def test_agreement_is_the_mean_over_alphas_of_scipys_tau() -> None:
    found = agreement(FULL).set_index(["first", "second"])
    rows = FULL.layers[FULL.layers["layer"] != "model"]
    for first, second in found.index:
        one, other = (rows[rows["measure"] == kind] for kind in (first, second))
        both = one.merge(other, on=["alpha", "layer"])
        taus = [kendalltau(part["value_x"], part["value_y"]).statistic for _, part in both.groupby("alpha")]
        row = found.loc[(first, second)]
        assert row["tau"] == pytest.approx(np.mean(taus))
        assert row["low"] <= row["tau"] <= row["high"]


def test_the_bands_of_a_running_mean_are_calibrated_intervals() -> None:
    left, _ = FULL.plot.health()
    layer = next(label for label in left.get_legend_handles_labels()[1] if label.startswith(NOISY))
    alpha = float(layer.split("alpha ")[1].split(":")[0])
    samples = next(cell for cell in FULL.cells if cell.key == f"{alpha}|id|trace").arrays[NOISY]
    half = student.ppf(0.975, 2 * len(samples)) * samples.std(ddof=1) / np.sqrt(len(samples)) / abs(samples.mean())
    ends = [
        path.vertices[path.vertices[:, 0] == len(samples), 1] for band in left.collections for path in band.get_paths()
    ]
    assert any(np.ptp(end) == pytest.approx(2 * half) for end in ends if len(end))


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
