"""A document of ``check`` or ``diff`` takes the place of nothing that the user did not mean to lose."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from planted import planted
from typer.testing import CliRunner

from sharpscope.cli import app
from sharpscope.commands.terminal import write_what_can_be
from sharpscope.config import settings, write_config
from sharpscope.errors import UsageError
from sharpscope.leftovers import OWN
from sharpscope.report.page import write

RULES = '[[rules]]\nid = "scans"\nmeasure = "accuracy"\nsplit = "scans"\nmin = 10\n'
CHECK = ("check", "scan", "--rules", "r.toml")
DIFF = ("diff", "scan", "other")
PASSED = "Gate passed: 1 passed of 1 rule."


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("documents")
    planted(alphas=(0.0, 0.5, 1.0), measures=("trace",)).save(root / "scan")
    planted(alphas=(0.0, 0.5, 1.0), measures=("trace",), failure=True).save(root / "other")
    return root


@pytest.fixture
def world(saved, tmp_path, monkeypatch):
    for folder in ("scan", "other"):
        (tmp_path / folder).mkdir()
        for file in (saved / folder).iterdir():
            (tmp_path / folder / file.name).write_bytes(file.read_bytes())
    (tmp_path / "r.toml").write_text(RULES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def everything(root):
    return {p: p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def heard(pipe, command):
    """Return what a reader of the pipe gets while the command runs, and how that ended."""
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()), daemon=True)
    reader.start()
    done = run(*command)
    if not pipe.is_fifo():  # the reader waits for a writer that never comes
        return "", done
    reader.join(20)
    return got[0], done


@pytest.mark.parametrize(("command", "key"), [(CHECK, "passed"), (DIFF, "accuracy")])
def test_the_reader_of_a_pipe_gets_the_document_and_the_pipe_stays(world, command, key):
    os.mkfifo(world / "pipe")
    text, done = heard(world / "pipe", (*command, "--json", "pipe"))
    assert done.exit_code == 0, done.output
    assert (world / "pipe").is_fifo()
    assert key in json.loads(text)
    assert not list(world.glob("*.part"))


def test_a_link_to_a_pipe_is_a_pipe_and_a_file_beside_it_is_written(world):
    os.mkfifo(world / "pipe")
    (world / "link").symlink_to("pipe")
    text, done = heard(world / "pipe", (*CHECK, "--json", "link", "--md", "m.md"))
    assert done.exit_code == 0, done.output
    assert (world / "link").is_symlink()
    assert json.loads(text)["passed"] is True
    assert (world / "m.md").read_text().startswith("### Gate passed")


def test_what_is_behind_a_descriptor_is_added_to(world):
    with (world / "log").open("w") as log:
        log.write("earlier\n")
        log.flush()
        assert run(*CHECK, "--json", f"/dev/fd/{log.fileno()}").exit_code == 0
    first, document = (world / "log").read_text().split("\n", 1)
    assert first == "earlier"
    assert json.loads(document)["passed"] is True


def test_no_document_at_the_null_device_is_lost(world):
    assert run(*CHECK, "--json", os.devnull, "--md", os.devnull).exit_code == 0


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed(world, there):
    (world / "store").mkdir()
    if there:
        (world / "store" / "j.json").write_text("old")
    (world / "gate.json").symlink_to("store/j.json")
    assert run(*CHECK, "--json", "gate.json").exit_code == 0
    assert (world / "gate.json").is_symlink()
    assert json.loads((world / "store" / "j.json").read_text())["passed"] is True


@pytest.mark.parametrize(("command", "last"), [(CHECK, PASSED), (DIFF, "recommended alpha: ")])
@pytest.mark.parametrize("place", ["-", "link"])
def test_a_document_on_stdout_is_alone_there(world, command, last, place):
    (world / "link").symlink_to("/dev/stdout")  # a link of ours: the machine's is not for a test to lose
    words = [sys.executable, "-m", "sharpscope", *command, "--json", place]
    piped = subprocess.run(words, capture_output=True, text=True, timeout=60)
    with (world / "found").open("w") as file:
        filed = subprocess.run(words, stdout=file, stderr=subprocess.PIPE, text=True, timeout=60)
    assert isinstance(json.loads(piped.stdout), dict)
    assert (world / "found").read_text() == piped.stdout
    for done in (piped, filed):
        assert done.returncode == 0
        assert done.stderr.splitlines()[-1].startswith(last)
    assert not (world / "-").exists()


OWN_FILES = [name for name in OWN if name.endswith(("json", "jsonl", "csv"))]


@pytest.mark.parametrize(
    "command",
    [
        *((*CHECK, "--json", f"scan/{name}") for name in OWN_FILES),
        (*CHECK, "--md", "r.toml"),
        (*CHECK, "--md", "./scan/../r.toml"),
        (*CHECK, "--md", "link"),
        (*CHECK, "--junit", "same", "--json", "./same"),
        (*CHECK, "--md", "-", "--json", "-"),
        (*CHECK, "--md", "new.md", "--json", "scan/scan.json"),
        (*DIFF, "--json", "scan/scan.json"),
        (*DIFF, "--json", "other/cells.jsonl"),
    ],
    ids=" ".join,
)
def test_what_is_read_and_the_other_document_are_no_place_for_a_document(world, command):
    (world / "link").symlink_to("r.toml")
    before = everything(world)
    done = run(*command)
    assert done.exit_code == UsageError.exit_code, done.output
    assert "which is read\n  fix: " in done.output or "two documents go to" in done.output
    assert everything(world) == before


def test_the_gates_findings_have_their_place_in_the_folder_and_are_written_again(world):
    for _ in range(2):
        assert run(*CHECK, "--json", "scan/check.json", "--junit", "scan/gate.xml").exit_code == 0
    assert json.loads((world / "scan" / "check.json").read_text())["passed"] is True


def test_everything_in_the_folder_of_a_report_is_known_as_its_own(tmp_path):
    result = planted(alphas=(0.0, 0.5, 1.0), measures=("trace",))
    write(result, result.save(tmp_path))
    write_config(settings({"zero_shot": "a", "fine_tuned": "b", "id": "c"}), tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == set(OWN)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device here")
def test_a_device_that_takes_nothing_is_said_and_no_file_is_written(world):
    (world / "full").symlink_to("/dev/full")  # a link of ours: the device is not for a test to lose
    before = everything(world)
    done = run(*CHECK, "--md", "new/m.md", "--json", "full")
    assert done.exit_code == UsageError.exit_code
    assert "full cannot be written: No space left" in done.output
    assert everything(world) == before
    assert not (world / "new").exists()
    assert (world / "full").is_char_device()


def test_a_disk_with_room_for_one_document_gets_none(world, monkeypatch):
    def full(_):
        turns.append(_)
        if len(turns) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    turns = []
    (world / "a.json").write_text("old")
    before = everything(world)
    monkeypatch.setattr(os, "fsync", full)
    done = run(*CHECK, "--json", "a.json", "--md", "b.md")
    assert done.exit_code == UsageError.exit_code
    assert "cannot be written: No space left on device\n  fix: " in done.output
    assert everything(world) == before


@pytest.mark.parametrize(("place", "said"), [("", "to '', which is no file"), (".", "it is a folder"), ("/", "folder")])
def test_what_names_no_file_is_no_place_for_a_document(world, place, said):
    before = everything(world)
    done = run(*CHECK, "--json", place)
    assert done.exit_code == UsageError.exit_code
    assert said in done.output
    assert everything(world) == before


def test_a_part_of_somebody_elses_stays_where_nothing_is_written(world):
    (world / "scan" / "x.part").write_text("mine")
    assert run(*CHECK, "--json", "scan", "--md", "scan/x").exit_code == UsageError.exit_code
    assert (world / "scan" / "x.part").read_text() == "mine"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device here")
def test_a_mistake_that_stderr_does_not_take_is_no_failed_gate(world):
    words = [sys.executable, "-m", "sharpscope", "check", "gone", "--rules", "r.toml"]
    with Path("/dev/full").open("w") as full:
        assert subprocess.run(words, stderr=full, timeout=60).returncode == UsageError.exit_code


@pytest.mark.parametrize(("limit", "code"), [(10, 0), (99, 1)])
@pytest.mark.parametrize("flags", [(), ("--json", "-"), ("--json", "j.json")])
def test_a_reader_that_is_gone_changes_nothing_of_how_a_gate_ends(world, limit, code, flags):
    (world / "r.toml").write_text(RULES.replace("10", str(limit)))
    read, written = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "sharpscope", *CHECK, *flags]
    done = subprocess.run(words, stdout=written, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == code
    assert done.stderr.startswith(("passed ", "failed ") if "-" in flags else "")
    assert "Broken pipe" not in done.stderr
    both = subprocess.run(words, stdout=written, stderr=written, timeout=60)
    os.close(written)
    assert both.returncode == code
    assert (world / "j.json").exists() == (flags[1:] == ("j.json",))


def test_a_mistake_that_nobody_reads_of_is_a_mistake_and_no_failed_gate(world):
    read, written = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "sharpscope", "check", "gone", "--rules", "r.toml"]
    assert subprocess.run(words, stderr=written, timeout=60).returncode == UsageError.exit_code
    os.close(written)


def test_a_stdout_that_lacks_a_letter_has_one_in_its_place(world):
    words = [sys.executable, "-m", "sharpscope", "report", "scan"]
    done = [
        subprocess.run(words, capture_output=True, timeout=60, env=os.environ | {"PYTHONIOENCODING": encoding})
        for encoding in ("utf-8", "cp1252")
    ]
    assert [one.returncode for one in done] == [0, 0]
    whole, plain = (one.stdout.decode(encoding) for one, encoding in zip(done, ("utf-8", "cp1252"), strict=True))
    assert "\u2212" in whole
    assert plain == whole.replace("\u2212", "-")


def test_what_no_plain_letter_stands_for_is_escaped_as_json_has_it(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", None)  # as where a program has no console
    write_what_can_be()
    json.dump({"name": "caf\u00e9 \u732b \U0001f63a \u22121 10⁻¹⁵ 10⁶"}, sys.stdout, ensure_ascii=False)
    sys.stdout.flush()
    assert json.loads(written.getvalue()) == {"name": "caf\u00e9 \u732b \U0001f63a -1 10^-15 10^6"}
