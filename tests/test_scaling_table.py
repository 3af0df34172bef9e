"""The table of several GPUs has the runs of the result files."""

import importlib.util
import json
from pathlib import Path

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
    found = {"settings": {"size": "l14", "limit": 16}, "machine": {"device": "Some GPU"}, "rows": rows}
    (tmp_path / "scaling-l14.json").write_text(json.dumps(found))
    lines = module().table(tmp_path).splitlines()
    assert len(lines) == 2 + 2
    assert lines[-1] == "| l14, 16, Some GPU | 2 | data | 25.0 | 1.60 (of 1) | 80% | 3.0 (8) | 2e-07 |"
