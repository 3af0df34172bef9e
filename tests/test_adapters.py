"""A result in the formats of other tools holds the same numbers."""

import builtins
import math
import os
import posixpath
import re

import numpy as np
import pytest
from planted import HOSTILE, LAYERS, SINGLE, STRAGGLER, planted

from sharpscope.errors import UsageError


@pytest.fixture(scope="module")
def scan():
    return planted()


def row(scan, frame, **wanted):
    table = getattr(scan, frame)
    return table[np.logical_and.reduce([table[key] == value for key, value in wanted.items()])].iloc[0]


# --- xarray


@pytest.fixture
def data(scan):
    if os.environ.get("CI"):
        import xarray  # noqa: F401
    pytest.importorskip("xarray")
    return scan.to_xarray()


def test_xarray_holds_every_number_at_its_place(scan, data):
    assert data["layer"].values.tolist() == [*LAYERS, "model"][: len(data["layer"])]
    assert data["split"].values.tolist() == ["id", *scan.ood_splits]
    for _, r in scan.layers.iterrows():
        here = {"layer": r["layer"], "alpha": r["alpha"]}
        assert data[r["measure"]].sel(here).item() == r["value"]
        assert data[f"{r['measure']}_stderr"].sel(here).item() == r["stderr"]
        assert data[f"{r['measure']}_converged"].sel(here).item() is r["converged"]
    for _, r in scan.evals.iterrows():
        assert data[r["measure"]].sel(split=r["split"], alpha=r["alpha"]).item() == r["value"]


def test_xarray_has_nan_where_nothing_was_measured(data):
    gap = data.sel(layer="visual.embed", alpha=0.5)
    assert math.isnan(gap["trace"].item())
    assert gap["trace_converged"].item() is False
    assert not math.isnan(data["trace"].sel(layer="visual.embed", alpha=0.4).item())


def test_without_xarray_the_way_out_is_said(scan, monkeypatch):
    real = builtins.__import__

    def absent(name, *rest):
        if name == "xarray":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UsageError, match="needs xarray, which is not installed\n  fix: pip install xarray"):
        scan.to_xarray()


# --- MLflow


def valid_for_mlflow(name):
    """The rules of mlflow.utils.validation: its signs, no path that another name could mean, at most 250 long."""
    unique = posixpath.normpath(name) == name and not name.startswith(("/", ".."))
    return bool(re.fullmatch(r"[/\w.\- :]+", name, flags=re.ASCII)) and unique and len(name) <= 250


def test_metrics_have_names_that_mlflow_takes_and_the_numbers_of_the_frames(scan):
    found = scan.to_mlflow_metrics()
    assert all(map(valid_for_mlflow, found))
    assert all(type(value) is float and math.isfinite(value) for value in found.values())
    assert found["recommended_alpha"] == 0.4
    assert (
        found["accuracy/scans/candidate"] == row(scan, "evals", alpha=0.4, split="scans", measure="accuracy")["value"]
    )
    trace = row(scan, "layers", alpha=1.0, layer=STRAGGLER, measure="trace")
    assert found[f"trace/{STRAGGLER}/fine-tuned"] == trace["value"]
    assert found[f"trace_stderr/{STRAGGLER}/fine-tuned"] == trace["stderr"]
    change = scan.recommend().versus["zero-shot"]["mean OOD"]
    names = ("accuracy_change", "accuracy_change_low", "accuracy_change_high")
    assert [found[f"{name}/mean OOD/versus zero-shot"] for name in names] == [change.value, *change.interval]


def test_no_metric_is_a_folder_of_another(scan):
    """MLflow's file store keeps a/b in a folder a, so a itself cannot be a metric."""
    names = set(scan.to_mlflow_metrics())
    assert not {posixpath.dirname(name) for name in names} & names


def test_an_unknown_error_is_no_metric(scan):
    found = scan.to_mlflow_metrics()
    assert f"trace/{SINGLE}/zero-shot" in found
    assert f"trace_stderr/{SINGLE}/zero-shot" not in found


def test_names_that_fall_together_stay_apart():
    found = planted(ood=("scans", HOSTILE)).to_mlflow_metrics()
    hostile = [name for name in found if name.startswith("accuracy/_b_")]
    assert len(hostile) == 3


def test_a_scan_without_a_recommendation_still_has_its_numbers():
    found = planted(alphas=(0.0, 0.5)).to_mlflow_metrics()
    assert "recommended_alpha" not in found
    assert "accuracy/scans/zero-shot" in found


# --- trackers


class Kept:
    """A tracker that keeps what it is given."""

    def __init__(self):
        self.steps = {}

    def log(self, metrics, *, step):
        assert step not in self.steps
        self.steps[step] = metrics


def test_a_tracker_gets_a_step_for_each_alpha_then_the_summary(scan):
    tracker = Kept()
    scan.log_to(tracker)
    assert list(tracker.steps) == list(range(12))
    assert [tracker.steps[i]["alpha"] for i in range(11)] == scan.meta["alphas"]
    value = row(scan, "layers", alpha=0.3, layer=STRAGGLER, measure="trace")["value"]
    assert tracker.steps[3][f"trace/{STRAGGLER}"] == value
    assert tracker.steps[11] == scan.to_mlflow_metrics()


def test_what_cannot_log_is_refused(scan):
    with pytest.raises(UsageError, match=r"list has no log\(dict, step=\)"):
        scan.log_to([])
