"""Build the API reference from the docstrings: ``python docs/reference.py [FOLDER]``, or ``make docs``."""

from __future__ import annotations

import importlib
import sys
from html import escape
from pathlib import Path
from types import ModuleType

import pdoc

MODULES = (
    "sharpscope",
    "sharpscope.measures",
    "sharpscope.curvature.trace",
    "sharpscope.curvature.lanczos",
    "sharpscope.curvature.directional",
    "sharpscope.curvature.density",
    "sharpscope.curvature.dense",
    "sharpscope.curvature.gauss_newton",
    "sharpscope.curvature.point",
    "sharpscope.perturbation",
    "sharpscope.criticality",
    "sharpscope.intervention",
    "sharpscope.search",
    "sharpscope.sparsity",
    "sharpscope.stragglers.paired",
    "sharpscope.stragglers.recommendation",
    "sharpscope.detectors",
    "sharpscope.optim",
    "sharpscope.optim.adam_spd",
    "sharpscope.optim.baselines",
    "sharpscope.optim.hf",
    "sharpscope.finetune",
    "sharpscope.merging",
    "sharpscope.models",
    "sharpscope.report.plots",
    "sharpscope.errors",
)
ROOT = Path(__file__).parent.parent


def loaded(name: str) -> ModuleType:
    """Return the module with all of its public names in it: pdoc sees no name that is loaded at first use."""
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):
        vars(module)[public] = getattr(module, public)
    return module


def build(folder: Path) -> Path:
    """Write the pages and return the first one."""
    for name in MODULES:
        loaded(name)
    pdoc.render.configure(
        docformat="numpy", footer_text=f"sharpscope {importlib.import_module('sharpscope').__version__}"
    )
    pdoc.pdoc(*MODULES, output_directory=folder)
    index = folder / "index.html"
    index.write_text(contents(), encoding="utf-8")  # pdoc's own leads to the first module only
    return index


def contents() -> str:
    """Return a page that lists the modules, each with its first line."""
    lines = []
    for name in MODULES:
        first = (sys.modules[name].__doc__ or "").strip().splitlines()[0]
        lines.append(f'<dt><a href="{name.replace(".", "/")}.html">{name}</a></dt><dd>{escape(first)}</dd>')
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><title>sharpscope: API reference</title>'
    style = "<style>body{font:16px/1.5 system-ui;max-width:50rem;margin:2rem auto}dt{margin-top:.6rem}</style>"
    return f"{head}{style}<h1>sharpscope: API reference</h1><dl>{''.join(lines)}</dl></html>\n"


if __name__ == "__main__":
    print(build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "docs"))
