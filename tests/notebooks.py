"""Run the notebooks as a reader would, in a folder of their own; as a command, write what came out into them.

python tests/notebooks.py     # or: make notebooks
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = tuple(sorted(FOLDER.glob("*.ipynb")))
SECONDS = 300  # for a cell; a notebook takes less than 90 on two free cores
WIDTH = 800  # of figures as they are kept
MARK = "outputs_of"  # metadata: the code that the kept outputs belong to


def code(notebook: NotebookNode) -> str:
    """Return a digest of the code of all cells."""
    return hashlib.sha256("\0".join(c.source for c in notebook.cells if c.cell_type == "code").encode()).hexdigest()


def executed(path: Path, folder: Path) -> NotebookNode:
    """Return the notebook after a run in the folder; the first error ends it and is raised."""
    notebook = nbformat.read(path, as_version=4)
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "IPYTHONDIR": str(folder / ".ipython")}
    client = NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(folder)}})
    client.execute(env={**os.environ, **quiet})
    return notebook


def slim(notebook: NotebookNode) -> NotebookNode:
    """Return the notebook without times, with small pictures, marked with the code that its outputs belong to."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":  # progress has times in it, and warnings where they arose
            cell.outputs = _joined([_here(output) for output in cell.outputs if output.get("name") != "stderr"])
        for output in cell.get("outputs", ()):
            _shrink(output.get("data", {}))
    notebook.metadata[MARK] = code(notebook)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Return the outputs with what was printed in several pieces as one: the pieces are a matter of timing."""
    found: list[NotebookNode] = []
    for output in outputs:
        if found and output.output_type == found[-1].output_type == "stream":
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def _here(output: NotebookNode) -> NotebookNode:
    """Return the output with paths from the root of the repository."""
    text = json.dumps(output).replace(f"{FOLDER.parent}/", "")
    return nbformat.from_dict(json.loads(text))


def _shrink(data: dict[str, Any]) -> None:
    if "image/png" not in data:
        return
    data.pop("text/plain", None)  # of an array of Axes: addresses
    with Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) as picture:
        found = picture.convert("RGB")
    found.thumbnail((WIDTH, 4 * WIDTH))
    buffer = io.BytesIO()
    found.save(buffer, format="png", optimize=True)
    data["image/png"] = base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    for place in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(slim(executed(place, Path(folder))), place)
