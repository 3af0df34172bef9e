"""`nn.MultiheadAttention` in calls that have closed forms: the same numbers; what is more is left to torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sharpscope.curvature import groups
from sharpscope.curvature import smooth as smooth_module
from sharpscope.curvature.gradient import plain_graph
from sharpscope.curvature.multi_head import self_attention
from sharpscope.curvature.point import Point
from sharpscope.curvature.smooth import smooth
from sharpscope.losses import cross_entropy
from sharpscope.network import network
from sharpscope.objective import Batch, Objective, unfused
from sharpscope.tree import gaussian

TOKENS = 5
CAUSAL = torch.full((TOKENS, TOKENS), float("-inf"), dtype=torch.float64).triu(1)


def module(**how):
    torch.manual_seed(0)
    made = nn.MultiheadAttention(8, 2, **how).double().eval()
    for weights in made.parameters():
        nn.init.normal_(weights, std=0.4)
    return made


def derivatives(made, x, *, on, **asked):
    """Return output, gradients by input and weights, and products of their derivatives with a vector."""
    leaves = [x.requires_grad_(), *made.parameters()]
    with smooth(on=on), unfused():
        out = made(x, x, x, **asked)[0]
    slopes = torch.autograd.grad(out.pow(3).sum(), leaves, create_graph=True)
    along = [gaussian({"": slope}, i)[""] for i, slope in enumerate(slopes)]
    return [out, *slopes, *torch.autograd.grad(slopes, leaves, along)]


def taken(monkeypatch):
    found = []
    monkeypatch.setattr(
        smooth_module, "self_attention", lambda *args, **how: found.append(self_attention(*args, **how)) or found[-1]
    )
    return found


@pytest.mark.parametrize("how", [{}, {"batch_first": True}, {"bias": False}])
@pytest.mark.parametrize(
    "asked", [{}, {"attn_mask": CAUSAL}, {"attn_mask": CAUSAL, "is_causal": True}, {"attn_mask": CAUSAL < 0}]
)
def test_it_is_torchs_attention_with_two_derivatives(how, asked, monkeypatch):
    """A mask of truth values too, which the module turns into numbers."""
    made, found = module(**how), taken(monkeypatch)
    x = torch.randn(*((3, TOKENS) if made.batch_first else (TOKENS, 3)), 8, dtype=torch.float64)
    mine, plain = (derivatives(made, x, on=on, need_weights=False, **asked) for on in (True, False))
    assert len(found) == 1
    assert found[0] is not None
    for m, p in zip(mine, plain, strict=True):
        torch.testing.assert_close(m, p, rtol=1e-10, atol=1e-12)


def test_what_is_plain_has_the_closed_form():
    x = torch.randn(3, TOKENS, 8, dtype=torch.float64, requires_grad=True)
    nodes = set()
    with smooth():
        out = module(batch_first=True)(x, x, x, need_weights=False)[0]
    todo = [out.grad_fn]  # and out kept: in older torch a node of Python's says nothing once its graph is gone
    while todo:
        node = todo.pop()
        nodes.add(type(node).__name__)
        todo += [below for below, _ in node.next_functions if below is not None]
    assert "_AttentionBackward" in nodes


@pytest.mark.parametrize(
    ("how", "asked"),
    [
        ({}, {"need_weights": True}),
        ({}, {"key_padding_mask": torch.arange(3 * TOKENS).view(3, TOKENS) % TOKENS == 4}),
        ({}, {"attn_mask": torch.randn(6, TOKENS, TOKENS, dtype=torch.float64)}),
        ({"add_zero_attn": True}, {}),
        ({"add_bias_kv": True}, {}),
    ],
)
def test_more_than_that_is_left_to_torch(how, asked, monkeypatch):
    made, found = module(**how), taken(monkeypatch)
    x = torch.randn(TOKENS, 3, 8, dtype=torch.float64)
    mine, plain = (derivatives(made, x, on=on, **{"need_weights": False, **asked}) for on in (True, False))
    assert found == [None]
    for m, p in zip(mine, plain, strict=True):
        torch.testing.assert_close(m, p, rtol=1e-10, atol=1e-12)


def test_so_is_attention_to_others_of_one_sequence_and_with_dropout(monkeypatch):
    found = taken(monkeypatch)
    x, other = (torch.randn(TOKENS, 3, 8, dtype=torch.float64) for _ in range(2))
    with smooth():
        module()(x, other, other, need_weights=False)
        module()(x[:, 0], x[:, 0], x[:, 0], need_weights=False)
        module(dropout=0.5).train()(x, x, x, need_weights=False)
        with pytest.raises(RuntimeError, match="Need attn_mask"):
            module()(x, x, x, need_weights=False, is_causal=True)
    assert found == [None] * 4


def test_a_mask_of_truth_values_without_the_module_means_what_it_means_to_torch():
    made, x = module(), torch.randn(TOKENS, 3, 8, dtype=torch.float64)
    given = (x, x, x, 8, 2, made.in_proj_weight, made.in_proj_bias, None, None, False, 0.0)

    def asked():
        out = F.multi_head_attention_forward(
            *given, made.out_proj.weight, made.out_proj.bias, need_weights=False, attn_mask=CAUSAL < 0
        )
        return out[0]

    with smooth():
        mine = asked()
    torch.testing.assert_close(mine, asked())


class Tower(nn.Module):
    """A residual block of open_clip's kind, and a head."""

    def __init__(self):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x):
        h = self.norm(x)
        return self.head(F.gelu(self.up(x + self.attn(h, h, h, need_weights=False)[0])).mean(1))


def test_groups_of_examples_have_it_too(monkeypatch):
    monkeypatch.setattr(groups, "BUSY", 0)
    torch.manual_seed(0)
    net, found = network(Tower().double().eval(), "net"), taken(monkeypatch)
    batch = Batch(torch.randn(32, TOKENS, 8, dtype=torch.float64), torch.arange(32) % 3)
    objective = Objective(net.forward, cross_entropy, (batch,))
    point = Point(objective, net.parameters, list(net.parameters))
    assert point.grouping.of(batch) == 4
    assert found
    assert None not in found
    v = gaussian(point.gradient, "v")
    plain = plain_graph(objective, net.parameters, list(net.parameters)).product(list(v), v)
    torch.testing.assert_close(point.product(v), plain, rtol=1e-9, atol=1e-12)
