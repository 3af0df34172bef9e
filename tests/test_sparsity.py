"""Sparsified layers: limits, shares, expectation, and the shrink control."""

import pytest
import torch

from sharpscope.errors import MismatchError, UsageError
from sharpscope.path import Path
from sharpscope.sparsity import shrunk, sparsify

torch.manual_seed(0)
START = {"w": torch.randn(40, 50), "b": torch.randn(50)}
HERE = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in START.items()}


def same(a, b):
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize("target", ["delta", "weight"])
@pytest.mark.parametrize("mask", ["random", "magnitude"])
def test_dropping_nothing_keeps_the_bits_and_dropping_all_leaves_the_origin(target, mask):
    assert same(sparsify(START, HERE, 0.0, target=target, mask=mask), HERE)
    origin = START if target == "delta" else {n: torch.zeros_like(t) for n, t in START.items()}
    assert same(sparsify(START, HERE, 1.0, target=target, mask=mask), origin)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("target", ["delta", "weight"])
@pytest.mark.parametrize("mask", ["random", "magnitude"])
def test_every_entry_is_either_dropped_or_kept_and_so_many_are(mask, target, rescale):
    p = 0.3
    found = sparsify(START, HERE, p, target=target, mask=mask, rescale=rescale)
    for name, tensor in found.items():
        origin = START[name] if target == "delta" else torch.zeros_like(tensor)
        dropped = tensor == origin
        kept = origin + (HERE[name] - origin) / (1 - p) if rescale else HERE[name]
        torch.testing.assert_close(tensor[~dropped], kept[~dropped], rtol=1e-6, atol=1e-7)
        share, spread = float(dropped.double().mean()), (p * (1 - p) / tensor.numel()) ** 0.5
        assert share == pytest.approx(p, abs=4 * spread if mask == "random" else 1e-9)
        if mask == "magnitude":
            size = (HERE[name] - origin).abs()
            assert size[dropped].max() <= size[~dropped].min()


@pytest.mark.parametrize(("rescale", "control"), [(False, 0.7), (True, 1.0)])
def test_a_random_mask_of_the_delta_is_a_smaller_alpha_in_expectation(rescale, control):
    draws = [sparsify(START, HERE, 0.3, rescale=rescale, seed=seed)["w"].double() for seed in range(400)]
    mean, error = torch.stack(draws).mean(0), torch.stack(draws).std(0) / 20
    expected = START["w"].double() + control * (HERE["w"] - START["w"]).double()
    z = ((mean - expected) / error)[error > 0]
    assert abs(float(z.mean())) < 4 / len(z) ** 0.5 * 2
    assert float(z.std()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.1, 0.9, 0.99])
def test_in_half_precision_the_same_entries_are_dropped_as_in_float32(dtype, p):
    zeros, ones = torch.zeros(500, 1000), torch.ones(500, 1000)
    wide, half = (sparsify({"w": zeros.to(kind)}, {"w": ones.to(kind)}, p)["w"] for kind in (torch.float32, dtype))
    assert half.dtype == dtype
    assert torch.equal(half.float(), wide)
    assert float((wide == 0).double().mean()) == pytest.approx(p, abs=4 * (p * (1 - p) / 500_000) ** 0.5)


def test_the_shrink_control_is_the_point_of_the_path():
    assert same(shrunk(START, HERE, 0.25), Path(START, HERE)(0.75))


def test_the_mask_depends_on_the_seed_and_the_name_only():
    whole, alone = sparsify(START, HERE, 0.5, seed=3), sparsify({"w": START["w"]}, {"w": HERE["w"]}, 0.5, seed=3)
    assert torch.equal(whole["w"], alone["w"])
    assert not torch.equal(whole["w"], sparsify(START, HERE, 0.5, seed=4)["w"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": -0.1}, "p=-0.1: the share"),
        ({"p": float("nan")}, "p=nan"),
        ({"p": 1.0, "rescale": True}, "below 1 to rescale"),
        ({"p": 0.5, "target": "deltas"}, "'deltas' is unknown"),
        ({"p": 0.5, "mask": "top"}, "'top' is unknown"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        sparsify(START, HERE, **arguments)


def test_layers_of_another_shape_are_refused():
    with pytest.raises(MismatchError, match=r"'b' is missing in the layer to be made sparse"):
        sparsify(START, {"w": HERE["w"]}, 0.5)
