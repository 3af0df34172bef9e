"""Recipes: layer patterns to alphas."""

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
