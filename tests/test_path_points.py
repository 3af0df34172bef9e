"""Alphas that cannot be meant are refused, those that must be read with care are said, at a shell and in Python."""

import clips
import pytest
import torch
from nets import Vit, conv, images
from torch.utils.data import DataLoader, TensorDataset

import sharpscope as ss
from sharpscope.config import settings
from sharpscope.errors import MeasurementError, UsageError
from sharpscope.merging import merge_plan, read_weights
from sharpscope.plan import alphas_from, path_notes
from sharpscope.recipe import Recipe


@pytest.mark.parametrize("given", ["11.0", "-3", "2.0", [11.0], [11]])
def test_a_whole_number_alone_beyond_the_path_is_no_point(given):
    chosen = settings({"zero_shot": "a", "fine_tuned": "b", "id": "c", "alphas": given}).alphas
    with pytest.raises(UsageError, match=r"far off the path, which runs from 0 to 1\n  fix: --alphas 11 \(alphas=11\)"):
        alphas_from(chosen)


def test_points_off_the_path_that_can_be_meant_are_taken():
    assert alphas_from([1.5]) == (1.5,)
    assert alphas_from([0, 1, 2]) == (0, 1, 2)
    assert alphas_from([1.0]) == (1.0,)


@pytest.mark.parametrize(
    ("alphas", "said"),
    [
        ([0.5], ["the alphas lack 0 (the zero-shot model) and 1 (the fine-tuned model): "]),
        ([0, 0.5], ["the alphas lack 1 (the fine-tuned model): "]),
        ([-0.5, 0, 1, 1.5], ["alpha -0.5, 1.5 lies beyond the two models"]),
        ([0, 1], []),
    ],
)
def test_an_end_that_is_missing_and_an_alpha_beyond_the_models_are_said(alphas, said):
    found = path_notes(alphas_from(alphas))
    assert len(found) == len(said)
    assert all(note.startswith(start) for note, start in zip(found, said, strict=True))
    x, y = images(4)
    data = DataLoader(TensorDataset(x.float(), y), batch_size=4)
    result = ss.scan(Vit().eval(), Vit().eval(), data, alphas=alphas, measures=(), progress=False)
    assert [note for note in result.meta["warnings"] if "alpha" in note] == found


def test_a_dry_run_says_them(run, tmp_path):
    clips.pair(tmp_path)
    clips.images(tmp_path / "id")
    ends = ("--zero-shot", tmp_path / "base", "--fine-tuned", tmp_path / "tuned", "--id", tmp_path / "id")
    code, out, _ = run("report", *ends, "--alphas", "0.5", "--measures", "", "--out", tmp_path / "out", "--dry-run")
    assert code == 0
    assert "  note: the alphas lack 0 (the zero-shot model) and 1 (the fine-tuned model): " in out


def test_a_scan_says_them_before_it_measures_and_in_what_it_prints(run, tmp_path):
    clips.pair(tmp_path)
    clips.images(tmp_path / "id")
    ends = ("--zero-shot", tmp_path / "base", "--fine-tuned", tmp_path / "tuned", "--id", tmp_path / "id")
    report = ("report", *ends, "--alphas", "0,0.5,1.5", "--measures", "", "--out", tmp_path / "out")
    code, out, err = run(*report)
    lacking = "the alphas lack 1 (the fine-tuned model): nothing is recommended without both ends"
    beyond = "alpha 1.5 lies beyond the two models, outside of [0, 1]"
    assert code == 0
    assert err.splitlines()[1:3] == [f"  note: {lacking}", f"  note: {beyond}"]
    assert err.splitlines()[3].startswith("alpha 0 done (1/3, ")
    assert f"Warning: {lacking}\nWarning: {beyond}\n" in out
    assert run(*report, "--fresh", "--quiet") == (0, out, "")


@pytest.mark.parametrize(("alpha", "least"), [(2.0, "-0.6"), (-0.5, "-0.25")])
def test_a_running_variance_below_zero_beyond_the_models_is_named(alpha, least):
    ends = [conv().eval(), conv().eval()]
    for end, variance in zip(ends, ([1.0, 1.0, 0.5, 1.0], [1.0, 0.2, 2.0, 1.0]), strict=True):
        end[1].running_var.copy_(torch.tensor(variance))
    x, y = images(4)
    said = (
        rf"the loss at alpha {alpha:g} on 'id' is nan: extrapolated beyond the two models, the running variance "
        rf"'1\.running_var' goes down to {least} there; 1 of 3 alphas \({alpha:g}\) could not be measured, 2 are\n"
        r"  fix: alphas from 0 to 1"
    )
    with pytest.raises(MeasurementError, match=said):
        ss.scan(*ends, [(x.float(), y)], alphas=[0, 1, alpha], measures=(), progress=False)


def test_a_loss_that_is_nan_beyond_the_models_for_another_reason_is_not_laid_to_variances():
    ends = [conv().eval(), conv().eval()]
    with torch.no_grad():
        ends[1][5].weight.fill_(3e38)
    ends[1][1].running_var.mul_(0.7)
    x, y = images(4)
    with pytest.raises(MeasurementError, match=r"the loss at alpha 1\.5 on 'id' is (nan|inf); 1 of 2 alphas"):
        ss.scan(*ends, [(x.float(), y)], alphas=[0, 1.5], measures=(), progress=False)


def test_a_merge_beyond_the_two_models_says_so(tmp_path):
    clips.pair(tmp_path)
    ends = [read_weights(tmp_path / name) for name in ("base", "tuned")]
    for alpha, notes in ((1.5, ["alpha 1.5 lies beyond the two models, outside of [0, 1]"]), (0.5, [])):
        assert merge_plan(*ends, Recipe.uniform(alpha)).notes == notes


@pytest.mark.parametrize(
    ("flags", "fix"),
    [
        (("--limit", "0"), "--limit 256 (limit=256); --limit all (limit=None)"),
        (("--objective", "contrastive", "--captions"), "without --captions (captions=False)"),
        (("--audit", "nope"), "--audit FILE: the log that training wrote"),
    ],
)
def test_the_way_out_is_said_in_words_of_the_shell(run, tmp_path, flags, fix):
    clips.pair(tmp_path)
    clips.images(tmp_path / "id")
    ends = ("--zero-shot", tmp_path / "base", "--fine-tuned", tmp_path / "tuned", "--id", tmp_path / "id")
    code, _, err = run("report", *ends, *flags, "--out", tmp_path / "out", "--dry-run")
    assert (code, f"\n  fix: {fix}" in err) == (2, True), err
