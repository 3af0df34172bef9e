"""Every exit code, reached by the real command in a process of its own; and what completion, colours and typos do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import clips
import pytest
from planted import planted

from sharpscope import config
from sharpscope.commands.report import measure

RULES = """
[tool.sharpscope.check]
undecided = "fail"
[[tool.sharpscope.check.rules]]
id = "scans"
measure = "accuracy"
split = "scans"
min = {limit}
"""


def started(*arguments, **environment):
    """Start the command; both streams are kept."""
    command = [sys.executable, "-m", "sharpscope", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell's background job ignores interrupts, and so would what it starts.
    heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(command, env=os.environ | environment, preexec_fn=heard, **pipes)


def ended(*arguments, **environment):
    """Return exit code, stdout and stderr of the command."""
    process = started(*arguments, **environment)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved scan and rules that it passes."""
    place = tmp_path_factory.mktemp("saved")
    planted().save(place / "scan")
    (place / "pass.toml").write_text(RULES.format(limit=10))
    (place / "fail.toml").write_text(RULES.format(limit=99))
    return place


def test_0_a_gate_that_passes_writes_its_documents_without_torch(saved, tmp_path):
    flags = ["--junit", tmp_path / "a" / "j.xml", "--json", tmp_path / "j.json", "--md", tmp_path / "m.md"]
    code, out, err = ended("check", saved / "scan", "--rules", saved / "pass.toml", *flags)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "Gate passed: 1 passed of 1 rule."
    assert json.loads((tmp_path / "j.json").read_text())["passed"] is True
    assert (tmp_path / "a" / "j.xml").read_text().startswith("<?xml")
    assert (tmp_path / "m.md").read_text().startswith("### Gate passed")
    assert not list(tmp_path.rglob("*.part"))
    code = "from sharpscope.cli import app; app({!r}, standalone_mode=False); import sys; print('torch' in sys.modules)"
    command = ["check", str(saved / "scan"), "--rules", str(saved / "pass.toml")]
    done = subprocess.run([sys.executable, "-c", code.format(command)], capture_output=True, text=True)
    assert done.stdout.endswith("False\n"), done.stderr


def test_1_a_gate_that_fails_unless_it_may_not(saved):
    arguments = ("check", saved / "scan", "--rules", saved / "fail.toml", "--quiet")
    code, out, err = ended(*arguments)
    assert (code, out, err) == (1, "Gate failed: 1 failed of 1 rule.\n", "")
    assert ended(*arguments, "--fail-on", "never")[:2] == (0, out)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--rules", "typo.toml"],
            "error: typo.toml, rule 1 ('a'): 'max_chnge' is no key of this rule\n  fix: ",
        ),
        (["--rules", "nowhere.toml"], "error: there is no file of rules nowhere.toml\n  fix: "),
        (["--rule", "typo.toml"], "No such option: --rule"),
        (["--rules", "pass.toml", "--fail-on", "nver"], "error: --fail-on is 'nver'\n  fix: fail or never"),
        (["--rules", "pass.toml", "--md", "pass.toml/x"], "error: pass.toml/x cannot be written: File exists"),
    ],
)
def test_2_a_mistake_in_usage_or_rules(saved, monkeypatch, flags, said):
    monkeypatch.chdir(saved)
    (saved / "typo.toml").write_text('[[rules]]\nid = "a"\nmeasure = "accuracy"\nsplit = "id"\nmax_chnge = 1\n')
    code, out, err = ended("check", "scan", *flags)
    assert (code, out) == (2, "")
    assert said in err


def test_2_points_to_give_up_that_are_no_number(saved, tmp_path):
    code, out, err = ended("merge", saved / "scan", "--keep-id", "nan", "--dry-run", "--out", tmp_path / "merged")
    assert (code, out) == (2, "")
    assert err.startswith("error: keep_id is nan: points of ID accuracy to give up")


def test_3_a_scan_that_lacks_the_measure_cannot_be_softened(saved, tmp_path):
    (tmp_path / "rules.toml").write_text('[[rules]]\nid = "a"\nmeasure = "directional"\nmax = 1\nseverity = "warn"\n')
    code, out, err = ended("check", saved / "scan", "--rules", tmp_path / "rules.toml", "--fail-on", "never")
    assert (code, err) == (3, "")
    assert out.startswith("unmeasured a: could not measure: directional of 'model' was not measured")


def test_3_a_saved_scan_that_holds_nan_is_no_result(saved, tmp_path):
    planted(alphas=(0.0, 0.5, 1.0)).save(tmp_path)
    lines = (tmp_path / "cells.jsonl").read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if '"scans|evaluation"' in line or "|scans|evaluation" in line)
    cell = json.loads(lines[place])
    cell["rows"][0]["value"] = float("nan")
    lines[place] = json.dumps(cell)
    (tmp_path / "cells.jsonl").write_text("\n".join(lines) + "\n")
    code, out, err = ended("check", tmp_path, "--rules", saved / "pass.toml", "--fail-on", "never")
    assert (code, out) == (3, "")
    assert err.startswith("error: accuracy of layer 'model' on 'scans' at alpha 0 is nan")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two CLIPs that belong together, one that does not, and images."""
    root = tmp_path_factory.mktemp("world")
    clips.pair(root)
    clips.save(root / "other", clips.network(blocks=3))
    clips.images(root / "id", each=6)
    return root


def test_4_models_that_do_not_match(world, tmp_path):
    models = ("--zero-shot", world / "base", "--fine-tuned", world / "other")
    code, out, err = ended("report", *models, "--id", world / "id", "--out", tmp_path / "out")
    assert (code, out) == (4, "")
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_130_a_scan_interrupted_from_outside_resumes_to_the_same_bytes(world, tmp_path, monkeypatch):
    flags = {"zero_shot": world / "base", "fine_tuned": world / "tuned", "id": world / "id"}
    knobs = {"alphas": "21", "measures": "lambda_max", "limit": "4", "threads": "1"}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in {**flags, **knobs}.items()]
    process, cells = started("report", *words, "--out", tmp_path / "cut"), tmp_path / "cut" / "cells.jsonl"
    while process.poll() is None and not (cells.exists() and cells.read_bytes().count(b"\n") > 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    assert err.endswith("interrupted; run the same command again to resume\n")
    assert not (tmp_path / "cut" / "scan.json").exists()
    monkeypatch.setattr("sharpscope.commands.report.write", lambda *_, **__: None)  # the page is not the claim
    for name in ("cut", "whole"):
        chosen = config.settings({k: str(v) for k, v in {**flags, **knobs}.items()} | {"out": str(tmp_path / name)})
        measure(chosen, progress=False)
    for name in ("cells.jsonl", "layers.csv", "evals.csv", "stragglers.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_unforeseen_error_does_not_read_as_a_gate_that_failed(monkeypatch, capsys, saved):
    from sharpscope import cli

    for error, said in [
        (RuntimeError("odd"), "a fault of sharpscope, please report it\nTraceback"),
        (RuntimeError("CUDA: tried to allocate memory"), "out of memory: CUDA"),
        (MemoryError("full"), "fix: a smaller --batch-size"),
        (PermissionError(13, "Permission denied", "x.json"), "error: x.json: Permission denied\n  fix: "),
    ]:

        def broken(*_, error=error):
            raise error

        monkeypatch.setattr("sharpscope.commands.check.gate", broken)
        with pytest.raises(SystemExit) as ended_with:
            cli.app(["check", str(saved / "scan"), "--rules", str(saved / "pass.toml")], prog_name="sharpscope")
        assert ended_with.value.code == 3
        assert said in capsys.readouterr().err


# --- the shell


def test_completion_offers_commands_and_flags():
    asked = {"_SHARPSCOPE_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    code, out, err = ended(**asked, COMP_WORDS="sharpscope che")
    assert (code, out.split(), err) == (0, ["check"], "")
    asked["COMP_CWORD"] = "3"
    assert ended(**asked, COMP_WORDS="sharpscope check x --ju")[1].split() == ["--junit"]


def test_a_mistyped_command_is_told_the_nearest():
    code, out, err = ended("reprot")
    assert (code, out) == (2, "")
    assert "No such command 'reprot'. Did you mean 'report'?" in err


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"FORCE_COLOR": "1", "TERM": "xterm-256color"}])
def test_nothing_printed_is_coloured(saved, environment):
    streams = ended("check", saved / "scan", "--rules", saved / "fail.toml", **environment)[1:]
    streams += ended("chek", **environment)[1:]
    assert "\x1b" not in "".join(streams)
