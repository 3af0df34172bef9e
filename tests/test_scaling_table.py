"""The tables of several GPUs have the runs of the result files, and no run took more memory than it might."""

import importlib.util
import json
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent / "benchmarks"


def module():
    found = importlib.util.spec_from_file_location("scaling_table", HERE / "scaling_table.py")
    made = importlib.util.module_from_spec(found)
    found.loader.exec_module(made)
    return made


def test_every_run_of_a_file_has_its_line_and_nothing_else(tmp_path):
    runs = [(1, 40.0, 1.0), (2, 25.0, 0.8)]
    rows = [
        {
            "parallel": "data", "processes": n, "seconds": s, "speedup": 40 / s, "efficiency": e,
            "peak_bytes": [2e9, 3e9][:n], "budget_bytes": 8e9, "gap": {"trace": 2e-7, "lambda_max": 3e-8},
        }
        for n, s, e in runs
    ]  # fmt: skip
    found = {
        "settings": {"size": "l14", "limit": 16},
        "machine": {"device": "Some GPU", "sharpscope_commit": "abc"},
        "rows": rows,
    }
    (tmp_path / "scaling-l14.json").write_text(json.dumps(found))
    lines = module().table(tmp_path).splitlines()
    assert len(lines) == 2 + 2
    assert lines[-1] == "| l14, 16, Some GPU, abc | 2 | data | 25.0 | 1.60 (of 1) | 80.0% | 3.0 (8) | 2e-07 |"


def sharded(peak, error=None):
    """A stored result of the three runs, the sharded one with this peak."""
    runs = [("alone", 1, 5e9, None, None), ("alone, limited", 1, 3e9, 3e9, "out"), ("in shards", 2, peak, 3e9, error)]
    rows = [
        {"run": run, "processes": n, "peak_bytes": [top] * n, "budget_bytes": limit, "error": said, "seconds": 4.0}
        for run, n, top, limit, said in runs
    ]
    about = {"settings": {"size": "b32", "images": 16}, "machine": {"device": "Some GPU"}}
    return {**about, "rows": rows, "gap": {"trace": 3e-6}}


def test_shards_stand_against_the_runs_of_one_gpu(tmp_path):
    (tmp_path / "sharded-b32.json").write_text(json.dumps(sharded(2e9)))
    assert module().shards(tmp_path).splitlines()[2:] == [
        "| b32, 16, Some GPU | alone | 1 | - | 5.00 | 4.0 | - |",
        "| b32, 16, Some GPU | alone, limited | 1 | 3.00 | 3.00 | out of memory | - |",
        "| b32, 16, Some GPU | in shards | 2 | 3.00 | 2.00 | 4.0 | 3e-06 |",
    ]


def over_budget(folder):
    """Runs of the files in the folder that took more than they may, or do not say what they took."""
    found = []
    for path in (*folder.glob("scaling-*.json"), *folder.glob("sharded-*.json")):
        for row in json.loads(path.read_text())["rows"]:
            peaks, budget = row["peak_bytes"], row["budget_bytes"]
            if None in peaks or len(peaks) != row["processes"] or (budget and max(peaks) > budget):
                found.append((path.name, row.get("run", row.get("parallel")), row["processes"]))
    return found


def over_limit(folder):
    """Rows of costs that took more than the limit of their run, in GiB."""
    found = []
    for path in (file for kind in ("growth", "moves", "path") for file in folder.glob(f"{kind}-*.json")):
        stored = json.loads(path.read_text())
        limit = (stored["settings"]["memory"] or 140) * 2**30  # of an H200, where no limit was set
        found += [(path.name, row["images"]) for row in stored["rows"] if row["peak_bytes"] > limit]
    return found


def test_no_stored_cost_was_measured_above_its_limit_of_memory(tmp_path):
    assert over_limit(HERE / "results") == []
    rows = [{"images": n, "peak_bytes": n * 2**30} for n in (1, 3)]
    (tmp_path / "growth-some.json").write_text(json.dumps({"settings": {"memory": 2}, "rows": rows}))
    assert over_limit(tmp_path) == [("growth-some.json", 3)]


def test_no_stored_run_took_more_memory_than_it_may(tmp_path):
    assert over_budget(HERE / "results") == []
    (tmp_path / "sharded-b32.json").write_text(json.dumps(sharded(3.1e9)))
    assert over_budget(tmp_path) == [("sharded-b32.json", "in shards", 2)]


SHARDED = sorted((HERE / "results").glob("sharded-*.json"))


@pytest.mark.parametrize("path", SHARDED, ids=[path.stem for path in SHARDED])
def test_a_stored_scan_in_shards_ended_where_one_gpu_ran_out_and_found_its_numbers(path):
    found = json.loads(path.read_text())
    *alone, last = found["rows"]
    assert "memory" in alone[-1]["error"]
    assert alone[-1]["budget_bytes"] == last["budget_bytes"]
    assert last["error"] is None
    assert max(found["gap"].values()) < 1e-3
