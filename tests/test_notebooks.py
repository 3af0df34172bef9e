"""The notebooks run from top to bottom, and what they show was made by the code that they hold."""

import re

import pytest
from optional import needs

needs("nbclient")
needs("ipykernel")
nbformat = needs("nbformat")

from nbclient.exceptions import CellExecutionError  # noqa: E402 - needs what may be missing

from notebooks import FOLDER, MARK, NOTEBOOKS, code, executed  # noqa: E402 - needs what may be missing

KEPT = [nbformat.read(path, as_version=4) for path in NOTEBOOKS]
NAMES = [path.stem for path in NOTEBOOKS]
MACHINE = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|usr|opt|Users|private|var)/")


def test_there_are_five():
    assert [name[:2] for name in NAMES] == ["1-", "2-", "3-", "4-", "5-"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path):
    cells = [cell for cell in executed(path, tmp_path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]


def test_a_name_that_the_library_lacks_breaks_a_notebook(tmp_path):
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import sharpscope\nsharpscope.scam")])
    nbformat.write(broken, tmp_path / "broken.ipynb")
    with pytest.raises(CellExecutionError, match="has no attribute 'scam'"):
        executed(tmp_path / "broken.ipynb", tmp_path)


@pytest.mark.parametrize("notebook", KEPT, ids=NAMES)
def test_kept_outputs_are_of_the_code_beside_them(notebook):
    assert notebook.metadata.get(MARK) == code(notebook), "run `make notebooks`"


@pytest.mark.parametrize("notebook", KEPT, ids=NAMES)
def test_kept_outputs_hold_no_error_and_no_path_of_a_machine(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert {output.output_type for output in outputs} <= {"stream", "execute_result", "display_data"}
    texts = [str(text) for output in outputs for text in (output.get("text", ""), *output.get("data", {}).values())]
    assert len(texts) > 5
    assert not [text for text in texts if MACHINE.search(text) and not text.startswith("iVBOR")]


def test_the_folder_is_small():
    assert sum(file.stat().st_size for file in NOTEBOOKS) < 1_500_000


@pytest.mark.parametrize("notebook", KEPT, ids=NAMES)
def test_links_between_notebooks_lead_somewhere(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert all((FOLDER / link).exists() for link in re.findall(r"\]\(([^)]+\.ipynb)\)", text))
