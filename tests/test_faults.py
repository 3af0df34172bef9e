"""What goes wrong in a long scan is said and costs nothing that was finished; repaired, the scan resumes.

Mostly through the command: a small network, folders of images or archives, interventions and recipes.
"""

from __future__ import annotations

import errno
import io
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import clips
import numpy as np
import pytest
import torch
from test_scan import loader, pair
from torch import nn

import sharpscope
from sharpscope import cli, journal
from sharpscope.curvature.lanczos import Eigenvalue
from sharpscope.curvature.trace import Trace
from sharpscope.errors import MeasurementError, OutputError, UsageError
from sharpscope.memory import Memory
from sharpscope.storage import LOCK, locked

TESTS = str(Path(__file__).parent)
COMPARED = [f"{name}.csv" for name in ("layers", "evals", "stragglers", "interventions", "recipes")] + ["cells.jsonl"]
HERE = socket.gethostname()


# --- what is scanned, as the command finds it: py:test_faults:zero_shot


def _grey(image):
    return torch.tensor(np.asarray(image.resize((4, 4)), dtype=np.float32) / 255).permute(2, 0, 1)


def zero_shot(step=0.0):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        for tensor in net.parameters():
            tensor += step * torch.randn_like(tensor)
    return net, _grey


def fine_tuned():
    return zero_shot(0.5)


SETTINGS = {
    "zero-shot": "py:test_faults:zero_shot",
    "fine-tuned": "py:test_faults:fine_tuned",
    "alphas": 5,
    "measures": "trace,lambda_max,m_sharpness",
    "threads": 1,
    "batch-size": 5,
}


def words(world, out, **changed):
    """Return the command line of the scan."""
    settings = SETTINGS | {"id": world / "id", "ood": f"far={world / 'far'}", "out": out} | changed
    return ["report", "--recipes", "--interventions", *(f"--{name}={value}" for name, value in settings.items())]


def run(*arguments):
    """Run the command here, return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sharpscope.commands.report.write", lambda *_, **__: None)  # the page is not the claim
        with pytest.raises(SystemExit) as ended:
            cli.app([str(word) for word in arguments], prog_name="sharpscope")
    return ended.value.code


@pytest.fixture(scope="module")
def world():
    """Images, as folders and as archives, and the scan that nothing happened to, in ``whole``; others may read it."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    clips.images(root / "id", each=4)
    clips.images(root / "far", each=4, seed=1)
    _archive(root / "id", root / "shards")
    assert run(*words(root, root / "whole")) == 0
    yield root
    shutil.rmtree(root)


def _archive(images, target):
    """Write the images as three tar archives."""
    target.mkdir()
    (target / "classnames.txt").write_text("\n".join(sorted(clips.COLORS)))
    for number, folder in enumerate(sorted(images.iterdir())):
        with tarfile.open(target / f"{number}.tar", "w") as tar:
            for image in sorted(folder.iterdir()):
                for name, content in ((f"{image.stem}.png", image.read_bytes()), (f"{image.stem}.cls", b"%d" % number)):
                    member = tarfile.TarInfo(f"{number}-{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def same(one, other):
    """Whether two folders hold the same numbers, byte for byte."""
    return [name for name in COMPARED if (one / name).read_bytes() != (other / name).read_bytes()] == []


def lines(out):
    """Return the finished cells of a folder as bytes, a torn last one left out."""
    path = out / "cells.jsonl"
    found = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [line for line in found if line.endswith(b"\n")]


@contextmanager
def after(cells, act):
    """Call ``act`` once so many cells have been written."""
    append, left = journal.Journal.append, [cells]

    def counted(self, cell):
        append(self, cell)
        left[0] -= 1
        if left[0] == 0:
            act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal.Journal, "append", counted)
        yield


# --- killed


def _child(arguments, kill_after=None):
    """Run the command in a fork; kill it so many seconds after it took the lock. Return whether it was killed."""
    out = Path(arguments[-1].partition("=")[2])
    child = os.fork()
    if child == 0:
        os._exit(run(*arguments))
    while kill_after is not None and os.waitpid(child, os.WNOHANG) == (0, 0):
        lock = out / LOCK
        if lock.exists() and lock.read_text() == f"process {child} on {HERE}\n":
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.001)
    else:
        if kill_after is not None:
            return False  # it was quicker
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def killed_20_times(world, out):
    """Kill scans at random moments, each resumed until it ends, 20 kills in all; write the cells there at each kill.

    Runs in a process of its own of one thread, which has loaded everything, so that a fork is quick and sound.
    """
    arguments, moments, found = words(Path(world), out), random.Random(0), []
    assert run(*arguments, "--fresh") == 0  # loads what a scan loads
    started = time.monotonic()
    assert run(*arguments, "--fresh") == 0
    seconds = time.monotonic() - started
    while len(found) < 20:
        shutil.rmtree(out)
        while len(found) < 20 and _child(arguments, moments.uniform(0, seconds / 3)):
            found.append(len(lines(Path(out))))
    assert not _child(arguments)
    sys.stdout.write(json.dumps(found))


def test_a_scan_killed_at_20_random_moments_ends_with_the_same_bytes(world, tmp_path):
    code = f"import sys; sys.path.insert(0, {TESTS!r}); import test_faults, sharpscope.commands.report, torch; "
    code += f"torch.set_num_threads(1); test_faults.killed_20_times({str(world)!r}, {str(tmp_path / 'out')!r})"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    moments = json.loads(done.stdout.splitlines()[-1])
    total = len(lines(world / "whole"))
    assert len(moments) == 20
    assert min(moments) < total / 3 < 2 * total / 3 < max(moments)  # on the path, and in what comes after it
    assert same(tmp_path / "out", world / "whole")
    theirs, mine = (sharpscope.open(place).meta for place in (world / "whole", tmp_path / "out"))
    assert {k: v for k, v in mine.items() if k != "cost"} == {k: v for k, v in theirs.items() if k != "cost"}
    assert not {path.name for path in (tmp_path / "out").iterdir()} - {
        path.name for path in (world / "whole").iterdir()
    }


# --- two at once


HOLD = "import sys; from pathlib import Path; from sharpscope.storage import locked\n"
HOLD += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


def test_a_second_process_on_the_folder_is_refused_and_a_killed_one_blocks_nobody(world, tmp_path, capsys):
    out = tmp_path / "out"
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "held\n"
    assert (out / LOCK).read_text() == f"process {first.pid} on {HERE}\n"
    assert run(*words(world, out), "--fresh") == 3
    said = capsys.readouterr().err
    assert f"error: {out} is being written by another scan (process {first.pid} on {HERE})\n  fix: wait" in said
    assert not (out / "cells.jsonl").exists()
    first.kill()
    first.communicate()
    assert (out / LOCK).exists()
    assert run(*words(world, out, alphas=2, measures="trace")) == 0
    assert not (out / LOCK).exists()


def test_of_many_threads_that_want_a_folder_at_once_one_has_it_at_a_time(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    inside, most = [0], [0]

    def enter(_):
        try:
            with locked(tmp_path):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.001)
                inside[0] -= 1
        except OutputError:
            return 0
        return 1

    with ThreadPoolExecutor(8) as pool:
        entered = sum(pool.map(enter, range(200)))
    assert most == [1]
    assert entered >= 1
    with locked(tmp_path), pytest.raises(OutputError, match=f"process {os.getpid()} on {HERE}"), locked(tmp_path):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    import fcntl

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="without locks: see that one scan at a time"), locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()


# --- what goes wrong on the way, and is repaired


@contextmanager
def full_disk(world, out):
    """No file may grow beyond what the cells have come to; a write that reaches the limit is cut in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((out / "cells.jsonl").stat().st_size + 9000, hard))
    try:
        yield f"error: {out}/cells.jsonl cannot be written: File too large\n  fix: make room or choose another --out"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def read_only(world, out):
    out.chmod(0o555)
    was_root = os.geteuid() == 0  # whom permissions do not stop
    if was_root:
        os.seteuid(65534)
    try:
        yield f"error: {out} cannot be written: Permission denied\n  fix: "
    finally:
        if was_root:
            os.seteuid(0)
        out.chmod(0o755)


@contextmanager
def vanished(world, out):
    """An image is gone after three more cells, in data too large to be kept in memory."""
    image = world / "far" / "green" / "0001.png"
    content = image.read_bytes()
    with pytest.MonkeyPatch.context() as patch, after(3, image.unlink):
        patch.setattr("sharpscope.data.CACHE_BYTES", 0)
        yield f"error: {image} of 'far' could be read before and now cannot: [Errno 2] No such file or directory"
    image.write_bytes(content)


@contextmanager
def corrupt_image(world, out):
    image = world / "id" / "red" / "0002.png"
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])
    yield f"error: 'id': 1 images cannot be read so far ({image}: "
    image.write_bytes(content)


@contextmanager
def corrupt_shard(world, out):
    shard = world / "shards" / "1.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    yield f"error: {shard}"
    shard.write_bytes(content)


@contextmanager
def held(world, out):
    with locked(out):
        yield f"error: {out} is being written by another scan (process {os.getpid()} on {HERE})"


def interrupted():
    raise KeyboardInterrupt


@pytest.mark.parametrize("fault", [full_disk, read_only, vanished, corrupt_image, corrupt_shard, held])
def test_a_fault_is_said_ends_with_3_loses_nothing_and_once_repaired_the_scan_resumes(world, capsys, fault):
    out = Path(tempfile.mkdtemp(dir=world))
    out.chmod(0o755)
    data = {"id": f"wds:{world / 'shards'}"} if fault is corrupt_shard else {}
    with after(4, interrupted):
        assert run(*words(world, out, **data)) == 130
    before = lines(out)
    assert len(before) == 5
    capsys.readouterr()
    with fault(world, out) as sentence:
        assert run(*words(world, out, **data)) == 3
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said
    assert lines(out)[:5] == before
    assert len(lines(out)) > 5 or fault in (read_only, corrupt_image, corrupt_shard, held)
    assert not (out / "scan.json").exists()
    assert not list(out.glob("*.part"))
    assert run(*words(world, out, **data)) == 0
    if not data:
        assert same(out, world / "whole")


def test_vectors_that_do_not_fit_on_the_disk_are_an_error_and_leave_no_half_file(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    memory = Memory(tmp_path)
    try:
        memory.keep(0, {"lambda_max": {"weight": torch.zeros(10_000)}})
        with pytest.raises(OutputError, match=r"memory-0000\.safetensors cannot be written: .*File too large"):
            memory.settled(wait=True)
        with pytest.raises(OutputError, match="cannot be written"):
            memory.settled()  # so that no cell that goes with it is written either
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_an_image_that_could_be_read_before_is_not_left_out_afterwards(tmp_path):
    clips.images(tmp_path, each=4)
    split = sharpscope.folder(tmp_path, _grey, max_unreadable=0.5)
    (tmp_path / "red" / "0000.png").write_bytes(b"")
    split._cache = None
    with pytest.raises(sharpscope.errors.DataError, match=r"red/0000\.png of .* could be read before .* 0 bytes"):
        list(split)


# --- no number at one alpha


class Pole(nn.Module):
    """A network whose loss is NaN where its scale is zero, half way from -1 to 1."""

    def __init__(self, scale):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.scale = nn.Linear(16, 3).double(), nn.Parameter(torch.tensor(float(scale)).double())

    def forward(self, x):
        return self.body(x.flatten(1)) * (1 + self.scale**2) + 0 / self.scale


class Root(Pole):
    """The same with a loss that is finite there, and a gradient that is not."""

    def forward(self, x):
        return self.body(x.flatten(1)) * (1 + self.scale.abs().sqrt())


class Bend(Pole):
    """The same with a gradient that is finite there, and a second derivative that is not."""

    def forward(self, x):
        return self.body(x.flatten(1)) * (1 + self.scale.abs() ** 1.5)


def poles(kind=Pole, **settings):
    from test_scan import loader

    measures = ["trace", "lambda_max"]
    found = {"alphas": 5, "measures": measures, "progress": False, "ood": {"far": loader(9)}} | settings
    return sharpscope.scan(kind(-1).eval(), kind(1).eval(), loader(), **found)


def test_an_alpha_without_numbers_costs_none_of_the_others(tmp_path):
    message = r"the loss at alpha 0\.5 on 'id' is nan; 1 of 5 alphas \(0\.5\) could not be measured, 4 are and kept in "
    for attempt in range(2):
        with pytest.raises(MeasurementError, match=message):
            poles(out=tmp_path)
        _, cells, _ = journal.read(tmp_path / "cells.jsonl")
        keys = {f"{alpha}|{what}" for alpha in (0.0, 0.25, 0.75, 1.0) for what in ("id|evaluation", "far|evaluation")}
        keys |= {f"{alpha}|id|{what}" for alpha in (0.0, 0.25, 0.75, 1.0) for what in ("trace", "lambda_max")}
        assert {cell.key for cell in cells} == keys, attempt
        assert len(cells) == len(keys)
    with pytest.raises(UsageError, match="a scan that has not finished"):
        sharpscope.open(tmp_path)
    alone = poles(alphas=[0, 0.25, 0.75, 1], interventions=False)  # traces know nothing of other alphas
    found = {cell.key: cell for cell in cells}
    for cell in alone.cells:
        assert found[cell.key] == cell or "lambda_max" in cell.key


@pytest.mark.parametrize("measure", ["trace", "lambda_max"])
@pytest.mark.parametrize(("kind", "what"), [(Root, "gradient"), (Bend, "second derivative")])
def test_an_alpha_without_derivatives_costs_none_of_the_others(tmp_path, measure, kind, what):
    message = rf"{what} by 'scale' at alpha 0\.5 on 'id' holds NaN or infinities; 1 of 5 alphas \(0\.5\) could not be"
    with pytest.raises(MeasurementError, match=message):
        poles(kind, measures=[measure], out=tmp_path)
    _, cells, _ = journal.read(tmp_path / "cells.jsonl")
    assert {cell.key for cell in cells if measure in cell.key} == {f"{a}|id|{measure}" for a in (0.0, 0.25, 0.75, 1.0)}


def test_without_a_single_number_nothing_is_said_to_be_kept():
    with pytest.raises(
        MeasurementError, match=r"alpha 0\.5 on 'id' is nan; 1 of 1 alphas \(0\.5\) could not be measured\n"
    ):
        poles(alphas=[0.5])


# --- another plan


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 1}, r"seed differ \(seed: 0 there, 1 now\)"),
        ({"alphas": 4}, r"alphas differ"),
        (
            {"measures": [Trace(relative=0.1), "lambda_max"]},
            "measures.trace.relative: 0.05 there, 0.1 now",
        ),
        ({"ood": {}}, r"data\.far: \"\w+\.*\"? there, nothing now"),
    ],
)
def test_cells_of_another_plan_are_refused_by_the_setting_that_differs(tmp_path, changed, named):
    poles(alphas=[0, 1], out=tmp_path)
    kept = (tmp_path / "cells.jsonl").read_bytes()
    with pytest.raises(UsageError, match=named):
        poles(**{"alphas": [0, 1]} | changed, out=tmp_path)
    assert (tmp_path / "cells.jsonl").read_bytes() == kept
    assert sharpscope.open(tmp_path).meta["seed"] == 0


def test_the_order_of_measures_and_sets_is_no_part_of_the_plan(tmp_path):
    from test_scan import loader

    sets = {"far": loader(9), "near": loader(6)}
    first = poles(alphas=[0, 1], ood=sets, out=tmp_path)
    other = poles(alphas=[0, 1], ood=dict(reversed(sets.items())), measures=["lambda_max", "trace"], out=tmp_path)
    assert other.meta["cost"] == first.meta["cost"]  # nothing was measured
    assert {cell.key: cell for cell in other.cells} == {cell.key: cell for cell in first.cells}


@pytest.mark.parametrize("fresh", [True, False])
def test_a_fresh_scan_is_not_taken_for_the_finished_one_it_replaces(tmp_path, fresh):
    """Asked for, or because the cells of the finished one are gone."""
    poles(alphas=[0, 1], out=tmp_path)
    (tmp_path / "memory-0000.safetensors").write_bytes(b"of an earlier scan")
    if not fresh:
        (tmp_path / "cells.jsonl").unlink()
    with after(1, interrupted), pytest.raises(KeyboardInterrupt):
        poles(alphas=[0, 1], out=tmp_path, seed=1, fresh=fresh)
    assert {path.name for path in tmp_path.glob("memory-*")} == set()
    with pytest.raises(UsageError, match="a scan that has not finished"):
        sharpscope.open(tmp_path)


class Stopped(Eigenvalue):
    """Stops the scan at the second alpha, between two measures that leave vectors to the next alpha."""

    def __call__(self, point, layers, seed):
        self.__dict__["points"] = self.__dict__.get("points", 0) + 1
        if self.__dict__["points"] == 2:
            raise KeyboardInterrupt
        return super().__call__(point, layers, seed)


def test_a_scan_stopped_between_two_eigenvalues_goes_on_with_the_vectors_of_both(tmp_path):
    def scanned(folder, least):
        a, b = pair("vit")
        return sharpscope.scan(
            *(a, b, loader()), alphas=4, measures=[Eigenvalue(most=4), least], out=tmp_path / folder, progress=False
        )

    scanned("whole", Eigenvalue("min", most=4))
    with pytest.raises(KeyboardInterrupt):
        scanned("stopped", Stopped("min", most=4))
    scanned("stopped", Eigenvalue("min", most=4))
    resumed, whole = (tmp_path / folder / "cells.jsonl" for folder in ("stopped", "whole"))
    assert resumed.read_bytes() == whole.read_bytes()
