"""Vectors handed from one alpha to the next as starting guesses, on disk beside the cells so that resume is exact."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sharpscope.ranks import ALONE, Ranks
from sharpscope.sharding import cut, whole
from sharpscope.storage import writing
from sharpscope.tree import Tree, axpy

# Of what is kept: half the memory, half the time on disk, and Lanczos adds noise of .3 of its norm to a start vector.
KEPT = torch.bfloat16
_SEPARATOR = "::"  # safetensors is flat: "lambda_max/visual.proj::visual_projection.weight"


class Memory:
    """What was learned at each alpha, by its index; in a folder if one is given.

    A file is to be complete before the cells that were computed with it are, see :meth:`settled`, and the two before it
    are kept: a scan killed anywhere resumes with the guesses it would have had.

    Parameters
    ----------
    folder
        Of the scan, None: in memory only.
    ranks
        Processes that find the same; one of them reads and writes.

    Attributes
    ----------
    bound
        What goes on from here at the next alpha, as kinds of cells.
    """

    def __init__(self, folder: Path | None, ranks: Ranks = ALONE) -> None:
        self.folder = folder
        self._ranks = ranks
        self._latest: dict[int, dict[str, Tree]] = {}
        self.bound: set[str] = set()
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def _path(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"memory-{index:04d}.safetensors"

    def before(self, index: int, like: Tree, stride: float = 0.0) -> dict[str, Tree]:
        """Return what the point before ``index`` left, or nothing; with a stride, as it would have gone on.

        That is the last vector plus stride times its difference to the one before, where there are both. Shards and
        device are those of ``like``.
        """
        last = self.at(index - 1, like)
        earlier = self.at(index - 2, like) if stride and last else {}
        return {
            key: axpy(stride, axpy(-1.0, earlier[key], tree), tree) if key in earlier else tree
            for key, tree in last.items()
        }

    def at(self, index: int, like: Tree) -> dict[str, Tree]:
        """Return what the point at ``index`` left so far, or nothing."""
        found: dict[str, Tree] = {}
        for key, tree in self._latest.get(index, {}).items():
            found[key] = {name: tensor.to(like[name].dtype) for name, tensor in tree.items()}
        if found:
            return found
        for key in self._ranks.led(lambda: self._keys(index)):
            measure, _, name = key.partition(_SEPARATOR)
            tensor = self._ranks.led(partial(self._stored, index, key)).to(like[name].device)
            found.setdefault(measure, {})[name] = cut(tensor.to(like[name].dtype), like[name])
        return found

    def _keys(self, index: int) -> list[str]:
        if self.folder is None or not self._path(index).exists():
            return []
        with safe_open(self._path(index), framework="pt") as file:
            return list(file.keys())

    def _stored(self, index: int, key: str) -> Tensor:
        with safe_open(self._path(index), framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    def keep(self, index: int, found: dict[str, Tree], first: int = 0) -> None:
        """Remember what the point at ``index`` found; forget those before but for two, back to ``first``, not beyond.

        Before the first of its chain lie the last points of another, which that one goes on from. The file is written
        while the scan goes on, after the one before it.
        """
        past = index - 3 if index - 3 >= first else -1
        self._latest.pop(past, None)
        kept = {key: {n: t.to(KEPT) for n, t in tree.items()} for key, tree in found.items()}
        self._latest[index] = kept
        self.settled(wait=True)
        if self.folder is None or not found:
            return
        flat = {}
        for measure, tree in kept.items():
            for name, tensor in tree.items():
                entire = whole(tensor)  # in all processes, one tensor at a time
                if self._ranks.leads:
                    flat[f"{measure}{_SEPARATOR}{name}"] = entire.cpu().contiguous()
        if self._ranks.leads:
            self._writing = self._writer.submit(self._replace, flat, self._path(index), self._path(past))

    def settled(self, *, wait: bool = False) -> bool:
        """Return whether what was kept last is on disk.

        Raises
        ------
        OutputError
            If it could not be written.
        """
        if self._writing is not None and not (wait or self._writing.done()):
            return False
        if self._writing is not None:
            self._writing.result()  # where it failed, it raises whenever it is asked
        self._writing = None
        return True

    @staticmethod
    def _replace(flat: Tree, path: Path, past: Path) -> None:
        with writing(path):
            _write(flat, path)
            past.unlink(missing_ok=True)

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
