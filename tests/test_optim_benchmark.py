"""The benchmark of the optimiser runs, and its tensors are those it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def test_the_benchmark_times_every_variant(tmp_path):
    out = tmp_path / "spd.json"
    command = [sys.executable, "benchmarks/spd.py", "--size", "tiny", "--rounds", "1", "--limits", "20"]
    done = subprocess.run(
        [*command, "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["variants"]["adamw foreach"]["over_adamw_foreach"] == 1
    assert all(row["milliseconds"] > 0 for row in found["variants"].values())
    assert found["versions"]["torch"] == torch.__version__


def test_the_tensors_are_those_of_a_vit_b_32(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from spd import shapes

    size = shapes(768, 12)
    assert len(size) == 148
    assert round(sum(torch.Size(shape).numel() for shape in size.values()) / 1e6) == 88
