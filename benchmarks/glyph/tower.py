"""The two towers of a CLIP as pure functions of named weights.

The names are those of transformers' CLIPModel, so its state dict is the input; the arithmetic equals its forward
pass (checked in pack.py). Pure functions run under `torch.vmap`: many fine-tunes, or many points of a path, at once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
HEADS, LAYERS_VISION, LAYERS_TEXT, PATCH, WIDTH = 2, 6, 2, 8, 64
IMAGE_PARTS = ("vision_model.", "visual_projection.")


def configuration(vocabulary: dict[str, int]) -> "CLIPConfig":  # noqa: F821
    """Return the CLIPConfig of the pair: 0.4 million weights."""
    from transformers import CLIPConfig

    begin, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    shared = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": HEADS,
        "projection_dim": WIDTH,
    }
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 32, "num_hidden_layers": LAYERS_TEXT}
    tokens = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": end}
    vision = {"image_size": 32, "patch_size": PATCH, "num_hidden_layers": LAYERS_VISION}
    return CLIPConfig(text_config=shared | text | tokens, vision_config=shared | vision, projection_dim=WIDTH, **tokens)


def image_weights(weights: Weights) -> Weights:
    """Return the weights of the image tower, its projection included."""
    return {name: w for name, w in weights.items() if name.startswith(IMAGE_PARTS)}


def encoded_images(weights: Weights, pixels: Tensor) -> Tensor:
    """Return unit image embeddings (batch, 64) of pixels (batch, 3, 32, 32)."""
    stem = "vision_model.embeddings."
    batch, side = len(pixels), pixels.shape[-1] // PATCH
    patches = pixels.view(batch, 3, side, PATCH, side, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(batch, side * side, -1)
    tokens = patches @ weights[stem + "patch_embedding.weight"].flatten(1).T
    first = weights[stem + "class_embedding"].expand(batch, 1, WIDTH)
    x = torch.cat([first, tokens], 1) + weights[stem + "position_embedding.weight"]
    x = _norm(weights, "vision_model.pre_layrnorm", x)
    for layer in range(LAYERS_VISION):
        x = _block(weights, f"vision_model.encoder.layers.{layer}.", x, None)
    x = _norm(weights, "vision_model.post_layernorm", x[:, 0])
    return F.normalize(x @ weights["visual_projection.weight"].T, dim=-1)


def encoded_texts(weights: Weights, ids: Tensor) -> Tensor:
    """Return unit text embeddings (batch, 64) of token ids (batch, length), read off the first end token."""
    length, end = ids.shape[1], weights["text_model.embeddings.token_embedding.weight"].shape[0] - 1
    # As a product: the backward pass of an embedding lookup may synchronise, which a CUDA graph forbids.
    chosen = (ids[..., None] == torch.arange(end + 1, device=ids.device)).float()
    x = chosen @ weights["text_model.embeddings.token_embedding.weight"]
    x = x + weights["text_model.embeddings.position_embedding.weight"][:length]
    causal = torch.full((length, length), float("-inf"), device=ids.device).triu(1)
    for layer in range(LAYERS_TEXT):
        x = _block(weights, f"text_model.encoder.layers.{layer}.", x, causal)
    x = _norm(weights, "text_model.final_layer_norm", x)
    last = (ids == end).long().argmax(1)
    x = x.gather(1, last[:, None, None].expand(-1, 1, WIDTH))[:, 0]
    return F.normalize(x @ weights["text_projection.weight"].T, dim=-1)


def _norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,), weights[name + ".weight"], weights[name + ".bias"], 1e-5)


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[name + ".weight"].T + weights[name + ".bias"]


def _block(weights: Weights, name: str, x: Tensor, mask: Tensor | None) -> Tensor:
    """Return a pre-norm transformer block's output, (batch, tokens, 64)."""
    x = x + _attention(weights, name + "self_attn.", _norm(weights, name + "layer_norm1", x), mask)
    hidden = _linear(weights, name + "mlp.fc1", _norm(weights, name + "layer_norm2", x))
    return x + _linear(weights, name + "mlp.fc2", hidden * torch.sigmoid(1.702 * hidden))  # quick GELU


def _attention(weights: Weights, name: str, x: Tensor, mask: Tensor | None) -> Tensor:
    """Return multi-head attention written out: seventeen tokens gain nothing from a fused kernel."""
    batch, tokens, _ = x.shape
    query, key, value = (
        _linear(weights, f"{name}{part}_proj", x).view(batch, tokens, HEADS, -1).transpose(1, 2) for part in "qkv"
    )
    scores = query @ key.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5
    scores = scores if mask is None else scores + mask
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, tokens, WIDTH)
    return _linear(weights, name + "out_proj", mixed)
