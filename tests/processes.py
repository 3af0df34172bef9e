"""Work done in several processes of one gloo group."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sharpscope.journal import encode


def child(rank: int, size: int, work: Mapping[str, Callable[[Path], Any]], names: Sequence[str], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if size > 1:
        store = f"file://{folder}/store-{'-'.join(names)}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    for name in names:
        try:
            found = work[name](folder)
            if found is not None:
                (folder / f"{name}-{rank}.jsonl").write_text("\n".join(map(encode, found.cells)))
        except Exception as error:
            (folder / f"{name}-{rank}.error").write_text(f"{error!r}\n{traceback.format_exc()}")
    if size > 1:
        # What there is to say is in files. Now and then gloo's threads end with an abort, at the interpreter's end and
        # in destroy_process_group alike.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def run(work: Mapping[str, Callable[[Path], Any]], size: int, names: Sequence[str], folder: Path) -> list[int | None]:
    """Do the work in so many processes, a single one being this; return their exit codes."""
    if size == 1:
        child(0, 1, work, names, folder)
        return [0]
    spawn = mp.get_context("spawn")
    processes = [spawn.Process(target=child, args=(rank, size, work, names, folder)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(150)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes
