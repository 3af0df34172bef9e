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


def test_a_folder_of_other_settings_is_refused_and_left_as_it_is(tmp_path):
    code = "import sys, pathlib, claim; claim.claim(pathlib.Path(sys.argv[1]), {'images': int(sys.argv[2])})"

    def claimed(images):
        command = [sys.executable, "-c", code, tmp_path, str(images)]
        return subprocess.run(command, check=False, cwd=BENCHMARKS, capture_output=True, text=True)

    assert [claimed(8).returncode, claimed(8).returncode] == [0, 0]
    refused = claimed(9)
    assert refused.returncode == 1
    assert f'{tmp_path} holds results of other settings: {{"images": 8}}' in refused.stderr
    assert claimed(8).returncode == 0
