"""Claims about pickles: their code runs only when it is asked for, and the weights come out as they were."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from test_models import Tripwire

from sharpscope import cli
from sharpscope.conversion import to_safetensors
from sharpscope.errors import ModelError, UsageError


def module():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)).half()


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"model": m, "epoch": 3}])
def test_a_pickled_module_is_converted_only_when_asked(tmp_path, wrap):
    torch.save(wrap(module()), tmp_path / "m.pt")
    with pytest.raises(ModelError, match=r"is a pickled module.*\n  fix: --unsafe-pickle"):
        to_safetensors(tmp_path / "m.pt", tmp_path / "m.safetensors")
    assert to_safetensors(tmp_path / "m.pt", tmp_path / "m.safetensors", unsafe_pickle=True) == 7
    found, expected = load_file(tmp_path / "m.safetensors"), module().state_dict()
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items()
    )


def test_no_code_runs_without_the_flag(tmp_path):
    torch.save(Tripwire(tmp_path / "trace"), tmp_path / "m.pt")
    with pytest.raises(ModelError, match="runs code from the file"):
        to_safetensors(tmp_path / "m.pt", tmp_path / "m.safetensors")
    assert not (tmp_path / "trace").exists()
    with pytest.raises(ModelError, match="no weights"):
        to_safetensors(tmp_path / "m.pt", tmp_path / "m.safetensors", unsafe_pickle=True)
    assert (tmp_path / "trace").exists()  # the flag does what it says


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_a_state_dict_needs_no_flag(tmp_path, key):
    state = module().state_dict()
    torch.save({key: state, "optimizer": {"lr": 1}} if key else state, tmp_path / "m.bin")
    assert to_safetensors(tmp_path / "m.bin", tmp_path / "m.safetensors") == 7


def test_tied_tensors_are_written_under_each_name(tmp_path):
    tied = torch.arange(3.0)
    torch.save({"a": tied, "b": tied, "c": tied[1:], "t": torch.ones(2, 3).T}, tmp_path / "m.pt")
    to_safetensors(tmp_path / "m.pt", tmp_path / "m.safetensors")
    found = load_file(tmp_path / "m.safetensors")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "a": [0, 1, 2],
        "b": [0, 1, 2],
        "c": [1, 2],
        "t": [[1, 1]] * 3,
    }


def test_what_cannot_be_converted_is_said(tmp_path):
    with pytest.raises(UsageError, match="there is no file"):
        to_safetensors(tmp_path / "none.pt", tmp_path / "m.safetensors")
    torch.save(module().state_dict(), tmp_path / "m.pt")
    with pytest.raises(UsageError, match=r"does not end in \.safetensors"):
        to_safetensors(tmp_path / "m.pt", tmp_path / "m.pth")
    (tmp_path / "there.safetensors").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        to_safetensors(tmp_path / "m.pt", tmp_path / "there.safetensors")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "m.pt").read_bytes()[:900])
    with pytest.raises(ModelError, match=r"cut.pt cannot be read"):
        to_safetensors(tmp_path / "cut.pt", tmp_path / "m.safetensors")
    assert (tmp_path / "there.safetensors").read_text() == "mine"
    assert not list(tmp_path.glob("*.part"))


def test_a_class_that_is_not_installed_is_named(tmp_path):
    import sys
    import types

    made = types.ModuleType("their_code")
    made.Net = type("Net", (torch.nn.Linear,), {"__module__": "their_code"})
    sys.modules["their_code"] = made
    torch.save(made.Net(2, 2), tmp_path / "m.pt")
    del sys.modules["their_code"]
    with pytest.raises(ModelError, match="needs code that is not installed here: No module named 'their_code'"):
        to_safetensors(tmp_path / "m.pt", tmp_path / "m.safetensors", unsafe_pickle=True)


def test_the_command_follows(tmp_path, capsys):
    torch.save(module(), tmp_path / "m.pt")
    for flags, code in (([], 3), (["--unsafe-pickle"], 0)):
        with pytest.raises(SystemExit) as ended:
            cli.app(["convert", str(tmp_path / "m.pt"), "--out", str(tmp_path / "m.safetensors"), *flags])
        assert (ended.value.code or 0) == code
    assert capsys.readouterr().out == f"7 tensors: {tmp_path / 'm.safetensors'}\n"
