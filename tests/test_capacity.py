"""What memory there is, and what of it is free: of the machine, and of a container that has less."""

import os
from types import SimpleNamespace

import psutil
import pytest
import torch

import sharpscope as ss
from sharpscope import capacity
from sharpscope.capacity import free_bytes, total_bytes

CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A machine of 64 GiB, 50 of them free, and a folder for its control groups."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=50 * GIB))
    monkeypatch.setattr(capacity, "_SELF", tmp_path / "self")
    monkeypatch.setattr(capacity, "_GROUPS", tmp_path / "groups")
    return tmp_path


def limit(folder, files, most, used, cached):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(files[:2], (most, used), strict=True):
        (folder / name).write_text(f"{text}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{files[2]} {cached}\n")


def test_a_machine_has_what_the_system_says(groups):
    assert (total_bytes(CPU), free_bytes(CPU)) == (64 * GIB, 50 * GIB)


@pytest.mark.parametrize(("files", "line", "root"), [(0, "0::/a/b", ""), (1, "4:memory:/a/b", "memory")])
@pytest.mark.parametrize("place", ["a/b", "a", ""])
def test_a_container_has_no_more_than_its_limit(groups, files, line, root, place):
    (groups / "self").write_text(f"3:cpuset:/\n{line}\n")
    limit(groups / "groups" / root / place, capacity._FILES[files], 8 * GIB, 5 * GIB, 2 * GIB)
    assert (total_bytes(CPU), free_bytes(CPU)) == (8 * GIB, 5 * GIB)


def test_the_least_of_all_limits_counts(groups):
    (groups / "self").write_text("0::/a\n")
    limit(groups / "groups" / "a", capacity._FILES[0], 8 * GIB, 1 * GIB, 0)
    limit(groups / "groups", capacity._FILES[0], 16 * GIB, 14 * GIB, 0)
    assert (total_bytes(CPU), free_bytes(CPU)) == (8 * GIB, 2 * GIB)
    limit(groups / "groups", capacity._FILES[0], 16 * GIB, 17 * GIB, 0)  # just before something is killed
    assert free_bytes(CPU) == 0


@pytest.mark.parametrize("most", ["max", 2**63 - 4096])
def test_a_group_without_a_limit_changes_nothing(groups, most):
    (groups / "self").write_text("0::/\n")
    limit(groups / "groups", capacity._FILES[0], most, 5 * GIB, 0)
    assert (total_bytes(CPU), free_bytes(CPU)) == (64 * GIB, 50 * GIB)


def test_of_this_machine_some_is_free():
    assert 2**20 < free_bytes(CPU) <= total_bytes(CPU) <= psutil.virtual_memory().total


def test_a_scan_asks_no_system_for_what_some_have_not(monkeypatch, tmp_path):
    def unknown(name):
        raise ValueError("unrecognized configuration name")  # as macOS says to SC_AVPHYS_PAGES; Windows has no sysconf

    monkeypatch.setattr(os, "sysconf", unknown)
    monkeypatch.setattr(capacity, "_SELF", tmp_path / "none")
    ends = [torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 3)).eval() for _ in "ab"]
    data = [(torch.randn(32, 4), torch.arange(32) % 3)]
    found = ss.scan(*ends, data, alphas=[0, 1], memory=2**40, progress=False)
    assert found.layers["converged"].any()
