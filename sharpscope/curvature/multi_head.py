"""The attention of `nn.MultiheadAttention` as calls that have closed forms: what open_clip's and OpenAI's CLIP are of.

torch hands a mode the whole module as one call, in which no mode sees the linear layers and the attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional

Attend = Callable[[Tensor], Tensor]


def self_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _width: int,
    heads: int,
    weight: Tensor | None,
    bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_weight: Tensor,
    out_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    **others: Any,
) -> Attend | None:
    """Return a function of the query, ``(tokens, examples, width)``, that does what torch is asked for.

    None for what is no attention of a sequence to itself, or has padding, added tokens or dropout. The arguments are
    those of ``torch.nn.functional.multi_head_attention_forward``.
    """
    alone = query is key is value and query.dim() == 3
    more = (bias_k, bias_v, key_padding_mask, *(other for other in others.values() if isinstance(other, Tensor)))
    special = need_weights or add_zero_attn or (training and dropout_p) or any(tensor is not None for tensor in more)
    if weight is None or not alone or special or not _one_for_all(attn_mask, len(query), is_causal):
        return None
    mask = None if is_causal else attn_mask  # beside the flag it says the same

    def attend(x: Tensor) -> Tensor:
        # Examples first where they lie so: a linear layer of another order copies them.
        swapped = x.stride(0) < x.stride(1)
        to, back = ((0, 2, 1, 3), (0, 2, 1, 3)) if swapped else ((1, 2, 0, 3), (2, 0, 1, 3))
        rows = functional.linear(x.transpose(0, 1) if swapped else x, weight, bias)
        q, k, v = (part.view(*part.shape[:2], heads, -1).permute(to) for part in rows.chunk(3, -1))
        found = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        out = functional.linear(found.permute(back).flatten(2), out_weight, out_bias)
        return out.transpose(0, 1) if swapped else out

    return attend


def _one_for_all(mask: Tensor | None, tokens: int, is_causal: bool) -> bool:
    """Return whether a mask is none, or one that is added to the scores of all examples alike."""
    if mask is None:
        return not is_causal  # which torch refuses
    return mask.is_floating_point() and mask.shape == (tokens, tokens)
