"""Attention under masks by the closed form: torch's, with two derivatives, in groups of examples too."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sharpscope.curvature import groups
from sharpscope.curvature.gradient import plain_graph
from sharpscope.curvature.point import Point
from sharpscope.curvature.smooth import smooth
from sharpscope.losses import cross_entropy
from sharpscope.network import network
from sharpscope.objective import Batch, Objective, unfused
from sharpscope.tree import gaussian

INF = float("inf")
CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()
BLIND = CAUSAL & (torch.arange(5) != 0)  # the first token sees nothing


def made(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numbers(allowed):
    return torch.where(allowed, made(*allowed.shape, seed=9), -INF)


def derivatives(on, shape=(3, 2, 5, 4), keys=5, **how):
    q = made(*shape, seed=1).requires_grad_()
    k, v = (made(*shape[:-2], keys, shape[-1], seed=s).requires_grad_() for s in (2, 3))
    with smooth(on=on), unfused():
        out = F.scaled_dot_product_attention(q, k, v, **how)
    slopes = torch.autograd.grad(out.pow(3).sum(), (q, k, v), create_graph=True)
    along = [made(*slope.shape, seed=s) for s, slope in enumerate(slopes, 4)]
    return out.grad_fn, [out, *slopes, *torch.autograd.grad(slopes, (q, k, v), along)]


def has_closed_form(node):
    return type(node).__name__ == "_AttentionBackward" or any(
        has_closed_form(below) for below, _ in node.next_functions if below is not None
    )


@pytest.mark.parametrize(
    "how",
    [
        {"is_causal": True},
        {"is_causal": True, "keys": 7},
        {"is_causal": True, "shape": (6, 5, 4), "scale": 0.7},
        {"attn_mask": CAUSAL},
        {"attn_mask": numbers(CAUSAL)},
        {"attn_mask": BLIND},
        {"attn_mask": numbers(BLIND)},
        {"attn_mask": made(3, 1, 1, 5) > -0.5},
        {"attn_mask": numbers(made(3, 1, 5, 5) > -0.5)},
    ],
)
def test_masked_attention_is_torchs_with_two_derivatives(how):
    (node, mine), (_, plain) = (derivatives(on, **how) for on in (True, False))
    assert has_closed_form(node)
    for m, p in zip(mine, plain, strict=True):
        assert m.isfinite().all()
        torch.testing.assert_close(m, p, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("how", [{"attn_mask": made(5, 5).requires_grad_()}, {"attn_mask": made(5, 5).float()}])
def test_other_masks_are_left_to_torch(how):
    (node, mine), (_, plain) = (derivatives(on, **how) for on in (True, False))
    assert not has_closed_form(node)
    for m, p in zip(mine, plain, strict=True):
        torch.testing.assert_close(m, p, rtol=0, atol=0)


@pytest.mark.parametrize(
    "how",
    [
        {"attn_mask": CAUSAL, "is_causal": True},
        {"attn_mask": made(4, 5)},
        {"attn_mask": made(4, 1, 5, 5)},  # more examples than there are
        {"attn_mask": made(2, 3, 2, 5, 5)},
    ],
)
def test_what_torch_refuses_torch_refuses(how):
    said = []
    for on in (True, False):
        with pytest.raises(RuntimeError) as refusal:
            derivatives(on, **how)
        said.append(str(refusal.value))
    assert said[0] == said[1]


class Text(nn.Module):
    """A causal block over words, of which some are padding; positions are learnt, as numbers or as a mask."""

    def __init__(self, learnt):
        super().__init__()
        self.words, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 3)
        self.places = nn.Parameter(torch.randn(5, 5) if learnt else torch.randn(5, 8))
        self.learnt = learnt

    def forward(self, words):
        x = self.words(words) + (0 if self.learnt else self.places)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        mask = self.places if self.learnt else CAUSAL & (words != 0)[:, None, None]
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        h = F.scaled_dot_product_attention(q, h, v, is_causal=True)
        return self.head(x + h.transpose(1, 2).flatten(2)).mean(1)


@pytest.mark.parametrize("learnt", [False, True])
def test_groups_of_examples_with_masks_of_their_own(learnt, monkeypatch):
    monkeypatch.setattr(groups, "BUSY", 0)
    torch.manual_seed(0)
    net = network(Text(learnt).double().eval(), "net")
    batch = Batch(torch.randint(0, 11, (32, 5)), torch.arange(32) % 3)
    objective, names = Objective(net.forward, cross_entropy, (batch,)), list(net.parameters)
    point = Point(objective, net.parameters, names)
    assert point.grouping.of(batch) == 4
    assert point._place.route.fused
    v = gaussian(point.gradient, "v")
    plain = plain_graph(objective, net.parameters, names)
    torch.testing.assert_close(point.gradient, plain.gradient, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(point.product(v), plain.product(names, v), rtol=1e-9, atol=1e-12)
