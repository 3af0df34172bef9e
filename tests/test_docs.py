"""What the guides show runs; what they link to is there; the reference holds every public name."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import tomllib
import warnings
from pathlib import Path

import pytest
import typer
from optional import needs
from planted import planted

from sharpscope import cli, demo
from sharpscope.detectors import read_rules
from sharpscope.recipe_file import read_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
WRITTEN = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def blocks(page: Path, kind: str) -> list[str]:
    """Return the fenced blocks whose info string is exactly this."""
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """What the guides talk of: two checkpoints, images, a finished scan."""
    place = tmp_path_factory.mktemp("reader")
    (place / "runs").mkdir()
    for name, source in zip(("zs", "ft"), demo.pair(), strict=True):
        (place / "runs" / name).symlink_to(source)
    demo.extract(place / "data")
    planted(studied=True).save(place / "runs" / "scan")
    return place


RUN = [(page, name) for page, name in zip(PAGES, NAMES, strict=True) if blocks(page, "python") and name != "README.md"]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, _ in RUN], ids=[name for _, name in RUN])
def test_the_python_of_a_guide_runs_from_top_to_bottom(page, material, monkeypatch):
    monkeypatch.chdir(material)
    names: dict[str, object] = {"__name__": "guide"}
    monkeypatch.setitem(__import__("sys").modules, "guide", type(re)("guide"))  # dataclasses look their module up
    for block in blocks(page, "python"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exec(compile(block, str(page), "exec"), names)


def test_the_guides_have_python_that_runs():
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 12


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_that_is_not_run_is_python(page):
    for block in blocks(page, "python no-run"):
        ast.parse(block)


def commands():
    found = []
    for page, name in zip(PAGES, NAMES, strict=True):
        lines = "\n".join(blocks(page, "sh")).splitlines()
        lines += re.findall(r"`(sharpscope [a-z][^`]*)`", page.read_text(encoding="utf-8"))
        found += [(name, line.split(" #")[0]) for line in lines if re.search(r"\bsharpscope [a-z]", line)]
    return found


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_of_the_guides_have_these_flags(page, line):
    """Each is a command, and each flag one of its own; so a flag that is renamed breaks the guide here."""
    words = shlex.split(line[line.index("sharpscope ") :])[1:]
    command = typer.main.get_command(cli.app).commands[words[0]]
    known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known


def test_there_are_commands_to_check():
    assert len(commands()) > 20


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_toml_of_the_guides_is_toml_rules_are_rules_and_recipes_recipes(page, tmp_path):
    for block in blocks(page, "toml"):
        stored = tomllib.loads(block)
        (tmp_path / "shown.toml").write_text(block)
        if "check" in stored.get("tool", {}).get("sharpscope", {}):
            assert len(read_rules(tmp_path / "shown.toml").rules) == 3
        if "rules" in stored:
            assert len(read_recipe(tmp_path / "shown.toml").recipe.rules) == len(stored["rules"])


def test_there_is_a_recipe_to_read():
    assert any("rules" in tomllib.loads(block) for page in PAGES for block in blocks(page, "toml"))


@pytest.mark.parametrize("page", WRITTEN, ids=[str(page.relative_to(ROOT)) for page in WRITTEN])
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


def test_every_measure_of_the_table_exists_and_every_measure_is_in_the_table():
    from sharpscope.measures import MEASURES

    table = (ROOT / "docs" / "measures.md").read_text().split("## What is measured")[1].split("Sources:")[0]
    named = set(re.findall(r"`([a-z_]+)`", "\n".join(line.split("|")[1] for line in table.splitlines() if "|" in line)))
    assert set(MEASURES) <= named
    assert named - set(MEASURES) == {"density", "accuracy", "loss", "confidence", "calibration_error"}


def test_the_reference_holds_every_public_name_with_words_to_it(tmp_path, monkeypatch):
    needs("pdoc")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    reference = importlib.import_module("reference")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pdoc.doc_types")  # types that only a checker imports
        warnings.filterwarnings("error", message=".*does not resolve")
        index = reference.build(tmp_path / "api")
    leads = re.findall(r'href="([^"]+)"', index.read_text(encoding="utf-8"))
    assert leads == [f"{module.replace('.', '/')}.html" for module in reference.MODULES]
    for module in reference.MODULES:
        page = (tmp_path / "api" / f"{module.replace('.', '/')}.html").read_text(encoding="utf-8")
        shown = re.findall(r'<section id="(\w+)">(.*?)</section>', page, flags=re.DOTALL)
        words = {name for name, text in shown if '<div class="docstring">' in text}
        public = set(getattr(importlib.import_module(module), "__all__", ())) - {"__version__"}
        assert public <= {name for name, _ in shown}, module
        missing = public - words
        assert not {name for name in missing if callable(getattr(importlib.import_module(module), name))}, module


def test_the_citation_file_has_what_its_format_demands():
    found = needs("yaml").safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "title", "message", "authors"} <= set(found)
    assert found["cff-version"] == "1.2.0"
    assert found["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    assert all(set(paper) >= {"type", "title", "authors"} for paper in found["references"])
