"""What the README shows runs."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_readme_has_a_runnable_example():
    assert len(BLOCKS) == 1


@pytest.mark.parametrize("block", BLOCKS)
def test_the_three_argument_call_of_the_readme_runs(block, capsys):
    names = {}
    exec(block, names)
    result = names["result"]
    assert set(result.layers["layer"]) == {"0", "2", "3", "model"}
    assert sorted(set(result.layers["alpha"])) == [round(i / 10, 12) for i in range(11)]
    assert 0 <= result.recommend().alpha <= 1


def test_every_measure_of_the_table_exists_and_every_measure_is_in_the_table():
    from sharpscope.measures import MEASURES

    table = README.split("## What is measured")[1].split("Sources:")[0]
    named = set(re.findall(r"`([a-z_]+)`", "\n".join(line.split("|")[1] for line in table.splitlines() if "|" in line)))
    assert set(MEASURES) <= named
    assert named - set(MEASURES) == {"density", "accuracy", "loss", "confidence", "calibration_error"}


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_every_link_of_the_readme_leads_somewhere(link):
    assert (Path(__file__).parent.parent / link).exists()
