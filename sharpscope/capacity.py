"""The memory of a device: what there is, and how much of it is free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

_SELF, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Files of a control group, versions 2 and 1: its limit, its use, and what of that is a cache of files.
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class _Memory(NamedTuple):
    total: int
    free: int


def total_bytes(device: torch.device) -> int:
    """Return the memory of the device; for a CPU this machine's, or its container's if that is less."""
    return int(torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else _host().total


def free_bytes(device: torch.device, limit: int | None = None) -> int:
    """Return the free memory of the device (of this machine for a CPU), within what this process may take of it."""
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        taken = torch.cuda.memory_allocated(device)
        cached = torch.cuda.memory_reserved(device) - taken  # given back when asked for
        free, total = torch.cuda.mem_get_info(device)
        allowed = int(total * torch.cuda.get_per_process_memory_fraction(device)) - taken
        return max(min(int(free) + cached, allowed), 0)
    free = _host().free
    return free if limit is None else max(min(free, limit - psutil.Process().memory_info().rss), 0)


def _host() -> _Memory:
    """Return the memory of this machine; a cache of files is free, and a container has no more than its limits."""
    machine = psutil.virtual_memory()
    known = [_Memory(machine.total, machine.available), *_limits()]
    return _Memory(min(memory.total for memory in known), max(min(memory.free for memory in known), 0))


def _limits() -> Iterator[_Memory]:
    """Yield limit and rest of each control group that this process is in; none where there are no such groups."""
    for folder in _folders():
        for limit, use, cache in _FILES:
            with suppress(OSError, ValueError, KeyError):  # no file, or the word "max"
                most = int((folder / limit).read_text())
                counted = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield _Memory(most, most - int((folder / use).read_text()) + int(counted[cache]))


def _folders() -> Iterator[Path]:
    """Yield the folders of this process's control groups and of those around them, as far as they are seen here."""
    try:
        lines = _SELF.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds in ("", "memory"):
            root, own = _GROUPS / kinds, Path(path.lstrip("/"))
            yield from (root / part for part in (own, *own.parents))
