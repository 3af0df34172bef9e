"""Both towers and contrastive batches as the objective, against transformers' own forwards and losses.

The dense matrices are torch.func's over the library's own model, float64, none of sharpscope's code.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import clips
import numpy as np
import pytest
import torch
from saved import moved
from torch.func import functional_call, grad, jacfwd
from torch.nn.functional import cross_entropy, normalize

import sharpscope as ss
from sharpscope.commands.merge import Request, merged, prepared
from sharpscope.curvature.lanczos import Eigenvalue
from sharpscope.curvature.point import Point
from sharpscope.curvature.trace import Trace
from sharpscope.data import Split
from sharpscope.errors import DataError, UsageError
from sharpscope.losses import contrastive, loss_from
from sharpscope.models.hf import TransformersClip
from sharpscope.models.two_towers import TwoTowers
from sharpscope.objective import Batch, Objective
from sharpscope.pairs import pair_batches, paired_loss
from sharpscope.partition import partition
from sharpscope.perturbation import MSharpness
from sharpscope.recipe import CONVENTION
from sharpscope.table import MODEL
from sharpscope.tree import gaussian

# torch's own, inside its forward mode
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

CLASSES = ("cat", "a dog", "ox")
TEMPLATES = ("a {}.", "the {}")


def small(kind):
    """A CLIP or SigLIP of some 600 weights, float64."""
    import transformers

    words = clips.tokenizer()
    shared = {"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": 1}
    text = {**shared, **ends, "vocab_size": len(words), "max_position_embeddings": 12, "projection_size": 4}
    image = {**shared, "image_size": 4, "patch_size": 2}
    extra = {"projection_dim": 4} if kind == "CLIP" else {}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=image, **extra)
    torch.manual_seed(0)
    network = getattr(transformers, f"{kind}Model")(config).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        network.logit_scale.fill_(0.7)
        if kind == "Siglip":
            network.logit_bias.fill_(-1.0)
    library = TransformersClip(network, "nowhere")
    library.tokenizer = words
    return library


def towers(library, templates=TEMPLATES):
    bias = getattr(library.network, "logit_bias", None)
    return TwoTowers(library, library, CLASSES, templates, library.network.logit_scale, logit_bias=bias)


def pixels(n, side=4):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def called(library, weights, images, texts):
    """The library's own forward at the weights, scale and bias as they are."""
    tokens = library.tokens(texts)
    return functional_call(library.network, weights, (), {"pixel_values": images, **tokens, "return_loss": True})


def class_loss(library, weights, images, labels):
    """Mean cross-entropy of zero-shot logits, the head written out by hand."""
    found = called(library, weights, images, [t.format(name) for name in CLASSES for t in TEMPLATES])
    head = normalize(found.text_embeds.view(len(CLASSES), len(TEMPLATES), -1).mean(1), dim=-1)
    logits = library.network.logit_scale.detach().exp() * found.image_embeds @ head.T
    return cross_entropy(logits, labels)


def case(kind, objective):
    """Return the point, its layers, and the same loss as a function of weights, by the library alone."""
    library = small(kind)
    module, images, labels = towers(library), pixels(6), torch.tensor([0, 1, 2, 2, 0, 1])
    texts = ["one", "two a", "b three", "a dog", "the ox", "zz"]
    if objective == "both":
        batches = (Batch(images[:4], labels[:4]), Batch(images[4:], labels[4:]))
        loss, truth = loss_from("cross_entropy"), lambda w: class_loss(library, w, images, labels)
    else:
        inputs = ({"image": images[i : i + 3], **module.tokens(texts[i : i + 3])} for i in (0, 3))
        batches, loss = tuple(Batch(x, labels[:3]) for x in inputs), paired_loss(module)

        def truth(w):
            return sum(called(library, w, images[i : i + 3], texts[i : i + 3]).loss for i in (0, 3)) / 2

    fn = Objective(lambda w, x: functional_call(module, w, (x,)), loss, batches)
    weights = {n: t.detach() for n, t in [*module.named_parameters(), *module.named_buffers()]}
    names = [n for n, _ in module.named_parameters()]
    return Point(fn, weights, names), partition(names), truth


CASES = [(kind, objective) for kind in ("CLIP", "Siglip") for objective in ("both", "contrastive")]


@pytest.fixture(scope="module", params=CASES, ids=[" ".join(c) for c in CASES])
def dense_case(request):
    point, layers, truth = case(*request.param)
    names, start = list(layers.names), {n: t.detach() for n, t in point.leaves.items()}
    ends = np.cumsum([0, *(start[n].numel() for n in names)])
    places = {n: slice(int(a), int(b)) for n, a, b in zip(names, ends, ends[1:], strict=False)}

    def flat_loss(vector):
        return truth({n: vector[place].view(start[n].shape) for n, place in places.items()})

    flat = torch.cat([start[n].reshape(-1) for n in names])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss, hessian = float(flat_loss(flat).detach()), jacfwd(grad(flat_loss))(flat)
    blocks = {layer: torch.cat([torch.arange(len(flat))[places[n]] for n in ns]) for layer, ns in layers.layers.items()}
    return SimpleNamespace(point=point, layers=layers, loss=loss, hessian=hessian.detach(), blocks=blocks)


def test_the_loss_is_that_of_the_library(dense_case):
    assert dense_case.point.loss == pytest.approx(dense_case.loss, rel=1e-12)


def test_every_layer_of_both_towers_is_differentiated(dense_case):
    assert not dense_case.point.unused
    assert {"visual.block.00", "text.embed", "text.block.00", "text.proj"} <= set(dense_case.layers.layers)


def _flat(tree, dense_case):
    return torch.cat([tree[name].detach().reshape(-1) for name in dense_case.layers.names])


def test_the_hessian_is_the_dense_one_cross_blocks_between_towers_included(dense_case):
    text = torch.cat([rows for layer, rows in dense_case.blocks.items() if layer.startswith("text")])
    vision = torch.cat([rows for layer, rows in dense_case.blocks.items() if layer.startswith("visual")])
    assert dense_case.hessian[text][:, vision].norm() > 0.01 * dense_case.hessian.norm()  # the towers do meet
    for draw in range(3):
        v = gaussian(dense_case.point.leaves, draw)
        flat, found = (_flat(t, dense_case) for t in (v, dense_case.point.product(v)))
        torch.testing.assert_close(found, dense_case.hessian @ flat, rtol=1e-9, atol=1e-8)


def test_traces_and_eigenvalues_of_text_layers_are_those_of_the_dense_blocks(dense_case):
    traces = dict(Trace(relative=0.05)(dense_case.point, dense_case.layers, 0))
    tops = dict(Eigenvalue(tolerance=1e-4)(dense_case.point, dense_case.layers, 0))
    blocks = {**dense_case.blocks, MODEL: torch.arange(len(dense_case.hessian))}
    for layer, rows in blocks.items():
        block = dense_case.hessian[rows][:, rows]
        assert abs(traces[layer].value - float(block.trace())) < 4 * traces[layer].stderr + 1e-9, layer
        assert tops[layer].value == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]), rel=1e-2), layer


def test_the_groups_of_m_sharpness_are_the_batches():
    """One ascent step in a layer on each batch, written out with the library's own loss."""
    library = small("CLIP")
    module, images, texts = towers(library), pixels(6), ["one", "two a", "b three", "a dog", "the ox", "zz"]
    inputs = ({"image": images[i : i + 3], **module.tokens(texts[i : i + 3])} for i in (0, 3))
    fn = Objective(
        lambda w, x: functional_call(module, w, (x,)), contrastive, tuple(Batch(x, torch.zeros(3)) for x in inputs)
    )
    weights = {n: t.detach() for n, t in [*module.named_parameters(), *module.named_buffers()]}
    layers = partition([n for n, _ in module.named_parameters()])
    found = dict(MSharpness(rho=0.1, m=3)(Point(fn, weights, layers.names), layers, 0))
    layer, rises = "text.block.00", []
    for i in (0, 3):
        own = {n: weights[n].clone().requires_grad_() for n in layers.layers[layer]}
        base = called(library, own, images[i : i + 3], texts[i : i + 3]).loss
        slopes = dict(zip(own, torch.autograd.grad(base, [*own.values()]), strict=True))
        length = torch.sqrt(sum(g.square().sum() for g in slopes.values()))
        up = {n: w.detach() + 0.1 * slopes[n] / length for n, w in own.items()}
        rises.append(float((called(library, up, images[i : i + 3], texts[i : i + 3]).loss - base).detach()))
    assert found[layer].value == pytest.approx(np.mean(rises), rel=1e-6)
    assert found[layer].draws == 2
    with pytest.raises(UsageError, match="groups of 2, a contrastive loss has batches of 3\n  fix: m=3"):
        dict(MSharpness(m=2)(Point(fn, weights, layers.names), layers, 0))


def test_groups_moved_together_as_on_a_gpu_rise_as_they_do_one_by_one():
    point, layers, _ = case("CLIP", "both")
    images = torch.cat([batch.inputs for batch in point.objective.batches])
    point.objective = replace(point.objective, batches=(Batch(images, torch.tensor([0, 1, 2, 2, 0, 1])),))
    alone = dict(MSharpness(m=3)(point, layers, 0))

    class AtOnce(MSharpness):
        def _chunks(self, all_groups, point):
            yield all_groups

    together = dict(AtOnce(m=3)(point, layers, 0))
    for layer, estimate in alone.items():
        assert together[layer].value == pytest.approx(estimate.value, rel=1e-6), layer


def test_a_contrastive_batch_is_never_cut():
    point, _, _ = case("CLIP", "contrastive")
    for change in ({"pieces": 2}, {"batches": (*point.objective.batches, point.objective.batches[0].split(3)[0])}):
        with pytest.raises(UsageError, match=r"a contrastive loss on batches in (2 pieces|sizes 1, 3)"):
            replace(point.objective, **change)


def test_the_head_follows_the_text_tower_written_to_in_place_or_exchanged():
    module, images = towers(small("CLIP")).requires_grad_(False), pixels(2)
    with torch.no_grad():
        before = module(images)
        assert torch.equal(module(images), before)
        module.text_projection.weight.mul_(-1.0)
        torch.testing.assert_close(module(images), -before)
        changed = {"text_projection.weight": -module.text_projection.weight}
        torch.testing.assert_close(functional_call(module, changed, (images,)), before)
        torch.testing.assert_close(module(images), -before)


@pytest.mark.parametrize(("differentiated", "encodings"), [(False, 1), (True, 3)])
def test_without_gradients_class_texts_are_encoded_once_for_all_batches(differentiated, encodings):
    library, images, calls = small("CLIP"), pixels(2), []
    module = towers(library).requires_grad_(differentiated)
    module.text_model.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        for _ in range(3):
            module(images)
    assert len(calls) == encodings


# --- a scan of models as they lie on disk


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
