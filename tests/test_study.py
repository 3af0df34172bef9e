"""The study: its optimisers are sharpscope's, and its write-up is what the stored rows say."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from optional import needs
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
for folder in ("glyph", "study"):
    sys.path.insert(0, str(ROOT / "benchmarks" / folder))

needs("transformers")
from captions import CLASSES  # noqa: E402
from finetune import zero_shot_head  # noqa: E402
from points import Line, Place  # noqa: E402
from rows import LAYERS, MODEL  # noqa: E402
from sets import own_faces  # noqa: E402
from sharpness import CORE, Classifier, scanned  # noqa: E402
from tower import image_weights  # noqa: E402
from updates import CLIP, HEAD, StackedUpdate  # noqa: E402

import sharpscope as ss  # noqa: E402
from sharpscope.demo import ASSETS  # noqa: E402
from sharpscope.optim import AdamL2SP, AdamSPD  # noqa: E402

NAMES = {HEAD: (3, 4), "vision_model.bias": (4,), "vision_model.weight": (5, 4)}
STEPS, RATE = 12, 0.05


def gradients(seed: int) -> list[dict[str, torch.Tensor]]:
    """Gradients that turn round halfway, so that SPD has something to pull back."""
    draw = torch.Generator().manual_seed(seed)
    base = {n: torch.randn(s, generator=draw, dtype=torch.float64) for n, s in NAMES.items()}
    noise = [{n: torch.randn(s, generator=draw, dtype=torch.float64) for n, s in NAMES.items()} for _ in range(STEPS)]
    return [{n: (1 if i < STEPS // 3 else -0.2) * base[n] + 0.3 * noise[i][n] for n in NAMES} for i in range(STEPS)]


def clipped(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    length = torch.stack([g.square().sum() for g in found.values()]).sum().sqrt()
    return {n: g * min(1.0, CLIP / (float(length) + 1e-6)) for n, g in found.items()}


def rival(method: str, start: dict[str, torch.Tensor], decay: float) -> dict[str, torch.Tensor]:
    """Where sharpscope's or torch's optimiser ends up."""
    weights = {n: torch.nn.Parameter(w.clone()) for n, w in start.items()}
    matrices = [(n, p) for n, p in weights.items() if p.dim() > 1]
    vectors = [(n, p) for n, p in weights.items() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    if method == "AdamW":
        groups = [g | {"params": [p for _, p in g["params"]]} for g in groups]
        update = torch.optim.AdamW(groups, lr=RATE)
    elif method == "SPD":
        update = AdamSPD(groups, lr=RATE, anchor="init", decay=1.0)
    else:
        update = AdamL2SP(groups, lr=RATE, anchor="init", strength=0.5)
    for found in gradients(1):
        for n, g in clipped(found).items():
            weights[n].grad = g.clone()
        update.step()
    return {n: p.detach() for n, p in weights.items()}


@pytest.mark.parametrize(("run", "method", "decay"), [(0, "AdamW", 0.2), (1, "L2-SP", 0.0), (2, "SPD", 0.1)])
def test_each_run_of_a_stack_moves_as_the_optimiser_of_sharpscope_does(run, method, decay):
    draw = torch.Generator().manual_seed(0)
    start = {n: torch.randn(s, generator=draw, dtype=torch.float64) for n, s in NAMES.items()}
    stacked = {n: w.expand(3, *w.shape).clone() for n, w in start.items()}
    numbers = [torch.tensor(v, dtype=torch.float64) for v in ([0.2, 0.0, 0.1], [0.0, 0.5, 0.0], [0.0, 0.0, 1.0])]
    update = StackedUpdate(stacked, *numbers)
    update.rate.fill_(RATE)
    for found in gradients(1):
        update.step({n: g.expand(3, *g.shape) for n, g in found.items()})
    for name, end in rival(method, start, decay).items():
        torch.testing.assert_close(stacked[name][run], end, rtol=1e-9, atol=1e-11)
    active = sum(int(a[2]) for a in update.active.values())
    assert active > 0  # the projection of SPD was exercised


def test_a_probing_run_moves_its_head_alone_and_starts_the_rest_afresh():
    stacked = {n: torch.zeros(2, *s, dtype=torch.float64) for n, s in NAMES.items()}
    nothing = torch.zeros(2, dtype=torch.float64)
    update = StackedUpdate(stacked, nothing, nothing, nothing)
    update.rate.fill_(RATE)
    update.probing.copy_(torch.tensor([0.0, 1.0]))
    steps = [{n: g.expand(2, *g.shape) for n, g in found.items()} for found in gradients(2)]
    update.step(steps[0])
    assert stacked[HEAD][1].abs().min() > 0
    assert not any(stacked[n][1].any() for n in NAMES if n != HEAD)
    update.probing.zero_()
    update.step(steps[1])
    first = stacked["vision_model.weight"][1]  # its first step: the rate itself, as bias correction starts with it
    torch.testing.assert_close(first.abs(), torch.full_like(first, RATE), rtol=1e-3, atol=0.0)


@pytest.fixture(scope="module")
def base() -> dict[str, torch.Tensor]:
    found = load_file(ASSETS / "base" / "model.safetensors")
    return {n: w.float() for n, w in found.items() if w.is_floating_point()}


def test_the_classifier_of_the_study_is_the_clip_that_sharpscope_loads(base):
    templates = (ASSETS / "templates.txt").read_text().splitlines()
    loaded = ss.load(ASSETS / "base", templates=templates).classifier(CLASSES)
    own = Classifier(image_weights(base), zero_shot_head(base))
    pixels = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(own(pixels), loaded(pixels), rtol=1e-4, atol=1e-4)


def test_a_scan_of_the_study_has_a_row_for_every_layer_and_the_model(base):
    start = image_weights(base)
    end = {n: w + 0.05 * torch.randn(w.shape, generator=torch.Generator().manual_seed(1)) for n, w in start.items()}
    draw = np.random.default_rng(0)
    data = {"images": draw.integers(0, 255, (36, 32, 32, 3), dtype=np.uint8), "labels": np.arange(36)}
    rows = scanned((start, end), zero_shot_head(base), data, [0.0, 1.0], (CORE[1],))
    assert set(rows["layer"]) == {*LAYERS, MODEL}
    assert (rows["value"] > 0).all()
    assert len(rows) == 2 * 10


def test_a_layer_sparsified_wholly_or_reset_is_at_zero_shot_and_a_random_move_is_as_long(base):
    start = image_weights(base)
    end = {n: w + 0.05 * torch.randn(w.shape, generator=torch.Generator().manual_seed(1)) for n, w in start.items()}
    places = {place: w for place, w in Line(start, end).places() if place.alpha == 1.0 and place.layer == "visual.norm"}
    name = "vision_model.post_layernorm.weight"
    torch.testing.assert_close(places[Place("layer", "visual.norm", 1.0, 0.0)][name], start[name])
    shares = (places[Place("sparse", "visual.norm", 1.0, 0.9)][name] == start[name]).float().mean()
    assert 0.7 < float(shares) < 1
    own = [n for n in start if "post_layernorm" in n]
    moved = places[Place("random", "visual.norm", 1.0, 0.0)]
    far = sum((moved[n] - end[n]).square().sum() for n in own)
    assert float(far) == pytest.approx(float(sum((start[n] - end[n]).square().sum() for n in own)), rel=1e-4)


def test_bases_have_no_face_in_common_and_none_of_test_or_fine_tuning():
    faces = [{"split": s, "style": "serif", "design": i // 2} for i, s in enumerate(["pretrain"] * 30 + ["test"] * 6)]
    thirds = [[i for i, f in enumerate(own_faces(faces, b)) if f["split"] == "pretrain"] for b in range(3)]
    assert sorted(i for third in thirds for i in third) == list(range(30))
    assert min(map(len, thirds)) >= 8


@pytest.mark.slow
def test_the_committed_write_up_is_what_the_stored_rows_say():
    from rows import rows
    from writeup import findings, rendered

    text = rendered(findings(rows()))
    assert text == (ROOT / "figures" / "STUDY.md").read_text(encoding="utf-8"), "run `make study` and commit figures/"


def test_no_number_of_a_result_is_typed_in_the_write_up():
    """Numbers in the template are settings of the plan; whatever comes of a measurement stands in braces."""
    template = (ROOT / "benchmarks" / "study" / "STUDY.md.jinja").read_text(encoding="utf-8")
    words = re.sub(r"\{\{.*?\}\}|\{%.*?%\}|<!--.*?-->|\]\(.*?\)|`.*?`", " ", template, flags=re.DOTALL)
    settings = {"0.43", "8", "360", "95", "1e-2", "1e-3", "3e-3", "1", "16", "12"}
    settings |= {".5", "90", "50", "1.5", "22,000", ".1", "0"}
    found = set(re.findall(r"(?<![\w.])[−-]?\d*[.,]?\d+(?:e-\d+)?(?![\w])", re.sub(r"\bH[1-6]\b", " ", words)))
    assert found <= settings


def test_the_plan_was_committed_with_its_rules_and_names_every_confirmatory_measure():
    from rows import CONFIRMATORY, LAYERS

    plan = (ROOT / "benchmarks" / "study" / "PLAN.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in plan for name in CONFIRMATORY)
    assert len(LAYERS) == 9
    for number in range(1, 7):
        section = plan.split(f"**H{number}, ")[1].split("\n\n")[0]
        assert "upported if" in section and "ontradicted if" in section and "ontrol" in section  # noqa: PT018


def test_every_planned_model_has_rows():
    from rows import ALPHAS, CONFIRMATORY, LAYERS, rows

    stored = rows()
    cohort = stored.cohort
    assert set(cohort["base"]) == {0, 1, 2}
    assert len(cohort) > 100
    assert len(cohort) + len(stored.missed) == 3 * 38
    curves = stored.curves
    assert len(curves) == len(cohort) * len(CONFIRMATORY) * (len(LAYERS) + 1) * len(ALPHAS)
    assert stored.ends.shape == (len(cohort), 2 * 16 * (len(LAYERS) + 1))
    assert not stored.ends.isna().to_numpy().any()


def test_holm_never_lowers_a_p_value_and_multiplies_the_smallest_by_their_number():
    from inference import holm

    p = [0.01, 0.04, 0.03, 0.2]
    found = holm(p)
    assert found.min() == pytest.approx(0.04)
    assert all(a >= b for a, b in zip(found, p, strict=True))


def test_an_interval_over_bases_covers_the_mean_and_widens_where_bases_differ():
    from inference import effect

    draw = np.random.default_rng(0)
    alike = {b: draw.normal(1.0, 0.1, 20) for b in range(3)}
    apart = {b: alike[b] + shift for b, shift in enumerate((-1.0, 0.0, 1.0))}
    near, far = effect(alike), effect(apart)
    assert near.low < near.value < near.high
    assert far.high - far.low > 5 * (near.high - near.low)
    assert near.sign == 1
    assert effect({0: np.ones(3), 1: -np.ones(3), 2: 5 * np.ones(3)}).sign == 0  # bases disagree


def test_a_planted_relation_is_found_across_models_and_an_unrelated_one_is_not():
    from across import Across
    from rows import MODEL, rows

    stored = rows()
    raw = Across(stored, "B", held=False)
    column = ("train", "trace", MODEL)
    place = raw.columns.index(column)
    for cohort in raw.cohorts:
        cohort.predictors[place] = cohort.target  # the OOD error itself
        cohort.predictors[place - 1] = np.random.default_rng(len(cohort.target)).normal(size=len(cohort.target))
    everywhere = dict.fromkeys(range(3), raw.tested.index(place))
    assert raw.effect(column).value == pytest.approx(1.0)
    assert raw.p(everywhere) < 0.001
    null = raw.chance[0][raw.tested.index(place)]
    assert abs(null.mean()) < 0.02  # without covariates chance lies at zero
