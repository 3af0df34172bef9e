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
from torch.func import functional_call, grad, jacfwd
from torch.nn.functional import cross_entropy, normalize

from sharpscope.curvature.lanczos import Eigenvalue
from sharpscope.curvature.point import Point
from sharpscope.curvature.trace import Trace
from sharpscope.errors import UsageError
from sharpscope.losses import contrastive, loss_from
from sharpscope.models.hf import TransformersClip
from sharpscope.models.two_towers import TwoTowers
from sharpscope.objective import Batch, Objective
from sharpscope.pairs import paired_loss
from sharpscope.partition import partition
from sharpscope.perturbation import MSharpness
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
