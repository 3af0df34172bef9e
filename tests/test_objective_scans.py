"""Scans of both towers and of contrastive batches: models as they lie on disk, against transformers' own forward."""

from __future__ import annotations

import os
import shutil
from datetime import timedelta

import clips
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from saved import moved
from test_objectives import TEMPLATES, small
from torch.nn.functional import cross_entropy

import sharpscope as ss
from sharpscope.commands.merge import Request, merged, prepared
from sharpscope.curvature.trace import Trace
from sharpscope.data import Split
from sharpscope.errors import DataError, UsageError
from sharpscope.journal import encode, read
from sharpscope.models.two_towers import TwoTowers
from sharpscope.pairs import pair_batches
from sharpscope.perturbation import MSharpness
from sharpscope.recipe import CONVENTION


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Two CLIPs that differ in both towers, with one scale, so that logits can be compared."""
    root = tmp_path_factory.mktemp("ends")
    tuned = moved(clips.network(), by=0.3)
    with torch.no_grad():
        tuned.logit_scale.copy_(clips.network().logit_scale)
    return clips.save(root / "base", clips.network()), clips.save(root / "tuned", tuned)


@pytest.fixture(scope="module")
def data(tmp_path_factory, ends):
    return ss.folder(clips.images(tmp_path_factory.mktemp("data"), each=5), ss.load(ends[0]), name="id")


def by_transformers(folder, data):
    """Logits of all images by transformers alone, one template."""
    from transformers import CLIPModel

    texts = clips.tokenizer()([f"a photo of a {name}." for name in data.classes], padding=True, return_tensors="pt")
    images = torch.cat([batch.inputs for batch in data])
    with torch.no_grad():
        return CLIPModel.from_pretrained(folder).eval()(pixel_values=images, **texts).logits_per_image


def scanned(ends, data, objective, **settings):
    settings = {"alphas": [0, 0.3, 1], "measures": [], "progress": False, **settings}
    return ss.scan(ss.load(ends[0]), ss.load(ends[1]), data, objective=objective, **settings)


def losses_of(result):
    rows = result.evals[result.evals["measure"] == "loss"]
    return dict(zip(rows["alpha"], rows["value"], strict=True))


@pytest.fixture(scope="module")
def scans(ends, data, tmp_path_factory):
    """A scan of each objective, saved."""
    found = {}
    for objective in ("image", "both"):
        out = tmp_path_factory.mktemp(objective)
        found[objective] = (scanned(ends, data, objective, out=out), out)
    return found


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_with_both_towers_the_path_is_that_of_merged_checkpoints_loaded_by_the_library(
    alpha, ends, data, scans, tmp_path
):
    out = ss.merge(*ends, alpha, tmp_path / "m")
    expected = float(cross_entropy(by_transformers(out, data), data.targets))
    assert losses_of(scans["both"][0])[alpha] == pytest.approx(expected, abs=1e-5)
    image_only = losses_of(scans["image"][0])[alpha]
    # Heads are mixed there: the same at the ends only.
    assert (image_only == pytest.approx(expected, abs=1e-5)) == (alpha != 0.3)


def test_a_merge_says_whether_the_scan_mixed_what_it_mixes(scans, tmp_path):
    assert "a merge mixes the towers themselves; --objective both" in " ".join(scans["image"][0].meta["warnings"])
    with pytest.warns(UserWarning, match="the text towers are mixed, where the scan mixed the two heads"):
        said = [*merged(prepared(Request("0.3", str(scans["image"][1]))), str(tmp_path / "image"))]
    assert not any(line.startswith("text tower: mixed as") for line in said)
    plan = prepared(Request("0.3", str(scans["both"][1])))
    assert "text tower: mixed as the scan mixed it" in " ".join(merged(plan, str(tmp_path / "both")))
    assert prepared(Request("1", str(scans["image"][1]))).plan.notes == []  # nothing is mixed at an end


def test_a_recipe_of_a_scan_of_both_towers_has_an_alpha_for_text_layers(scans, ends, tmp_path):
    from safetensors.torch import load_file

    (tmp_path / "r.toml").write_text(f'alpha_convention = "{CONVENTION}"\nrules = [["text.block.*", 0.0], ["*", 1.0]]')
    plan = prepared(Request(str(tmp_path / "r.toml"), str(scans["both"][1]))).plan
    list(merged(prepared(Request(str(tmp_path / "r.toml"), str(scans["both"][1]))), str(tmp_path / "m")))
    start, end, found = (load_file(f / "model.safetensors") for f in (*ends, tmp_path / "m"))
    assert plan.alphas["text.block.00"] == 0.0
    for name, tensor in found.items():
        source = start if name.startswith("text_model.encoder.layers.") else end
        assert torch.equal(tensor, source[name]), name


def test_a_text_layer_is_moved_alone_as_in_whole_models_put_together(ends, data):
    from transformers import CLIPModel

    result = scanned(ends, data, "both", alphas=[0, 1], interventions=True, ood={"far": data.named("far")})
    rows = result.interventions.query("layer == 'text.block.00' and question == 'necessary' and split == 'far'")
    start, end = (CLIPModel.from_pretrained(end).state_dict() for end in ends)
    hybrid = CLIPModel.from_pretrained(ends[1]).eval()
    hybrid.load_state_dict({n: start[n] if n.startswith("text_model.encoder.layers.0") else t for n, t in end.items()})
    texts = clips.tokenizer()([f"a photo of a {name}." for name in data.classes], padding=True, return_tensors="pt")
    images = torch.cat([batch.inputs for batch in data])
    with torch.no_grad():
        moved_logits = hybrid(pixel_values=images, **texts).logits_per_image
    right = [int((z.argmax(1) == data.targets).sum()) for z in (moved_logits, by_transformers(ends[1], data))]
    assert right[0] != right[1]
    assert "in full" not in " ".join(result.meta["warnings"])  # computed from the moved layer on
    assert rows["effect"].item() == pytest.approx(100 * (right[0] - right[1]) / len(data))


def test_a_contrastive_scan_holds_the_batches_to_its_plan(ends, data, tmp_path):
    measures = ["trace", "m_sharpness"]
    result = scanned(ends, data, "contrastive", alphas=[0.5], measures=measures, batch_size=4, out=tmp_path)
    assert set(result.layers["measure"]) == set(measures)
    assert result.meta["measures"]["m_sharpness"]["m"] == 4
    assert result.meta["splits"]["id"]["measured"] == 12
    assert (result.meta["objective"], result.meta["plan"]["loss"][0]) == ("contrastive", "contrastive")
    said = " ".join(result.meta["warnings"])
    assert "3 batches of 4 pairs, images with prompts of their classes" in said
    assert "3 images that fill no batch are left out" in said
    with pytest.raises(UsageError, match="batch_size"):
        scanned(ends, data, "contrastive", alphas=[0.5], measures=measures, batch_size=5, out=tmp_path)


def test_the_texts_of_pairs_are_prompts_of_the_classes_drawn_with_the_seed(data):
    library = small("CLIP")
    library.network.config.text_config.max_position_embeddings = 40
    module = TwoTowers(library, library, data.classes, TEMPLATES, library.network.logit_scale)
    batches, _ = pair_batches(data, module, 12, 0, 4)
    again, _ = pair_batches(data, module, 12, 0, 4)
    sample = data.sample(12, 0, 4)
    seen = set()
    for batch, same, plain in zip(batches, again, sample, strict=True):
        assert torch.equal(batch.inputs["image"], plain.inputs)
        assert torch.equal(batch.inputs["input_ids"], same.inputs["input_ids"])
        words = clips.tokenizer().batch_decode(batch.inputs["input_ids"], skip_special_tokens=True)
        for text, label in zip(words, plain.targets.tolist(), strict=True):
            options = [t.format(data.classes[label]).replace(" ", "") for t in TEMPLATES]
            assert text.replace(" ", "") in options
            seen.add(options.index(text.replace(" ", "")))
    assert seen == {0, 1}


LETTERS = "abcdefghijklmno"


class Captioned:
    """Batches as mappings with captions, with labels or without."""

    def __init__(self, data, labelled):
        self.data, self.labelled = data, labelled

    def __iter__(self):
        place = 0
        for x, y in self.data:
            texts = [f"number {letter}" for letter in LETTERS[place : place + len(y)]]
            place += len(y)
            yield {"pixel_values": x, "text": texts, **({"labels": y} if self.labelled else {})}


@pytest.mark.parametrize("labelled", [True, False])
def test_captions_of_a_loader_are_paired_with_their_own_images(labelled, ends, data):
    split = Split(Captioned(data, labelled), "captioned")
    assert split.captions == tuple(f"number {letter}" for letter in LETTERS)
    module = TwoTowers(ss.load(ends[0]).library, ss.load(ends[0]).library, data.classes, ("{}",), torch.tensor(1.0))
    every = torch.cat([batch.inputs for batch in data])
    (batch, *_), said = pair_batches(split, module, None, 0, 4)
    words = clips.tokenizer().batch_decode(batch.inputs["input_ids"], skip_special_tokens=True)
    for image, text in zip(batch.inputs["image"], words, strict=True):
        assert torch.equal(image, every[LETTERS.index(text[-1])])
    assert "images with their captions" in said[0]
    settings = {"alphas": [0.5], "measures": [Trace(relative=2.0, absolute=1e3)], "batch_size": 5}
    result = scanned(ends, data, "contrastive", sharpness_on=split, **settings)
    assert result.meta["curvature_split"] == "captioned"
    assert np.isfinite(result.layers["value"]).all()


def test_captions_longer_than_the_text_tower_reads_are_cut_and_keep_their_end(ends, data):
    items = [{"image": batch.inputs, "text": ["very long " * 20] * len(batch.targets)} for batch in data]
    module = TwoTowers(ss.load(ends[0]).library, ss.load(ends[0]).library, data.classes, ("{}",), torch.tensor(1.0))
    (batch, *_), _ = pair_batches(Split(items, "web"), module, None, 0, 4)
    words = clips.tokenizer()
    whole = words(["very long " * 20])["input_ids"][0]
    assert batch.inputs["input_ids"].tolist() == [[*whole[:39], words.eos_token_id]] * 4
    with pytest.raises(UsageError, match=r"has \d+ tokens, the text tower reads 40"):
        module.tokens(["very long " * 20])


def test_data_without_labels_serve_for_a_contrastive_loss_only(ends, data):
    captions = Split(Captioned(data, labelled=False), "web")
    for settings in (
        {"objective": "both", "sharpness_on": captions},
        {"objective": "contrastive", "batch_size": 5, "ood": {"w": captions}},
    ):
        with pytest.raises(DataError, match=r"has captions but no labels; .*\n  fix: .*sharpness_on with objective="):
            scanned(ends, data, **settings)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            {"text": torch.zeros(3, 5).long()},
            r"has 'text' of type Tensor and no labels\n  fix: captions as a list of str",
        ),
        ({"caption": ["one", "two"]}, "3 images and 2 captions\n  fix: a caption for each image"),
        ({"caption": [1, 2, 3]}, "has 'caption' of type list and no labels"),
        ({"captions": None}, "has 'captions' of type NoneType and no labels"),
    ],
)
def test_captions_that_are_none_are_named(item, message):
    with pytest.raises(DataError, match=message):
        Split([{"image": torch.zeros(3, 2), **item}], "id")


def test_captions_in_some_batches_only_are_refused():
    items = [{"image": torch.zeros(2, 2), "caption": ["a", "b"]}, (torch.zeros(2, 2), torch.tensor([0, 1]))]
    with pytest.raises(DataError, match="some batches of 'id' have labels or captions, others not"):
        Split(items, "id")


# --- what cannot be meant


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "text"}, "objective 'text' is unknown\n  fix: one of image, both, contrastive"),
        ({"objective": "contrastive", "batch_size": 16}, r"gives 15 images, a contrastive batch has 16; .*\n.*15"),
        ({"objective": "contrastive", "loss": "squared_error"}, "with objective='contrastive', which is a loss itself"),
        ({"objective": "contrastive", "label_smoothing": 0.1}, "label_smoothing=0.1 with objective='contrastive'"),
        ({"objective": "image", "loss": "contrastive"}, 'needs both towers and texts\n  fix: objective="contrastive"'),
        (
            {"objective": "contrastive", "batch_size": 5, "measures": [MSharpness(m=4)]},
            "m_sharpness with m=4: the groups of a contrastive loss are its batches, of 5",
        ),
        (
            {"objective": "contrastive", "batch_size": 5, "measures": [MSharpness(m=5, logits="normalised")]},
            "m_sharpness_logit_normalised: a contrastive loss has no logits of classes",
        ),
    ],
)
def test_an_objective_that_cannot_be_meant_is_said(settings, message, ends, data):
    with pytest.raises((UsageError, DataError), match=message):
        scanned(ends, data, **settings)


def test_both_towers_need_two_clips_without_a_head_of_their_own(ends, data, tmp_path):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 3)).eval()
    with pytest.raises(UsageError, match="objective='both' needs both towers of two CLIPs, a Sequential gives logits"):
        ss.scan(net, net, data, objective="both", progress=False)
    start, end = ss.load(ends[0]), ss.load(ends[1])
    end.stored_head = (torch.zeros(3, 8), None)
    with pytest.raises(UsageError, match="brings a head along, which no text tower makes"):
        ss.scan(start, end, data, objective="contrastive", progress=False)


def test_a_text_tower_that_does_not_move_is_said(ends, data, tmp_path):
    tuned = clips.save(tmp_path / "tuned", clips.moved(clips.network()))
    result = scanned((ends[0], tuned), data, "both", alphas=[0])
    assert (
        "the text tower is the same in both models: its layers have sharpness, but do not move"
        in (result.meta["warnings"])
    )


def shared(rank, size, root):
    """Scan contrastively in a group of processes; the first writes."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if size > 1:
        store = f"file://{root}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    a, b = ss.load(root / "base"), ss.load(root / "tuned")
    data = ss.folder(root / "data", a, name="id", progress=False)
    settings = {"alphas": [0.5], "batch_size": 4, "measures": [Trace(most=4), MSharpness(m=4)], "progress": False}
    ss.scan(a, b, data, objective="contrastive", out=root / f"out-{size}", **settings)
    if size > 1:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_whole_batches_and_give_the_bytes_of_one(ends, tmp_path):
    for place in ends:
        shutil.copytree(place, tmp_path / place.name)
    clips.images(tmp_path / "data", each=5)
    shared(0, 1, tmp_path)
    mp.spawn(shared, (2, tmp_path), nprocs=2)
    one, two = (read(tmp_path / f"out-{size}" / "cells.jsonl") for size in (1, 2))
    assert [encode(cell) for cell in one[1]] == [encode(cell) for cell in two[1]]
    assert len(one[1]) == 3
