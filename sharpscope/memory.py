"""Vectors handed from one alpha to the next as starting guesses, on disk beside the cells so that resume is exact."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sharpscope.ranks import ALONE, Ranks
from sharpscope.storage import writing
from sharpscope.tree import Tree, axpy

_SEPARATOR = "::"  # safetensors is flat: "lambda_max/visual.proj::visual_projection.weight"


class Memory:
    """What was learned at each alpha, by its index; in a folder if one is given.

    A file is complete before the cells that were computed with it are, and the two before it are kept: a scan
    killed anywhere resumes with the guesses it would have had.

    Parameters
    ----------
    folder
        Of the scan, None: in memory only.
    ranks
        Processes that find the same; one of them reads and writes.
    """

    def __init__(self, folder: Path | None, ranks: Ranks = ALONE) -> None:
        self.folder = folder
        self._ranks = ranks
        self._latest: dict[int, dict[str, Tree]] = {}

    def _path(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"memory-{index:04d}.safetensors"

    def before(self, index: int, device: str, stride: float = 0.0) -> dict[str, Tree]:
        """Return what the point before ``index`` left, or nothing; with a stride, as it would have gone on.

        That is the last vector plus stride times its difference to the one before, where there are both.
        """
        last = self._at(index - 1, device)
        earlier = self._at(index - 2, device) if stride and last else {}
        return {
            key: axpy(stride, axpy(-1.0, earlier[key], tree), tree) if key in earlier else tree
            for key, tree in last.items()
        }

    def _at(self, index: int, device: str) -> dict[str, Tree]:
        if index in self._latest:
            return dict(self._latest[index])
        found: dict[str, Tree] = {}
        for key, tensor in self._ranks.led(lambda: self._stored(index)).items():
            measure, _, name = key.partition(_SEPARATOR)
            found.setdefault(measure, {})[name] = tensor.to(device)
        return found

    def _stored(self, index: int) -> Tree:
        if self.folder is None or not self._path(index).exists():
            return {}
        return load_file(self._path(index))

    def keep(self, index: int, found: dict[str, Tree]) -> None:
        """Remember what the point at ``index`` found; forget those before but for two."""
        self._latest.pop(index - 3, None)
        self._latest[index] = found
        if self.folder is None or not found or not self._ranks.leads:
            return
        flat = {f"{m}{_SEPARATOR}{n}": t.contiguous() for m, tree in found.items() for n, t in tree.items()}
        with writing(self._path(index)):
            _write(flat, self._path(index))
            self._path(index - 3).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove the files of a scan that has ended or is begun anew."""
        for path in self.folder.glob("memory-*") if self.folder and self._ranks.leads else ():
            path.unlink()


def _write(flat: Tree, path: Path) -> None:
    """Write the file, on disk before this returns, or nothing."""
    beside = path.with_suffix(".part")
    try:
        save_file(flat, beside)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except SafetensorError as error:  # a full disk among others
        raise OSError(str(error)) from error
    finally:
        beside.unlink(missing_ok=True)
