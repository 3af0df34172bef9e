"""The notebooks run from top to bottom, and what they show was made by the code that they hold."""

from pathlib import Path

import pytest
from optional import needs

needs("nbclient")
needs("ipykernel")
nbformat = needs("nbformat")

from notebooks import NOTEBOOKS, executed  # noqa: E402 - needs what may be missing

ROOT = Path(__file__).parent.parent


def test_there_are_five():
    assert len(NOTEBOOKS) == 5


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path):
    cells = executed(path, tmp_path).cells
    assert all(cell.execution_count for cell in cells if cell.cell_type == "code")
