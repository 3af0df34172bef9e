"""Measure both shipped pairs through transformers, from the shipped files alone; write expected.json beside them.

Usage: python measure.py ASSETS
"""

import json
import platform
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from pages import SETS
from paths import ALPHAS, Right, accuracy, verdict
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel


def prompts(assets: Path) -> tuple[list[str], list[str]]:
    """Return the class names and the templates."""
    return (assets / "classnames.txt").read_text().split(), (assets / "templates.txt").read_text().splitlines()


def test_images(assets: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield each set's name, its pixels (n, 3, 32, 32) as the image processor makes them, and its labels (n,)."""
    classes, _ = prompts(assets)
    processor = AutoImageProcessor.from_pretrained(assets / "base")
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(assets / "images.zip") as archive:
            archive.extractall(folder)
        for name in SETS:
            files = sorted(Path(folder, name).glob("*/*.png"), key=lambda p: (classes.index(p.parent.name), p.name))
            pages = [Image.open(p).convert("RGB") for p in files]
            labels = torch.tensor([classes.index(p.parent.name) for p in files])
            yield name, processor(pages, return_tensors="pt")["pixel_values"], labels


@torch.no_grad()
def zero_shot_head(model: CLIPModel, assets: Path) -> Tensor:
    """Return (classes, 64): logit scale x unit mean over templates of unit text embeddings."""
    classes, templates = prompts(assets)
    tokenizer = AutoTokenizer.from_pretrained(assets / "base")
    rows = []
    for name in classes:
        ids = tokenizer([t.format(name) for t in templates], padding=True, return_tensors="pt")
        embedded = torch.nn.functional.normalize(model.get_text_features(**ids).pooler_output, dim=-1).mean(0)
        rows.append(embedded / embedded.norm())
    return model.logit_scale.exp() * torch.stack(rows)


@torch.no_grad()
def path_correctness(assets: Path, pair: str, sets: list[tuple[str, Tensor, Tensor]]) -> Right:
    """Return which images each point of a pair's path gets right, set -> (alphas, images)."""
    model = CLIPModel.from_pretrained(assets / "base", dtype=torch.float32).eval()
    head, start = zero_shot_head(model, assets), {n: w.clone() for n, w in model.state_dict().items()}
    end = CLIPModel.from_pretrained(assets / pair, dtype=torch.float32).state_dict()
    right: dict[str, list[np.ndarray]] = {name: [] for name, _, _ in sets}
    for alpha in ALPHAS:
        model.load_state_dict({n: torch.lerp(w, end[n], alpha) for n, w in start.items()})
        for name, pixels, labels in sets:
            features = model.get_image_features(pixel_values=pixels).pooler_output
            logits = torch.nn.functional.normalize(features, dim=-1) @ head.T
            right[name].append((logits.argmax(-1) == labels).numpy())
    return {name: np.stack(values) for name, values in right.items()}


def main(assets: Path) -> None:
    torch.set_num_threads(1)
    sets, expected = list(test_images(assets)), {}
    for pair in ("success", "failure"):
        right = path_correctness(assets, pair, sets)
        table = {name: np.round(values, 3).tolist() for name, values in accuracy(right).items()}
        expected[pair] = {"accuracy": table, **verdict(right)}
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    counts = {name: len(labels) for name, _, labels in sets}
    what = "per cent right among all 36 classes at each alpha; ood: mean of the sets but id; [points, 95 % half-width]"
    report = {"what": what, "alphas": ALPHAS, "images": counts, "versions": versions, **expected}
    (assets / "expected.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(expected, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
