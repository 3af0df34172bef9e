"""From two references and folders to a page, by the command line alone."""

from __future__ import annotations

import clips
import pytest
from saved_libraries import open_clip_saved
from typer.testing import CliRunner

from sharpscope.cli import app

pytest.importorskip("open_clip")


def test_an_open_clip_pair_is_reported_from_the_command_line(tmp_path):
    saved = open_clip_saved(tmp_path / "models", "ViT")
    images = clips.images(tmp_path / "images")
    options = ["--measures", "m_sharpness", "--alphas", "0,1", "--quiet", "--out", str(tmp_path / "out")]
    where = ["--zero-shot", saved.zero_shot, "--fine-tuned", saved.fine_tuned, "--id", str(images)]
    done = CliRunner().invoke(app, ["report", *where, *options])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "index.html").is_file()
    assert "visual.block.01" in (tmp_path / "out" / "layers.csv").read_text()


def test_layers_of_an_open_clip_model_are_printed(tmp_path):
    saved = open_clip_saved(tmp_path, "SigLIP")
    done = CliRunner().invoke(app, ["layers", "--model", saved.zero_shot])
    assert done.exit_code == 0, done.output
    assert [line.split()[0] for line in done.output.splitlines()][:2] == ["visual.embed", "visual.block.00"]
    assert "visual.pool" in done.output
