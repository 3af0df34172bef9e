"""The benchmarks of curvature still run: each on the smallest network, hardly trained, with two images."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RUNS = {
    "path": ["--images", "2", "--alphas", "2", "--batch", "2", "--unit", "2"],
    "growth": ["--case", "tiny,2,1"],
    "scaling": ["--device", "cpu", "--processes", "1", "--alphas", "2", "--limit", "2", "--evaluated", "2",
                "--batch", "1", "--draws", "2", "--steps", "2", "--trained", "1", "2"],
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_it_runs_and_writes_rows_with_versions_and_machine(name, tmp_path):
    out = tmp_path / "out.json"
    trained = "import sys, towers; towers.SIZES['tiny'].steps.update(trained=1, converged=2)"
    code = f"{trained}; import {name}; sys.argv[0] = {name}.__file__; {name}.main()"
    work = ["--work", str(tmp_path / "work")] if name == "scaling" else []
    command = [sys.executable, "-c", code, *RUNS[name], *work, "--out", str(out)]
    subprocess.run(command, cwd=BENCHMARKS, check=True, capture_output=True)
    found = json.loads(out.read_text())
    assert found["rows"]
    assert found["versions"]["torch"]
    assert found["machine"]["cpu"]
