"""The path with an alpha for each layer."""

import pytest
import torch
from nets import fine_tuned, made

from sharpscope.errors import UsageError
from sharpscope.partition import Partition, layers
from sharpscope.path import Path
from sharpscope.recipe import Recipe

ZS = made("vit", dtype=torch.float32)
PATH = Path(dict(ZS.named_parameters()), dict(fine_tuned(ZS, "vit").named_parameters()))
LAYERS = layers(ZS)
NAMES = list(LAYERS.layers)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1 / 3, 0.5, 0.9, 1.0, 1.3, -0.2])
def test_a_uniform_recipe_is_the_point_on_the_path_bit_for_bit(alpha):
    assert same(PATH.mixed(Recipe.uniform(alpha).alphas(NAMES), LAYERS), PATH(alpha))


def test_layers_at_an_end_have_the_bits_of_that_end_and_the_others_lie_between():
    found = PATH.mixed({layer: float(i % 3) / 2 for i, layer in enumerate(NAMES)}, LAYERS)
    for i, layer in enumerate(NAMES):
        for name in LAYERS.layers[layer]:
            low, high = PATH.start[name], PATH.end[name]
            expected = (low, (low + high) / 2, high)[i % 3]
            torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-7 if i % 3 == 1 else 0)


@pytest.mark.parametrize(
    ("alphas", "partition", "message"),
    [
        ({"patch": 0.5}, LAYERS, "layer 'blocks.0' has no alpha"),
        ({**dict.fromkeys(NAMES, 0.5), "patchh": 1.0}, LAYERS, "no layer 'patchh' to give an alpha"),
        (dict.fromkeys(NAMES, 0.5), Partition({"head": LAYERS.layers["head"]}), "'patch.weight' of the path is in no"),
    ],
)
def test_a_layer_without_an_alpha_is_named(alphas, partition, message):
    with pytest.raises(UsageError, match=message):
        PATH.mixed(alphas, partition)
