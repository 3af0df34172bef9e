"""Small results with known correctness, for tests of the gate."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sharpscope.result import ScanResult
from sharpscope.table import Cell, Row, cell_key


def evaluated(correct: Mapping[tuple[float, str], np.ndarray], losses: Mapping | None = None) -> ScanResult:
    """Return a result with these images right or wrong by alpha and split; ``id`` is the ID set, no sharpness."""
    cells = []
    for (alpha, split), right in correct.items():
        loss = np.where(right, 0.5, 2.0) if losses is None else losses[alpha, split]
        arrays = {"correct": right, "confidence": np.full(len(right), 0.75), "loss": loss}
        rows = [Row(alpha, "model", split, "accuracy", float(right.mean()), 0.01, len(right), True)]
        cells.append(Cell(cell_key(alpha, split, "evaluation"), tuple(rows), arrays))
    splits = {split: {"role": "id" if split == "id" else "ood"} for split in dict.fromkeys(s for _, s in correct)}
    alphas = sorted({alpha for alpha, _ in correct})
    return ScanResult(cells, {"splits": splits, "measures": {}, "alphas": alphas, "layers": {}, "seed": 0, "plan": {}})


def pair(gained: int, lost: int, both: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Return correctness of two models that are alone right so often, both right, both wrong."""
    counts = (gained, lost, both, neither)
    return np.repeat([True, False, True, False], counts), np.repeat([False, True, True, False], counts)
