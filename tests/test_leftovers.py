"""No page of one scan stands beside the numbers of another."""

import json

import pytest
from test_scan_inputs import loader, network, scan

import sharpscope as ss
from sharpscope.report.gate import CHECK
from sharpscope.report.page import write

OTHERS = {  # that the user put there
    "figures/mine.svg": "<svg/>",
    "notes.md": "mine",
    "spd.jsonl": "",
}


@pytest.fixture
def folder(tmp_path):
    """A scan with its page, what the gate said of it, and files of somebody else's."""
    write(scan(out=tmp_path), tmp_path)
    (tmp_path / CHECK).write_text(json.dumps({"passed": True, "rules": []}))
    for name, text in OTHERS.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def other(**settings):
    return ss.scan(network(0), network(2), loader(), alphas=3, measures=["directional"], progress=False, **settings)


@pytest.mark.parametrize("way", ["fresh", "save"])
def test_another_scan_in_a_folder_takes_the_page_away_and_nothing_else(folder, way):
    found = other(out=folder, fresh=True) if way == "fresh" else other()
    found.save(folder)
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert not {"index.html", CHECK} & left
    assert {name for name in left if name.startswith("figures")} == {"figures/mine.svg"}
    assert left >= OTHERS.keys()
    assert ss.open(folder) == found


@pytest.mark.parametrize("way", ["resumed", "saved"])
def test_the_same_scan_keeps_its_page(folder, way):
    before = (folder / "index.html").read_bytes()
    found = scan(out=folder) if way == "resumed" else scan()
    found.save(folder)
    assert (folder / "index.html").read_bytes() == before
    assert (folder / CHECK).exists()


def test_a_page_and_findings_of_somebody_elses_stay(tmp_path):
    for name, text in {"index.html": "<title>My site</title>", CHECK: "{}"}.items():
        (tmp_path / name).write_text(text)
    scan(out=tmp_path)
    other(out=tmp_path, fresh=True)
    assert (tmp_path / "index.html").read_text() == "<title>My site</title>"
    assert (tmp_path / CHECK).read_text() == "{}"
