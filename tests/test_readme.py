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
