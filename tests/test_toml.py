"""What people write in TOML is read however it comes: with the mark of an editor, or through a pipe."""

from __future__ import annotations

import os
import threading

import pytest

from sharpscope.config import read_config
from sharpscope.detectors import read_rules
from sharpscope.errors import UsageError
from sharpscope.recipe import CONVENTION, Recipe
from sharpscope.recipe_file import read_recipe

FILES = {
    "rules": (
        read_rules,
        '[[rules]]\nid = "ä"\nmeasure = "barrier"\nmax = 0.05\n',
        lambda found: found.rules[0].id == "ä",
    ),
    "configuration": (read_config, 'id = "ä"\n', lambda found: found == {"id": "ä"}),
    "recipe": (
        read_recipe,
        f'alpha_convention = "{CONVENTION}"\nrules = [["*", 0.5]]\n',
        lambda found: found.recipe == Recipe.uniform(0.5),
    ),
}
EACH = pytest.mark.parametrize("what", FILES)


@EACH
def test_the_mark_that_some_editors_begin_a_file_with_is_no_part_of_it(what, tmp_path):
    read, text, right = FILES[what]
    (tmp_path / "a.toml").write_text(text, encoding="utf-8-sig")
    assert right(read(tmp_path / "a.toml"))


@EACH
def test_a_pipe_is_a_file(what, tmp_path):
    read, text, right = FILES[what]
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_text, args=(text, "utf-8"), daemon=True).start()
    assert right(read(tmp_path / "pipe"))


@pytest.mark.parametrize("what", ["rules", "configuration"])
def test_a_folder_is_none(what, tmp_path):
    with pytest.raises(UsageError, match=f"there is no .*{what}"):
        FILES[what][0](tmp_path)
