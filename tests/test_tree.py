"""Tree arithmetic, and draws that depend on nothing but key and name."""

import pytest
import torch

from sharpscope import tree
from sharpscope.errors import MismatchError


def test_norm_accumulates_in_float64():
    """16 million times 0.1 squared in float32 would stall near 2**24 * eps."""
    assert tree.norm({"x": torch.full((4_000_000,), 0.1)}) == pytest.approx(200.0, rel=1e-6)


def test_signs_do_not_depend_on_which_other_tensors_there_are():
    both = {"a": torch.zeros(50), "b": torch.zeros(3, 5)}
    alone = {"b": torch.zeros(3, 5)}
    assert torch.equal(tree.rademacher(both, 0, "trace")["b"], tree.rademacher(alone, 0, "trace")["b"])
    assert not torch.equal(tree.rademacher(alone, 1, "trace")["b"], tree.rademacher(alone, 0, "trace")["b"])


def test_signs_are_signs_and_balanced():
    signs = tree.rademacher({"x": torch.zeros(10_000, dtype=torch.float64)}, 0)["x"]
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(signs.mean()) < 0.04


def test_structure_check_names_the_tensor_and_both_shapes():
    a, b = {"w": torch.zeros(2, 3)}, {"w": torch.zeros(3, 2)}
    with pytest.raises(MismatchError, match=r"'w' is \(2, 3\) torch.float32 in left but \(3, 2\)"):
        tree.check_same_structure(a, b, ("left", "right"))
    with pytest.raises(MismatchError, match="'v' is missing in left"):
        tree.check_same_structure(a, {**a, "v": a["w"]}, ("left", "right"))


def test_fingerprint_sees_names_shapes_types_and_values():
    base = {"w": torch.arange(6.0)}
    others = [
        {"v": torch.arange(6.0)},
        {"w": torch.arange(6.0).view(2, 3)},
        {"w": torch.arange(6.0, dtype=torch.float64)},
        {"w": torch.arange(6.0) + 1e-6},
    ]
    assert len({tree.fingerprint(t) for t in [base, *others]}) == 5
    assert tree.fingerprint(base) == tree.fingerprint({"w": torch.arange(6.0)})
