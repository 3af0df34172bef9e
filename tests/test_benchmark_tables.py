"""The tables of benchmarks in the pages are what the stored results say."""

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_tables_are_those_of_the_results():
    done = subprocess.run([sys.executable, BENCHMARKS / "tables.py", "--check"], check=False)
    assert done.returncode == 0, "python benchmarks/tables.py writes them"


def test_a_number_typed_by_hand_is_seen(tmp_path):
    here, docs = tmp_path / "benchmarks", tmp_path / "docs"
    here.mkdir()
    docs.mkdir()
    for name in ("tables.py", "summary.py", "scaling_table.py", "README.md"):
        (here / name).write_bytes((BENCHMARKS / name).read_bytes())
    (here / "results").symlink_to(BENCHMARKS / "results")
    (docs / "measures.md").write_bytes((BENCHMARKS.parent / "docs" / "measures.md").read_bytes())
    check = [sys.executable, here / "tables.py", "--check"]
    assert subprocess.run(check, check=False).returncode == 0
    readme = here / "README.md"
    readme.write_text(readme.read_text().replace("| ViT-B/32 | 88 M", "| ViT-B/32 | 87 M", 1))
    assert subprocess.run(check, check=False).returncode == 1
