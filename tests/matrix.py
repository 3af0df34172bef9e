"""What must hold for every kind of model on disk, whichever library wrote it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from saved import CLASSES, Saved, pixels

import sharpscope as ss
from sharpscope.commands.merge import Request, merged, prepared
from sharpscope.data import Split
from sharpscope.errors import UsageError
from sharpscope.measures import Trace
from sharpscope.models import load_pair
from sharpscope.models.compatibility import pair
from sharpscope.network import logits
from sharpscope.recipe import CONVENTION


def check_logits(saved: Saved) -> None:
    images = pixels(saved.side)
    start, _, _ = pair(*load_pair(saved.zero_shot, saved.fine_tuned), CLASSES)
    with torch.no_grad():
        expected, found = saved.logits(images), logits(start(images))
    assert expected.shape == (len(images), len(CLASSES))
    assert expected.std() > 0.01  # they tell images and classes apart
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def check_layers(saved: Saved) -> None:
    model = load_pair(saved.zero_shot, saved.fine_tuned)[0]
    names = [name for name, _ in model.network.named_parameters()]
    for granularity in ("tower", "block", "part", "tensor"):
        found = ss.layers(model, granularity)
        assert sorted(found.names) == sorted(names)
        assert "other" not in found.layers


def check_scan(saved: Saved) -> None:
    start, end = load_pair(saved.zero_shot, saved.fine_tuned)
    data = Split([(pixels(saved.side, 6), torch.arange(6) % 3)], "id", classes=CLASSES)
    rough = Trace(relative=2.0, absolute=1e3)
    result = ss.scan(start, end, data, alphas=[0.5], measures=[rough], limit=3, progress=False)
    rows = result.layers
    assert set(rows["layer"]) > {"visual.embed", "visual.block.00", "visual.block.01"}
    assert np.isfinite(rows["value"]).all()
    assert result.meta["models"]["zero_shot"]["hash"] != result.meta["models"]["fine_tuned"]["hash"]


def check_two_towers(saved: Saved) -> None:
    """With both towers the logits are the library's own, and every text layer is measured."""
    start, end = load_pair(saved.zero_shot, saved.fine_tuned)
    data = Split([(pixels(saved.side, 6), torch.arange(6) % 3)], "id", classes=CLASSES)
    if saved.own_head:
        with pytest.raises(UsageError, match="has no text tower"):
            ss.scan(start, end, data, objective="both", progress=False)
        return
    module, _, _ = pair(start, end, CLASSES, "both")
    with torch.no_grad():
        torch.testing.assert_close(module(pixels(saved.side)), saved.logits(pixels(saved.side)), rtol=0, atol=1e-5)
    rough = Trace(relative=2.0, absolute=1e3)
    settings = {"alphas": [0.5], "measures": [rough], "limit": 3, "batch_size": 3, "progress": False}
    found = {o: ss.scan(start, end, data, objective=o, **settings) for o in ("both", "contrastive")}
    for result in found.values():
        assert set(result.layers["layer"]) > {"visual.block.00", "text.embed", "text.block.00", "text.norm"}
        assert np.isfinite(result.layers["value"]).all()
        assert result.meta["unused"] == []
        assert {"head", "logit_scale"}.isdisjoint(result.meta["layers"])
    losses = [result.evals.query("measure == 'loss'")["value"].item() for result in found.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # evaluation is classification


def check_merge(saved: Saved, out: Path) -> None:
    """The merge reloads strictly in its library, by this package, too, and lies half-way between the ends."""
    said = [*merged(prepared(Request("0.5", zero_shot=saved.zero_shot, fine_tuned=saved.fine_tuned)), str(out))]
    assert said[1].startswith("loaded again: "), said
    saved.reload(out)
    start, end = (model.network.state_dict() for model in load_pair(saved.zero_shot, saved.fine_tuned))
    found = load_pair(saved.zero_shot, str(out))[1].network.state_dict()
    assert found.keys() == end.keys()
    for name, tensor in found.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, (start[name] + end[name]) / 2, rtol=1e-6, atol=1e-7)


def check_scanned_merge(saved: Saved, root: Path) -> None:
    """Of a scan, too, each tensor gets the alpha of its layer, whatever name it has on disk; so does the function."""
    ends = load_pair(saved.zero_shot, saved.fine_tuned)
    data = Split([(pixels(saved.side, 6), torch.arange(6) % 3)], "id", classes=CLASSES)
    ss.scan(*ends, data, alphas=[0.5], measures=[], progress=False).save(root / "scan")
    rules = [["visual.block.01", 0.25], ["*", 0.5]]
    (root / "r.toml").write_text(f'alpha_convention = "{CONVENTION}"\nrules = {rules}')
    for recipe, out in (("0.5", "uniform"), (str(root / "r.toml"), "layers")):
        said = [*merged(prepared(Request(recipe, folder=str(root / "scan"))), str(root / out))]
        assert said[1].startswith("loaded again: "), said
        found = load_pair(saved.zero_shot, str(root / out))[1].network
        between = {}
        start, end = (model.network.state_dict() for model in ends)
        for layer, names in ss.layers(ends[0]).layers.items():
            alpha = 0.25 if (layer, out) == ("visual.block.01", "layers") else 0.5
            between |= {name: torch.lerp(start[name], end[name], alpha) for name in names}
        for name, tensor in between.items():
            torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)
        if saved.own_head:  # of a CLIP the scan mixes the heads
            with torch.no_grad():
                expected = torch.func.functional_call(ends[0].network, between, (pixels(saved.side),))
                torch.testing.assert_close(logits(found(pixels(saved.side))), logits(expected), rtol=0, atol=1e-5)
