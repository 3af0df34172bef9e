"""Tiny CLIPs saved in real formats, and folders of tiny images that they can be run on."""

from __future__ import annotations

import contextlib
import io
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

SIDE = 16
COLORS = {"blue": (40, 40, 220), "green": (40, 200, 40), "red": (220, 40, 40)}


def tokenizer() -> Any:
    """Every lower-case letter, digit and common mark is a token: a CLIPTokenizer without merges."""
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase + string.digits + ".,'-"
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=40)


def network(seed: int = 0, *, width: int = 16, blocks: int = 2, **vision: Any) -> Any:
    """A CLIPModel of random weights that are the same for the same seed."""
    from transformers import CLIPConfig, CLIPModel

    words = tokenizer()
    tokens = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": 1}
    shared = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 2, "projection_dim": 8}
    text = {"vocab_size": len(words), "max_position_embeddings": 40, "num_hidden_layers": 1}
    image = {"image_size": SIDE, "patch_size": 8, "num_hidden_layers": blocks}
    torch.manual_seed(seed)
    model = CLIPModel(
        CLIPConfig(text_config=shared | text | tokens, vision_config=shared | image | vision, projection_dim=8)
    ).eval()
    with torch.no_grad():  # the initial weights are so small that every image would look the same
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model


def save(folder: Path, model: Any, *, mean: Sequence[float] = (0.5, 0.5, 0.5), words: bool = True) -> Path:
    """Write model, tokenizer and preprocessor as transformers does; return the folder."""
    from transformers import CLIPImageProcessorPil

    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        model.save_pretrained(folder)
    sides = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=sides, image_mean=list(mean), image_std=[0.25, 0.25, 0.25]
    ).save_pretrained(folder)
    if words:
        tokenizer().save_pretrained(folder)
    return folder


def moved(model: Any, by: float = 0.02, seed: int = 1) -> Any:
    """The same CLIP with its image tower moved by noise, as a fine-tuned self."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("vision_model"):
                parameter += by * torch.randn(parameter.shape, generator=generator)
    return model


def pair(root: Path) -> tuple[Path, Path]:
    """A zero-shot CLIP and its fine-tuned self under the root."""
    return save(root / "base", network()), save(root / "tuned", moved(network()))


def images(root: Path, classes: Sequence[str] = tuple(COLORS), each: int = 4, size: int = 20, seed: int = 0) -> Path:
    """Noisy squares of a colour, ``each`` per class, as PNGs in class folders under the root."""
    generator = np.random.default_rng(seed)
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        color = np.array(COLORS.get(name, (128, 128, 128)))
        for i in range(each):
            pixels = np.clip(color + generator.normal(0, 40, (size, size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:04d}.png")
    return root
