"""Claims about the convert command: a pickle runs on request only, and what is written is whole and the same."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import clips
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from sharpscope.cli import app
from sharpscope.errors import ModelError, OutputError, UsageError
from sharpscope.models import load, pair

CLASSES = ("red", "green")


class Canary(torch.nn.Linear):
    """A module whose unpickling leaves a trace."""

    def __reduce__(self):
        return (_trace, (str(TRACE[0]), self.state_dict()))


TRACE = [Path()]


def _trace(file, state):
    Path(file).touch()
    module = torch.nn.Linear(2, 3)
    module.load_state_dict(state)
    return module


def run(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


@pytest.fixture
def canary(tmp_path):
    TRACE[0] = tmp_path / "trace"
    torch.save(Canary(2, 3), tmp_path / "old.pt")
    return tmp_path / "old.pt"


@pytest.fixture
def oldest(tmp_path):
    """A file as pickle itself, or torch before 1.6, writes it."""
    TRACE[0] = tmp_path / "trace"
    (tmp_path / "oldest.pt").write_bytes(pickle.dumps(Canary(2, 3)))
    return tmp_path / "oldest.pt"


@pytest.mark.parametrize("kind", ["canary", "oldest"])
def test_a_pickle_that_would_run_code_does_not_run_it(kind, request, tmp_path):
    file = request.getfixturevalue(kind)
    for attempt in (lambda: load(file), lambda: load(f"hf:{file}")):
        with pytest.raises(ModelError, match=r"is a pickled module, not tensors.*\n  fix: sharpscope convert .*old"):
            attempt()
    done = run(file, "--out", tmp_path / "new.safetensors")
    assert done.exit_code == 3
    assert "--unsafe-pickle --out" in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name]  # no trace, nothing half written


def test_on_request_it_is_unpickled_and_its_tensors_are_written(canary, tmp_path):
    done = run(canary, "--unsafe-pickle", "--out", tmp_path / "new.safetensors")
    assert done.exit_code == 0, done.output
    assert done.output == f"2 tensors: {tmp_path / 'new.safetensors'}\n"
    assert TRACE[0].exists()  # the canary would have told
    assert {n: t.shape for n, t in load_file(tmp_path / "new.safetensors").items()} == {"weight": (3, 2), "bias": (3,)}


def test_the_names_of_open_clip_and_back_are_the_same_bits(tmp_path):
    base = clips.save(tmp_path / "base", clips.network())
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    assert run(base, "--to", "open_clip", "--out", there).exit_code == 0
    assert "visual.transformer.resblocks.0.attn.in_proj_weight" in load_file(there)
    assert run(there, "--to", "transformers", "--out", back).exit_code == 0
    model = load(base)
    start, end, _ = pair(model, load(back), CLASSES)
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), end.parameters(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["nowhere.pt", "--out", "a.safetensors"], "there is no file nowhere.pt"),
        (["here.pt", "--out", ""], "--out . names no file"),
        (["here.pt", "--out", "a.pt"], "--out a.pt is no .safetensors file"),
        (["here.pt", "--out", "there.safetensors"], "there.safetensors exists"),
        (["here.pt", "--out", "a.safetensors", "--to", "jax"], "--to jax is no library"),
    ],
)
def test_what_cannot_be_meant_is_said(arguments, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("here.pt", "there.safetensors"):
        Path(name).touch()
    done = run(*arguments)
    assert done.exit_code == UsageError.exit_code
    assert problem in done.output
    assert not Path("a.safetensors").exists()


LIMITED = """
import resource, sys
from sharpscope.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
sys.argv = ["sharpscope", "convert", *sys.argv[1:]]
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit")
def test_a_disk_that_is_full_is_said_and_leaves_nothing(tmp_path):
    """The limit on the size of a file is the disk that is full."""
    torch.save({"a": torch.zeros(100, 100)}, tmp_path / "a.pt")
    words = [sys.executable, "-c", LIMITED, tmp_path / "a.pt", "--out", tmp_path / "new.safetensors"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == OutputError.exit_code
    assert "new.safetensors cannot be written: " in done.stderr
    assert "fix: make room, or choose another --out" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("out", ["/proc/new.safetensors", "a.pt/new.safetensors"])
def test_a_place_that_cannot_be_written_is_said(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.zeros(3)}, "a.pt")
    done = run("a.pt", "--out", out)
    assert done.exit_code == OutputError.exit_code
    assert f"error: {out} cannot be written: " in done.output
    assert "fix: make room, or choose another --out" in done.output


def test_a_folder_is_not_unpickled(tmp_path):
    done = run(tmp_path, "--unsafe-pickle", "--out", tmp_path / "new.safetensors")
    assert done.exit_code == UsageError.exit_code
    assert f"{tmp_path} is a folder, and one file is unpickled\n  fix: name the file" in done.output
