"""The tables of the benchmarks' README are what the stored results say."""

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_tables_are_those_of_the_results():
    done = subprocess.run([sys.executable, BENCHMARKS / "tables.py", "--check"], check=False)
    assert done.returncode == 0, "python benchmarks/tables.py writes them"


def test_a_number_typed_by_hand_is_seen(tmp_path):
    for name in ("tables.py", "summary.py", "scaling_table.py", "README.md"):
        (tmp_path / name).write_bytes((BENCHMARKS / name).read_bytes())
    (tmp_path / "results").symlink_to(BENCHMARKS / "results")
    readme = tmp_path / "README.md"
    readme.write_text(readme.read_text().replace("| ViT-B/32 | 88 M", "| ViT-B/32 | 87 M", 1))
    assert subprocess.run([sys.executable, tmp_path / "tables.py", "--check"], check=False).returncode == 1
