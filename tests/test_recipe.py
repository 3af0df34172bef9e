"""Recipes: layer patterns to alphas."""

import numpy as np
import pytest

from sharpscope.errors import UsageError
from sharpscope.recipe import Recipe

LAYERS = ["visual.embed", "visual.block.00", "visual.block.01", "head"]


def test_the_first_matching_pattern_wins():
    recipe = Recipe((("visual.block.00", 1.0), ("visual.*", 0.25), ("*", 0.5)))
    assert recipe.alphas(LAYERS) == {
        "visual.embed": 0.25,
        "visual.block.00": 1.0,
        "visual.block.01": 0.25,
        "head": 0.5,
    }


def test_a_uniform_recipe_gives_every_layer_its_alpha():
    assert set(Recipe.uniform(0.3).alphas(LAYERS).values()) == {0.3}


@pytest.mark.parametrize("rules", [(), (("visual.*", 0.5),)])
def test_a_recipe_without_a_last_star_is_refused(rules):
    with pytest.raises(UsageError, match="last pattern"):
        Recipe(rules)


def test_an_alpha_that_is_no_number_is_refused():
    with pytest.raises(UsageError, match="'head' the alpha nan"):
        Recipe((("head", float("nan")), ("*", 1.0)))


@pytest.mark.parametrize("alpha", ["0.5", None, True, {"*": 0.5}, float("inf")])
def test_an_alpha_of_another_kind_is_refused(alpha):
    with pytest.raises(UsageError, match="gives '\\*' the alpha"):
        Recipe.uniform(alpha)


@pytest.mark.parametrize("rule", ["*", (1, 0.5), ("*", 0.5, 1)])
def test_a_rule_that_is_no_pair_is_refused(rule):
    with pytest.raises(UsageError, match="no pair of a pattern and an alpha"):
        Recipe((rule, ("*", 0.5)))


def test_numbers_of_numpy_and_lists_are_taken():
    recipe = Recipe([["head", np.float32(0.25)], ["*", 1]])
    assert recipe == Recipe((("head", 0.25), ("*", 1.0)))
    assert all(type(alpha) is float for _, alpha in recipe.rules)
