"""A synthetic scan with planted truth, for everything that reads results."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sharpscope.recipe import CONVENTION
from sharpscope.result import ScanResult
from sharpscope.stragglers.recipes import recipe_key
from sharpscope.stragglers.standing import NECESSARY, SUFFICIENT, Base, moved_key
from sharpscope.table import Array, Cell, Row, cell_key

LAYERS = (
    "visual.embed",
    *(f"visual.block.{i:02d}" for i in range(4)),
    "visual.norm",
    "visual.proj",
    "head",
)
STRAGGLER = "visual.block.02"  # its sharpness is exp(a + b * OOD error)
NOISY = "visual.norm"  # relative s.e. 80 % and sometimes negative
SINGLE = "head"  # one probe at alpha 0: its standard error is unknown
UNCONVERGED = "visual.block.01"  # Lanczos stops early
UNUSED = "text.block.00"
HOSTILE = "<b>&\"' </script> sketch"
ALPHAS = tuple(round(i / 10, 1) for i in range(11))
OOD = (HOSTILE, "scans", "small-caps")
MEASURES = {
    "trace": {"draws": 20, "target": 0.1},
    "lambda_max": {"steps": 12, "tolerance": 0.01},
    "m_sharpness": {"rho": 0.05, "m": 16, "adaptive": True},
    "m_sharpness_average": {"rho": 0.05, "m": 16, "noise": "normal"},
}
SCALE = {"trace": 40.0, "lambda_max": 2.0, "m_sharpness": 0.08, "m_sharpness_average": 0.01}


def true_accuracy(alpha: float, split: str, failure: bool = False) -> float:
    """ID rises and levels off; OOD peaks at 0.4, or falls from the start when interpolation is planted to fail."""
    if split == "id":
        return 0.58 + 0.32 * (1 - (1 - alpha) ** 2)
    shift = (-0.1, 0.02, 0.05)[OOD.index(split)]
    return 0.55 + shift - (0.2 * alpha if failure else 0.5 * (alpha - 0.4) ** 2 - 0.08)


def _evaluation(alpha: float, split: str, n: int, failure: bool) -> Cell:
    generator = np.random.default_rng([n, len(split)])  # the same images at every alpha: paired
    luck = generator.permutation((np.arange(n) + 0.5) / n)
    share = true_accuracy(alpha, split, failure)
    correct = luck < share
    loss = 1.4 * (1.05 - share) * generator.gamma(2.0, 0.5, n)
    arrays = {"correct": correct, "confidence": np.clip(1 - luck * 0.5, 0, 1), "loss": loss}
    rows = []
    for measure, values in (("accuracy", correct), ("loss", loss), ("confidence", arrays["confidence"])):
        value, stderr = float(values.mean()), float(values.std() / math.sqrt(n))
        rows.append(Row(alpha, "model", split, measure, value, stderr, n, True))
    return Cell(cell_key(alpha, split, "evaluation"), tuple(rows), arrays)


def true_sharpness(alpha: float, layer: str, error: float) -> float:
    """In units of the measure's scale: the straggler follows the OOD error, the others rise or fall on their own."""
    depth = LAYERS.index(layer)
    if layer == STRAGGLER:
        return math.exp(6 * (error - 0.4))
    if layer == NOISY:
        return 1e-4 * math.cos(3 * alpha)
    return 0.3 * (1 + depth) * math.exp((-1) ** depth * 0.8 * alpha)


def _samples(measure: str, layer: str, alpha: float, value: float) -> Array:
    generator = np.random.default_rng([LAYERS.index(layer), len(measure)])
    if measure == "lambda_max":
        slow = layer == UNCONVERGED
        value = value if value > 1e-3 else 1e-3 - value  # an eigenvalue above zero for the noisy layer too
        return value * (1 - np.exp(-(0.2 if slow else 0.5 + 0.2 * alpha) * np.arange(1, 7 if slow else 13)))
    draws = 1 if layer == SINGLE and alpha == 0 else 60 if layer == NOISY else 20
    spread = 0.8 * math.sqrt(draws) if layer == NOISY else 0.2 * (1 + 0.3 * alpha)
    noise = generator.standard_normal(draws)
    return value + spread * abs(value) * (noise - (noise.mean() if draws > 1 else 0))  # the mean is the planted truth


def _curvature(alpha: float, measure: str, error: float, layers: Sequence[str], converged: bool) -> Cell:
    rows, arrays = [], {}
    for layer in layers:
        samples = _samples(measure, layer, alpha, SCALE[measure] * true_sharpness(alpha, layer, error))
        ritz = measure == "lambda_max"
        value = float(samples[-1] if ritz else samples.mean())
        stderr = float(samples.std(ddof=1) / math.sqrt(len(samples))) if len(samples) > 1 else math.inf
        stderr = abs(float(samples[-1] - samples[-2])) if ritz else stderr
        fine = converged and not (ritz and layer == UNCONVERGED) and (ritz or layer != NOISY)
        rows.append(Row(alpha, layer, "id", measure, value, stderr, len(samples), fine))
        arrays[layer] = samples
    return Cell(cell_key(alpha, "id", measure), tuple(rows), arrays)


def _meta(alphas: Sequence[float], ood: Sequence[str], n: int) -> dict[str, object]:
    facts = {"n": n, "classes": None, "fingerprint": "9f2c"}
    sizes = {name: 1000 * (3 + i % 4) for i, name in enumerate([*LAYERS, UNUSED])}
    layers = {
        name: {"tensors": [f"{name}.weight"], "size": size, "delta_norm": 0.1 * (1 + i), "start_norm": 12.0 - i}
        for i, (name, size) in enumerate(sizes.items())
    }
    return {
        "sharpscope": "0.1.0",
        "alpha_convention": CONVENTION,
        "alphas": list(alphas),
        "measures": MEASURES,
        "seed": 0,
        "splits": {
            "id": {"role": "id", **facts, "classes": ["a", "b"], "measured": 128},
            **{name: {"role": "ood", **facts} for name in ood},
        },
        "layers": layers,
        "unused": [UNUSED],
        "models": {"zero_shot": {"name": "runs/zs", "hash": "ab12"}, "fine_tuned": {"name": "runs/ft", "hash": "cd34"}},
        "provenance": {"torch": "2.13", "numpy": "2.4", "device": "cpu", "threads": 2, "tf32": None},
        "cost": {"seconds": 312.4, "gradients": 660},
        "warnings": ["scans: 3 images could not be read <i>"],
        "plan": {},
    }


def planted(
    alphas: Sequence[float] = ALPHAS,
    ood: Sequence[str] = OOD,
    *,
    n: int = 500,
    failure: bool = False,
    converged: bool = True,
    measures: Sequence[str] = tuple(MEASURES),
    unmeasured: Sequence[tuple[float, str]] = ((0.5, "visual.embed"),),
    studied: bool = False,
) -> ScanResult:
    """Return the scan; ``unmeasured`` (alpha, layer) have no curvature, ``studied`` adds moves and recipes."""
    cells = []
    for alpha in alphas:
        evaluations = [_evaluation(alpha, split, n, failure) for split in ("id", *ood)]
        errors = [1 - cell.rows[0].value for cell in evaluations[1:]]
        error = float(np.mean(errors)) if errors else 0.4
        layers = [name for name in LAYERS if (alpha, name) not in unmeasured]
        cells += evaluations
        cells += [_curvature(alpha, measure, error, layers, converged) for measure in measures]
    meta = {**_meta(alphas, ood, n), "measures": {name: MEASURES[name] for name in measures}}
    if studied:
        cells += [*_moves(ood, n), *_recipes(ood, n)]
        meta |= {"interventions": {"limit": None, "draws": DRAWS, "bases": BASES}, "recipes": {"trials": TRIALS}}
    return ScanResult(cells, meta)


DRAWS = 39
BASES = [[NECESSARY, 1.0], [SUFFICIENT, 0.0]]
GAIN = 0.08  # of OOD accuracy: what the straggler back at zero-shot gives, and costs when it alone is fine-tuned
RECIPE_GAIN = 0.05  # of the planted recipe over uniform alpha 0.4, on every set
TRIALS = [
    {"name": "straggler at 0.1", "kind": "per-layer", "rules": [[STRAGGLER, 0.1], ["*", 0.4]], "key": "a"},
    {"name": "LiNeS 0 to 1", "kind": "LiNeS", "rules": [["visual.*", 0.2], ["*", 0.9]], "key": "b"},
]


def _answers(share: float, split: str, n: int) -> Cell:
    luck = np.random.default_rng([n, len(split)]).permutation((np.arange(n) + 0.5) / n)
    return Cell(split, (), {"correct": luck < share})


def _moves(ood: Sequence[str], n: int) -> list[Cell]:
    cells = []
    for base in (Base(str(question), float(alpha)) for question, alpha in BASES):
        sign = 1 if base.question == NECESSARY else -1
        for split in ("id", *ood):
            share = true_accuracy(base.alpha, split)
            layers = [*LAYERS, UNUSED]
            gains = {name: sign * GAIN * (name == STRAGGLER and split != "id") for name in layers}
            tried = {("base", ""): 0.0, **{("layer", name): gain for name, gain in gains.items()}}
            tried |= {(f"control {draw}", name): 0.002 * (draw % 3 - 1) for draw in range(DRAWS) for name in layers}
            for (what, layer), gain in tried.items():
                found = _answers(share + gain, split, n)
                cells.append(Cell(moved_key(base, split, None, what, layer), (), found.arrays))
    return cells


def _recipes(ood: Sequence[str], n: int) -> list[Cell]:
    gains = {"a": RECIPE_GAIN, "b": -0.03}
    return [
        Cell(recipe_key(split, key), (), _answers(true_accuracy(0.4, split) + gain, split, n).arrays)
        for key, gain in gains.items()
        for split in ("id", *ood)
    ]
