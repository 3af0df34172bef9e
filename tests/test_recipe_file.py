"""Claims about recipe files: they come back as they were, and what cannot be meant is refused by name."""

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharpscope.errors import UsageError
from sharpscope.recipe import CONVENTION, Recipe
from sharpscope.recipe_file import RecipeFile, read_recipe, write_recipe

alphas = st.floats(-2, 3, allow_nan=False)
words = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=12)
intervals = st.tuples(st.floats(0, 50), st.floats(50, 100))


@settings(max_examples=150, deadline=None)
@given(
    rules=st.lists(st.tuples(words, alphas), max_size=4),
    last=alphas,
    predicted=st.dictionaries(words, intervals, max_size=2),
    sources=st.dictionaries(words, words, max_size=2),
)
def test_a_recipe_comes_back_as_it_was_written(tmp_path_factory, rules, last, predicted, sources):
    stored = RecipeFile(Recipe((*rules, ("*", last))), "part", predicted, sources)
    assert read_recipe(write_recipe(stored, tmp_path_factory.getbasetemp() / "r.toml")) == stored


def test_the_file_is_plain_toml_that_states_its_convention(tmp_path):
    path = write_recipe(RecipeFile(Recipe((("visual.block.1*", 0.0), ("*", 1e-7)))), tmp_path / "r.toml")
    stored = tomllib.loads(path.read_text())
    assert stored["rules"] == [["visual.block.1*", 0.0], ["*", 1e-7]]
    assert stored["alpha_convention"] == "alpha 0 = zero-shot (start), alpha 1 = fine-tuned (end)"
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.toml"]


def test_a_numpy_alpha_is_written_as_a_number(tmp_path):
    import numpy as np

    stored = RecipeFile(Recipe.uniform(np.float64(0.3)), predicted={"id": (np.float64(1), np.float64(2))})
    assert read_recipe(write_recipe(stored, tmp_path / "r.toml")) == stored


def test_a_folder_stands_for_the_recipe_in_it(tmp_path):
    write_recipe(RecipeFile(Recipe.uniform(0.5)), tmp_path / "recipe.toml")
    assert read_recipe(tmp_path).recipe == Recipe.uniform(0.5)


GOOD = f'alpha_convention = "{CONVENTION}"\nrules = [["*", 0.5]]\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rules = [", r"is no TOML"),
        ('rules = [["*", 0.5]]', r"does not say which end alpha 0 is\n  fix: alpha_convention = "),
        (GOOD.replace("alpha 0 = zero", "alpha 1 = zero"), r"has alpha_convention 'alpha 1 = zero-shot"),
        (GOOD + "ruels = 1", r"'ruels' is no key of a recipe\n  fix: did you mean 'rules'\?"),
        (GOOD.split("\n")[0], "has no rules"),
        (GOOD.replace("0.5", "true"), r"rule \['\*', True\] is no pair"),
        (GOOD.replace("0.5", '"half"'), r"rule \['\*', 'half'\] is no pair"),
        (GOOD.replace("0.5", "nan"), r"r.toml: the recipe gives '\*' the alpha nan"),
        (GOOD.replace('"*"', '"head"'), r"r.toml: the recipe's last pattern is 'head'"),
        (GOOD + 'granularity = "atom"', "granularity 'atom' is unknown"),
        (GOOD + "[predicted]\nid = [60, 50]", r"predicted 'id' is \[60, 50\]"),
        (GOOD + "predicted = 3", r"r.toml: predicted is 3, not a table\n  fix: \[predicted\]"),
        (GOOD + 'sources = ["a"]', r"r.toml: sources is \['a'\], not a table"),
        (GOOD + "[predicted]\nid = [0.5, nan]", r"predicted 'id' is \[0.5, nan\]"),
    ],
)
def test_what_is_no_recipe_is_refused_by_name(tmp_path, text, said):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(UsageError, match=said):
        read_recipe(tmp_path / "r.toml")


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(UsageError, match="there is no recipe at"):
        read_recipe(tmp_path / "none.toml")
