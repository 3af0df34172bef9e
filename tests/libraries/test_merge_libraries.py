"""A scan of open_clip's own training files, merged, loaded again by the reference it was scanned by, and judged."""

from __future__ import annotations

import copy

import clips
import pytest
import torch
from saved import moved
from saved_libraries import CONFIGS
from typer.testing import CliRunner

from sharpscope.cli import app

open_clip = pytest.importorskip("open_clip")


@pytest.fixture
def named(monkeypatch):
    """A configuration under a name, with open_clip's own vocabulary."""
    config = copy.deepcopy(CONFIGS["ViT"])
    config["text_cfg"] |= {"vocab_size": 49408, "context_length": 77}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny-merge", config)
    return "ViT-tiny-merge"


def called(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_a_merge_of_training_files_is_judged_like_the_scan(named, tmp_path):
    torch.manual_seed(0)
    start = open_clip.create_model(named).eval()
    end = copy.deepcopy(start)
    moved(end.visual, by=0.5)  # of moved text towers a scan mixes the heads, a merge the weights
    for name, network in (("zs", start), ("ft", end)):
        state = {f"module.{key}": tensor for key, tensor in network.state_dict().items()}
        torch.save({"state_dict": state}, tmp_path / f"{name}.pt")
    images, scan, out = clips.images(tmp_path / "images"), tmp_path / "scan", tmp_path / "merged.pt"
    ends = [f"oc:{named}/{tmp_path}/{name}.pt" for name in ("zs", "ft")]
    where = ["--zero-shot", ends[0], "--fine-tuned", ends[1], "--id", images, "--out", scan]
    called("report", *where, "--measures", "m_sharpness", "--alphas", "0,0.5,1", "--limit", "4", "--quiet")
    lines = called("merge", scan, "--recipe", "0.5", "--out", out).splitlines()
    assert any(line.startswith(f"loaded again: CLIP oc:{named}/{out} (open_clip)") for line in lines)
    assert lines[-1].endswith(", 0 images judged otherwise than in the scan")
    middle = torch.load(out, weights_only=True)["state_dict"]
    for key, tensor in start.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(middle[f"module.{key}"], (tensor + end.state_dict()[key]) / 2)
