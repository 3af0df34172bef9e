"""Claims about the command line: what is printed where, how it ends, and that demo and report are one thing."""

from __future__ import annotations

import inspect
import json
import os
import resource
import shutil
import subprocess
import sys
import zipfile

import clips
import pandas as pd
import pytest
import torch

import sharpscope.commands.report as command
from sharpscope import config, demo, doctor
from sharpscope._version import __version__
from sharpscope.commands import scans
from sharpscope.errors import MeasurementError, SharpscopeError, UsageError
from sharpscope.measures import measures_from
from sharpscope.precision import deterministic_algorithms
from sharpscope.saved import open_result

REPORT_FILES = {
    "index.html",
    "scan.json",
    "layers.csv",
    "evals.csv",
    "stragglers.csv",
    "interventions.csv",
    "recipes.csv",
    "figures",
    "cells.jsonl",
    "correct.npz",
    "config.resolved.toml",
}


def outside(*arguments, **environment):
    """Run the installed command in a process of its own."""
    command = [sys.executable, "-m", "sharpscope.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two CLIPs and three sets of images."""
    root = tmp_path_factory.mktemp("world")
    clips.pair(root)
    clips.images(root / "id", each=6)
    clips.images(root / "sketch", ("blue", "red"), each=4, seed=1)
    clips.images(root / "train", each=4, seed=2)
    return root


@pytest.fixture
def flags(world, tmp_path):
    return [
        *("--zero-shot", world / "base", "--fine-tuned", world / "tuned"),
        *("--id", world / "id", "--ood", f"sketch={world / 'sketch'}"),
        *("--alphas", "0,1", "--measures", "trace", "--limit", 6, "--out", tmp_path / "out"),
    ]


@pytest.fixture(scope="module")
def scanned(world, tmp_path_factory):
    """A folder that a report was written to."""
    out = tmp_path_factory.mktemp("scanned")
    chosen = config.Settings(
        zero_shot=str(world / "base"),
        fine_tuned=str(world / "tuned"),
        id=str(world / "id"),
        ood={"sketch": str(world / "sketch")},
        alphas=2,
        measures="trace",
        limit=6,
        out=str(out),
    )
    command.measure(chosen, progress=False)
    return out


@pytest.fixture
def assets(world, tmp_path, monkeypatch):
    """Stand-ins for the embedded pair and images."""
    place = tmp_path / "assets"
    for kind, source in (("base", "base"), ("success", "tuned"), ("failure", "tuned")):
        shutil.copytree(world / source, place / kind)
    (place / "templates.txt").write_text("the {}\n{}\n")
    with zipfile.ZipFile(place / "images.zip", "w") as archive:
        for name in ("id", "sketch", "train"):
            for path in sorted((world / name).rglob("*.png")):
                archive.write(path, path.relative_to(world))
    monkeypatch.setattr(demo, "ASSETS", place)
    monkeypatch.setattr(demo, "ALPHAS", 2)
    monkeypatch.setattr(demo, "IMAGES", 6)
    return place


@pytest.fixture
def no_page(monkeypatch):
    """Drawing the page is tested where it is made, and takes longer than measuring."""
    monkeypatch.setattr(command, "write", lambda result, folder, *, audit: None)


# --- help


def test_help_is_light_and_needs_no_torch():
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'pandas', 'matplotlib', 'rich']))"
    code = f"{blocked}\nfrom sharpscope.cli import app; app(['report', '--help'], prog_name='sharpscope')"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "--sharpness-on DATA" in done.stdout
    assert "\x1b" not in done.stdout
    assert after.ru_utime - before.ru_utime < 0.3  # about 0.07 s


def test_version(run):
    assert run("--version") == (0, f"sharpscope {__version__}\n", "")


def test_the_size_of_groups_is_that_of_the_measures_unless_it_is_given():
    given = {"zero_shot": "a", "fine_tuned": "b", "id": "c", "measures": "m_sharpness,trace"}
    for m, expected in ((None, [32]), (8, [8])):
        found = command.measures(config.settings({**given, "m": m}))
        assert [measure.m for measure in found if hasattr(measure, "m")] == expected


def test_every_setting_has_a_flag_and_every_flag_of_a_setting_is_one():
    flags = set(inspect.signature(scans.report).parameters) - {"folder", *scans.NO_SETTINGS}
    assert flags == set(config.Settings.model_fields)
    assert config.Settings.model_fields["out"].default == scans.OUT


# --- settings


def test_a_file_and_flags_are_one_schema_and_flags_win(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('zero-shot = "a"\nfine_tuned = "b"\nid = "c"\nseed = 3\nalphas = [0, 0.5]\n[ood]\ns = "d"\n')
    found = config.settings({"seed": 4, "limit": "all", "measures": "trace,lambda_max", "out": None}, file)
    assert (found.zero_shot, found.seed, found.limit, found.out) == ("a", 4, None, "sharpscope-report")
    assert found.measures == ("trace", "lambda_max")
    assert (found.alphas, found.ood) == ((0, 0.5), {"s": "d"})


def test_resolved_settings_read_back_equal(tmp_path):
    hostile = 'a "quoted"\\ path\n with = [marks] # é ☃'
    found = config.Settings(
        zero_shot=hostile, fine_tuned="b", id="/c", ood={hostile: "/d", "x.y": "/e"}, alphas="0,0.25,1", limit="all"
    )
    assert config.settings({}, config.write_config(found, tmp_path)) == found


def test_settings_are_replaced_whole_who_reads_the_old_ones_has_all_of_them(tmp_path):
    old, new = (config.settings({"zero_shot": "a", "fine_tuned": "b", "id": name}) for name in ("/c", "/d"))
    with config.write_config(old, tmp_path).open() as reader:
        written = config.write_config(new, tmp_path)
        assert 'id = "/c"' in reader.read()
    assert config.settings({}, written) == new
    assert list(tmp_path.iterdir()) == [written]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"sede": 1}, r"'sede' is no setting\n  fix: did you mean 'seed'\?"),
        ({"id": None}, "--id is missing: in-distribution images"),
        ({"ood": ["d"]}, "--ood: 'd' is not NAME=DIR"),
        ({"ood": ["a=b", "a=c"]}, "--ood: the name 'a' is given twice"),
        ({"alphas": "half"}, "--alphas: could not convert string to float: 'half'"),
        ({"batch_size": "many"}, "--batch-size: input should be a valid integer.*found 'many'"),
        ({"seed": -1}, "--seed: input should be greater than or equal to 0, found -1\n  fix: .* 0 or more"),
        ({"seed": True}, "--seed: input should be no truth value, found True"),
        ({"limit": True}, "--limit: input should be no truth value, found True"),
        ({"alphas": [False, 0.5]}, "--alphas: input should be no truth value"),
        ({"granularity": "atom"}, "--granularity: input should be 'tower', 'block', 'part' or 'tensor'"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_named(flags, said):
    with pytest.raises(UsageError, match=said):
        config.settings({"zero_shot": "a", "fine_tuned": "b", "id": "c"} | flags)


def test_a_broken_configuration_file_is_named(tmp_path):
    with pytest.raises(UsageError, match="there is no configuration file"):
        config.settings({}, tmp_path / "none.toml")
    (tmp_path / "c.toml").write_text("= 3")
    with pytest.raises(UsageError, match=r"c.toml is no TOML: "):
        config.settings({}, tmp_path / "c.toml")
    (tmp_path / "c.toml").write_text('zero-shot = "a"\nzero_shot = "b"')
    with pytest.raises(UsageError, match=r"c.toml: 'zero_shot' is there twice, with - and with _"):
        config.settings({}, tmp_path / "c.toml")


# --- report


def test_report_writes_the_folder_and_prints_the_result_on_stdout_only(run, flags, tmp_path):
    code, out, err = run("report", *flags)
    assert code == 0, err
    assert {path.name for path in (tmp_path / "out").iterdir()} == REPORT_FILES
    assert out.endswith(f"\npage: {tmp_path / 'out' / 'index.html'}\n")
    assert "2 alphas" in out
    assert "alpha 1 done (2/2" in err
    assert "alpha 1 done" not in out


def test_the_page_of_a_saved_scan_is_written_again_without_torch(scanned):
    page = (scanned / "index.html").read_bytes()
    (scanned / "index.html").unlink()
    code = (
        f"from sharpscope.cli import app; app(['report', {str(scanned)!r}], standalone_mode=False)\n"
        "import sys; print('loaded:', {'torch', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("loaded: set()\n"), done.stderr
    assert (scanned / "index.html").read_bytes() == page


def test_an_audit_log_that_is_not_there_is_named_before_anything_is_drawn(run, scanned):
    page = (scanned / "index.html").read_bytes()
    code, _, err = run("report", scanned, "--audit", scanned / "nowhere.jsonl")
    assert code == 2
    assert "nowhere.jsonl does not exist" in err
    assert (scanned / "index.html").read_bytes() == page


def test_a_saved_scan_cannot_be_drawn_with_other_settings(run, scanned):
    code, _, err = run("report", scanned, "--seed", 0)
    assert code == 2
    assert "--seed changes nothing in it" in err


def test_quiet_leaves_stderr_empty(run, flags, no_page):
    assert run("report", *flags, "--quiet")[2] == ""


@pytest.mark.parametrize(
    ("more", "images", "kinds"),
    [
        ((), {8, 18}, {"uniform"}),
        (("--no-interventions",), set(), {"uniform"}),
        (("--intervention-limit", 4, "--recipes"), {4}, {"uniform", "LiNeS", "leave-one-out", "per-layer"}),
    ],
)
def test_flags_say_whether_layers_are_moved_and_recipes_tried(run, flags, no_page, tmp_path, more, images, kinds):
    code, _, err = run("report", *flags, *more)
    assert code == 0, err
    result = open_result(tmp_path / "out")
    assert set(result.interventions["n"]) == images
    assert set(result.recipes["kind"]) - {"projection", "sparsified", "shrunk"} <= kinds


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(run, flags, tmp_path):
    code, out, _ = run("report", *flags, "--dry-run")
    assert code == 0
    assert out.startswith("6 layers x 2 alphas on cpu: trace on 6 images of 'id'; evaluation on id (18), sketch (8)")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more", [("--out", "o\udcff"), ("--ood", "o\udcff={world}/sketch"), ("--id", "{world}/i\udcff")]
)
def test_what_no_file_of_a_scan_can_hold_is_refused_before_anything_is_measured(run, flags, world, tmp_path, more):
    for last in (("--dry-run",), ("--quiet",)):
        code, _, err = run("report", *flags, more[0], more[1].format(world=world), *last)
        assert (code, f"{more[0]}: " in err, "is no UTF-8, in which settings and results are written" in err) == (
            2,
            True,
            True,
        )
    assert not [*tmp_path.iterdir()]


def test_a_dry_run_refuses_what_the_scan_would_refuse(run, flags, scanned, tmp_path):
    (tmp_path / "file").write_text("mine")
    for name in ("damaged", "other"):
        shutil.copytree(scanned, tmp_path / name)
    cells = tmp_path / "damaged" / "cells.jsonl"
    cells.write_bytes(cells.read_bytes().replace(b'"cell"', b'"c', 1))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
    cases = [
        (("--out", tmp_path / "file"), 3, f"{tmp_path / 'file'} cannot be written: Not a directory"),
        (("--out", "/proc/x"), 3, "/proc cannot be written: "),
        (("--out", tmp_path / "damaged"), 2, "is not a readable list of cells"),
        (("--out", tmp_path / "other", "--seed", 7), 2, "belongs to another scan: seed differ"),
        (("--audit", tmp_path / "nope.jsonl"), 2, "nope.jsonl does not exist"),
    ]
    for more, expected, said in cases:
        dry, real = (run("report", *flags, *more, *last, "--quiet") for last in (("--dry-run",), ()))
        assert (dry[0], dry[2]) == (real[0], real[2])
        assert (dry[0], said in dry[2]) == (expected, True), dry[2]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")} == before
    assert run("report", *flags, "--out", tmp_path / "other", "--seed", 7, "--fresh", "--dry-run")[0] == 0
    code, out, _ = run("report", *flags, "--out", tmp_path / "other", "--dry-run")
    assert (code, f", {len(open_result(scanned).cells)} cells are there already" in out) == (0, True)


def test_the_resolved_settings_repeat_the_run(run, flags, tmp_path, no_page):
    run("report", *flags)
    again = tmp_path / "again"
    code, _, err = run("report", "--config", tmp_path / "out" / "config.resolved.toml", "--out", again)
    assert code == 0, err
    for name in ("layers.csv", "evals.csv"):
        assert (again / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_deterministic_is_recorded_and_lasts_as_long_as_the_scan(run, flags, tmp_path, no_page):
    code, _, err = run("report", *flags, "--deterministic")
    assert code == 0, err
    facts = json.loads((tmp_path / "out" / "scan.json").read_text())
    assert facts["provenance"]["deterministic"] is True
    assert not torch.are_deterministic_algorithms_enabled()
    assert config.settings({}, tmp_path / "out" / "config.resolved.toml").deterministic is True


def test_an_interruption_stays_one_where_no_choice_of_algorithms_is_to_be_given_back(monkeypatch):
    # Giving it back imports torch's compiler, which fails after Ctrl-C amid its first import: exit code 3, a traceback.
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _: pytest.fail("called"))
    with pytest.raises(KeyboardInterrupt), deterministic_algorithms(False):
        raise KeyboardInterrupt


def test_another_plan_in_the_same_folder_is_refused_unless_fresh(run, flags, no_page):
    assert run("report", *flags)[0] == 0
    code, _, err = run("report", *flags, "--seed", 7)
    assert code == 2
    assert "seed differ" in err
    assert run("report", *flags, "--seed", 7, "--fresh")[0] == 0


def test_tolerance_multiplies_the_target_errors_of_what_stops_at_one(flags):
    names = ("trace", "lambda_max", "m_sharpness")
    usual, coarse = (
        command.measures(config.Settings(zero_shot="a", fine_tuned="b", id="c", measures=names, tolerance=times))
        for times in (1, 3)
    )
    assert (coarse[0].relative, coarse[0].absolute) == (3 * usual[0].relative, 3 * usual[0].absolute)
    assert coarse[1].tolerance == 3 * usual[1].tolerance
    assert coarse[2] == usual[2] == measures_from(names)[2]
    with pytest.raises(UsageError, match="--tolerance: input should be greater than 0"):
        config.settings({"zero_shot": "a", "fine_tuned": "b", "id": "c", "tolerance": 0})


def test_an_ood_set_uses_the_words_of_the_id_folders(run, flags, world, tmp_path, no_page):
    (tmp_path / "names.txt").write_text("the sea\ngrass\nblood\n")  # blue, green, red; sketch lacks green
    code, _, err = run("report", *flags, "--classnames", tmp_path / "names.txt")
    assert code == 0, err
    facts = json.loads((tmp_path / "out" / "scan.json").read_text())["splits"]["sketch"]
    assert (facts["classes"], facts["columns"]) == (["the sea", "grass", "blood"], [0, 2])


# --- how it ends


def test_errors_are_two_lines_on_stderr_without_traceback(flags, tmp_path):
    flags[flags.index("--zero-shot") + 1] = tmp_path / "nowhere"
    done = outside("report", *flags)
    assert done.returncode == 2
    assert done.stdout == ""
    first, second = done.stderr.splitlines()
    assert first.startswith("error: there is no model at")
    assert second.startswith("  fix: ")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_before_images_are_read(run, flags, monkeypatch, device):
    said = f"error: --device {device} (device='{device}') is no device of this machine that can be computed on: "
    code, out, err = run("report", *flags, "--dry-run", "--device", device)
    assert (code, out, err[: len(said)]) == (2, "", said)
    monkeypatch.setattr(command, "material", lambda *_, **__: pytest.fail("images were read"))
    code, out, err = run("report", *flags, "--device", device)
    assert (code, out, err[: len(said)]) == (2, "", said)
    assert "\n  fix: one of cpu" in err


@pytest.mark.parametrize(
    ("raised", "code"), [(UsageError("x"), 2), (MeasurementError("x"), 3), (SharpscopeError("x"), 3)]
)
def test_exit_codes_follow_the_error(run, flags, monkeypatch, raised, code):
    def failing(*_, **__):
        raise raised

    monkeypatch.setattr(command, "measure", failing)
    assert run("report", *flags) == (code, "", "error: x\n")


def test_models_that_do_not_match_end_with_4(run, flags, tmp_path):
    clips.save(tmp_path / "other", clips.network(blocks=3))
    flags[flags.index("--fine-tuned") + 1] = tmp_path / "other"
    code, _, err = run("report", *flags)
    assert code == 4
    assert err.startswith("error: ")


def test_an_interrupted_scan_ends_with_130_and_resumes(run, flags, tmp_path, monkeypatch, no_page):
    scan = command.scan

    def interrupted(*arguments, **settings):
        from sharpscope import scanner

        done = []

        def stop_after_two(cell, append=scanner.Journal.append):
            done.append(cell)
            if len(done) > 2:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            append = scanner.Journal.append
            patch.setattr(scanner.Journal, "append", lambda self, cell: (append(self, cell), stop_after_two(cell)))
            return scan(*arguments, **settings)

    monkeypatch.setattr(command, "scan", interrupted)
    code, out, err = run("report", *flags)
    assert (code, out) == (130, "")
    assert err.endswith("interrupted; run the same command again to resume\n")
    monkeypatch.setattr(command, "scan", scan)
    code, _, err = run("report", *flags)
    assert code == 0, err
    assert "3 cells are there already" in err


# --- layers


def test_layers_prints_the_partition(run, world):
    code, out, _ = run("layers", "--model", world / "base", "--granularity", "part")
    assert code == 0
    assert "visual.block.00.attn" in out
    assert "text.proj" in out
    assert run("layers", "--model", world / "base", "--granularity", "atom")[0] == 2


# --- demo


@pytest.mark.parametrize("kind", ["success", "failure"])
def test_the_embedded_pair_scores_what_its_makers_measured(kind, tmp_path, no_page):
    """expected.json is written by benchmarks/glyph, which reads images and weights without this package.

    The scans are of digits only: here they are judged among digits, there among all 36 characters.
    """
    expected = json.loads((demo.ASSETS / "expected.json").read_text())
    chosen = demo.settings(tmp_path, kind)
    assert set(chosen.ood) == set(expected["images"]) - {"id"}
    quick = {"measures": (), "alphas": (0.0, 0.3, 1.0), "ood": {"color": chosen.ood["color"]}, "sharpness_on": None}
    result = command.measure(chosen.model_copy(update=quick), progress=False)
    found = result.evals.query("measure == 'accuracy'").set_index(["split", "alpha"])["value"]
    for split in ("id", "color"):
        for alpha in (0.0, 0.3, 1.0):
            percent = expected[kind]["accuracy"][split][expected["alphas"].index(alpha)]
            assert 100 * found[split, alpha] == pytest.approx(percent, abs=100 / 360 + 0.01)  # one image may tip


def test_report_on_the_demos_directories_gives_the_same_rows_as_demo(run, assets, tmp_path, no_page):
    code, _, err = run("demo", "--out", tmp_path / "demo")
    assert code == 0, err
    zero_shot, fine_tuned = demo.pair()
    images = demo.extract(tmp_path / "images")
    code, _, err = run(
        *("report", "--zero-shot", zero_shot, "--fine-tuned", fine_tuned, "--templates", assets / "templates.txt"),
        *("--id", images / "id", "--ood", f"sketch={images / 'sketch'}", "--sharpness-on", images / "train"),
        *("--alphas", demo.ALPHAS, "--limit", demo.IMAGES, "--tolerance", demo.TOLERANCE),
        *("--batch-size", demo.IMAGES // 2, "--measures", ",".join(demo.MEASURES), "--m", demo.GROUP),
        *("--threads", demo.THREADS),
        *("--out", tmp_path / "report"),
    )
    assert code == 0, err
    for name in ("layers.csv", "evals.csv", "stragglers.csv"):
        assert (tmp_path / "demo" / name).read_bytes() == (tmp_path / "report" / name).read_bytes()
    assert len(pd.read_csv(tmp_path / "demo" / "layers.csv")) == 2 * 4 * 7  # alphas, measures, layers and the model


def test_the_two_demos_differ_in_the_fine_tuned_model_only(assets):
    assert demo.pair("success")[0] == demo.pair("failure")[0] == assets / "base"
    assert [demo.pair(kind)[1].name for kind in ("success", "failure")] == ["success", "failure"]


def test_images_are_unpacked_whole_or_not_at_all(assets, tmp_path, monkeypatch):
    place = tmp_path / "images"
    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "_extract_member", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            demo.extract(place)
    assert list(tmp_path.iterdir()) == [assets]
    assert demo.extract(place) == place
    assert len(list(place.rglob("*.png"))) == 18 + 8 + 12
    first = (place / "id" / "red" / "0000.png").stat()
    assert demo.extract(place) == place
    assert (place / "id" / "red" / "0000.png").stat().st_mtime_ns == first.st_mtime_ns  # left as it is


def test_a_folder_with_other_things_is_not_overwritten(assets, tmp_path):
    clips.images(tmp_path / "mine", ("red",), each=1)
    with pytest.raises(SharpscopeError, match="holds something else"):
        demo.extract(tmp_path / "mine")
    assert (tmp_path / "mine" / "red" / "0000.png").exists()


def test_missing_assets_are_said(run, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "ASSETS", tmp_path / "none")
    code, _, err = run("demo", "--out", tmp_path / "out")
    assert code == 3
    assert "this installation lacks the demo's images.zip" in err


# --- doctor


def test_a_sound_installation_passes(run):
    code, out, _ = run("doctor")
    assert code == 0, out
    assert f"{torch.__version__}" in out
    assert "FAIL" not in out
    assert any(line.startswith("second derivatives on cpu") and "PASS" in line for line in out.splitlines())


class _Halved(torch.autograd.Function):
    """The square, with a right first and a wrong second derivative."""

    @staticmethod
    def forward(context, x):
        context.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(context, grad):
        (x,) = context.saved_tensors
        return grad * 2 * (x + (x - x.detach()) * -0.5)


def test_the_self_check_sees_a_wrong_second_derivative():
    objective, weights = doctor.small_problem(torch.device("cpu"))
    asymmetry, difference = doctor.second_derivative_errors(objective, weights)
    assert max(asymmetry, difference) < 1e-9
    wrong = type(objective)(lambda at, x: _Halved.apply(objective.forward(at, x)), objective.loss, objective.batches)
    assert max(doctor.second_derivative_errors(wrong, weights)) > 1e-2


def test_a_wrong_second_derivative_fails_the_installation(run, monkeypatch):
    monkeypatch.setattr(doctor, "second_derivative_errors", lambda *_: (1e-16, 2.5e-2))
    code, out, err = run("doctor")
    assert code == 3
    assert "FAIL" in out
    assert "second derivatives on cpu" in err


def test_a_torchvision_that_does_not_fit_is_found(tmp_path, monkeypatch):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    (tmp_path / "torchvision-0.1.dist-info").mkdir()
    (tmp_path / "torchvision-0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = doctor._torchvision()
    assert found.passed is False
    assert found.found.startswith("torchvision 0.1 was built for another torch than ")
    assert "(operator torchvision::nms does not exist); pip uninstall torchvision" in found.found


def test_the_home_directory_is_found_where_a_shell_left_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = config.settings({"zero_shot": "a", "fine_tuned": "b", "id": "c", "out": "~/report"})
    assert found.out == str(tmp_path / "report")
