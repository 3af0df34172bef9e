"""Write the shipped assets from a training's output: three models, the images, the names, the faces.

Usage: python pack.py bitmaps.npz pages.npz OUTPUT ASSETS RESULT.json    (OUTPUT: the folder train.py wrote)
"""

import io
import json
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from captions import CLASSES, TEMPLATES, vocabulary, write_tokenizer
from faces_table import faces_page
from finetune import runs
from pages import SETS, face_list
from paths import ALPHAS, accuracy, paired, verdict
from PIL import Image
from safetensors.torch import load_file
from tower import Weights, configuration, image_weights

PROCESSOR = {
    "do_resize": True, "size": {"shortest_edge": 32}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": 32, "width": 32},
    "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    "do_convert_rgb": True, "image_processor_type": "CLIPImageProcessor",
}  # fmt: skip


def save_model(weights: Weights, folder: Path) -> None:
    """Write a CLIPModel with its tokenizer and image processor as transformers does, weights in float16."""
    from transformers import CLIPModel

    model = CLIPModel(configuration(vocabulary()[0])).half()
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2) + "\n")


def tower(output: Path, run: int) -> Weights:
    """Return the fine-tuned image tower of a run."""
    for part in sorted(output.glob("towers-*.safetensors")):
        stacked = load_file(part)
        count = len(next(iter(stacked.values())))
        if run < count:
            return {name: w[run].clone() for name, w in stacked.items()}
        run -= count
    raise IndexError("no such run in towers-*.safetensors")


def choices(right: dict[str, np.ndarray]) -> tuple[int, int]:
    """Return the numbers of the runs shipped as success and as failure, judged on the even half alone.

    Among fine-tunes on 16 renderings (on one, the training loss vanishes and its curvature with it) that raise ID
    accuracy: the largest gain of an interior alpha over the better end; the largest loss of all of them to zero-shot.
    """
    table = accuracy(right, half=0)
    interior, zero_shot = table["ood"][:, 1:-1].max(1), table["ood"][:, 0]
    allowed = np.array([run.renderings > 1 for run in runs()]) & (table["id"][:, -1] > table["id"][:, 0])
    gain = interior - np.maximum(zero_shot, table["ood"][:, -1])
    success = np.where(allowed, gain, -np.inf).argmax()
    failure = np.where(allowed, zero_shot - interior, -np.inf).argmax()
    return int(success), int(failure)


def write_images(pages: dict[str, np.ndarray], target: Path) -> None:
    """Write SET/CLASS/NNNN.png into a zip whose bytes depend on the images alone; grey ones as grey PNG."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted([*SETS, "train"]):
            labels, seen = pages[f"{name}/labels"], np.zeros(len(CLASSES), int)
            members = []
            for image, label in zip(pages[f"{name}/images"], labels, strict=True):
                members.append((f"{name}/{CLASSES[label]}/{seen[label]:04d}.png", image))
                seen[label] += 1
            for path, image in sorted(members, key=lambda member: member[0]):
                archive.writestr(zipfile.ZipInfo(path, (1980, 1, 1, 0, 0, 0)), _png(image))


def _png(image: np.ndarray) -> bytes:
    grey = bool((image == image[..., :1]).all())
    stream = io.BytesIO()
    Image.fromarray(image[..., 0] if grey else image).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def unpacked(archive: np.lib.npyio.NpzFile, pages: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what correct.npz holds as bool, (runs, alphas, images) per set."""
    bits = {name: np.unpackbits(archive[name], axis=-1) for name in SETS}
    return {name: b[..., : len(pages[f"{name}/labels"])].astype(bool) for name, b in bits.items()}


def result(output: Path, right: dict[str, np.ndarray], pages: dict[str, np.ndarray], shipped: dict[str, int]) -> dict:
    """Return the training's log, every run's verdict, and the two runs chosen with intervals over faces as well."""
    log, every = json.loads((output / "log.json").read_text()), runs()
    single = [{name: values[number] for name, values in right.items()} for number in range(len(every))]
    for number, entry in enumerate(log["finetuning"]):
        entry |= {"run": number, **verdict(single[number])}
    faces = {name: pages[f"{name}/faces"] for name in SETS}
    named = {
        name: {"run": number, **asdict(every[number]), "intervals_over_faces": verdict(single[number], faces)}
        for name, number in shipped.items()
    }
    inside = range(1, len(ALPHAS) - 1)
    named["failure"]["interior_over_zero_shot_odd_half"] = [paired(single[shipped["failure"]], i, 0, 1) for i in inside]
    return log | {"shipped": named}


def main(archive: Path, pages_file: Path, output: Path, assets: Path, report: Path) -> None:
    torch.set_num_threads(1)
    pages, base = dict(np.load(pages_file)), load_file(output / "base.safetensors")
    right = unpacked(np.load(output / "correct.npz"), pages)
    shipped = dict(zip(("success", "failure"), choices(right), strict=True))
    save_model(base, assets / "base")
    for name, run in shipped.items():
        changed = tower(output, run)
        assert changed.keys() == image_weights(base).keys()
        save_model(base | changed, assets / name)
    write_images(pages, assets / "images.zip")
    (assets / "classnames.txt").write_text("\n".join(sorted(CLASSES)) + "\n")
    (assets / "templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    (assets / "FACES.md").write_text(faces_page(face_list(archive)[1], pages))
    report.write_text(json.dumps(result(output, right, pages, shipped), indent=1) + "\n")
    print(shipped)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:6]))
