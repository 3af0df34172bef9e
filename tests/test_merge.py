"""Laws of the merge: end points are bytes, between them the path, in the layout of the fine-tuned checkpoint."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import weakref
from pathlib import Path

import clips
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sharpscope as ss
from sharpscope.merging import MergePlan, merge, merge_plan, read_weights
from sharpscope.models.weights import Weights
from sharpscope.recipe import Recipe
from sharpscope.recipe_file import read_recipe

NAMES = {
    "stem.weight": (6, 4),
    "blocks.0.weight": (5, 6),
    "blocks.1.weight": (5, 5),
    "blocks.1.bias": (5,),
    "scale": (),
    "none": (0, 3),
}


def tensors(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in NAMES.items()}
    return {name: tensor.to(dtype) for name, tensor in found.items()} | {"position_ids": torch.arange(7)}


def pair(root, start=torch.float32, end=torch.float32):
    """Two files of weights."""
    for name, seed, dtype in (("zs", 0, start), ("ft", 1, end)):
        save_file(tensors(seed, dtype), root / f"{name}.safetensors", metadata={"format": "pt", "note": name})
    return root / "zs.safetensors", root / "ft.safetensors"


def data(path):
    """The bytes of a safetensors file after its header."""
    content = Path(path).read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A zero-shot CLIP and its fine-tuned self, both whole and in shards."""
    root = tmp_path_factory.mktemp("clips")
    clips.pair(root)
    with contextlib.redirect_stderr(io.StringIO()):
        clips.moved(clips.network()).save_pretrained(root / "sharded", max_shard_size="20KB")
    assert len(list((root / "sharded").glob("*.safetensors"))) > 2
    return root


# --- end points and between


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("alpha", "end"), [(0.0, 0), (1.0, 1)])
def test_at_alpha_0_and_1_the_bytes_are_those_of_the_source(tmp_path, dtype, alpha, end):
    sources = pair(tmp_path, dtype, dtype)
    assert data(merge(*sources, alpha, tmp_path / "m.safetensors")) == data(sources[end])


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_not_a_number_keeps_its_bits_at_the_ends(tmp_path, alpha):
    """Half the payloads of NaN do not survive a cast to float32 and back; copies keep them."""
    for i, name in enumerate("ab"):
        bits = torch.tensor([0x7C01 + i, 0x7E00, 0x0001 + i], dtype=torch.int16)
        save_file({"w": bits.view(torch.float16)}, tmp_path / f"{name}.safetensors")
    merge(tmp_path / "a.safetensors", tmp_path / "b.safetensors", alpha, tmp_path / "m.safetensors")
    assert data(tmp_path / "m.safetensors") == data(tmp_path / f"{'ab'[int(alpha)]}.safetensors")


@pytest.mark.parametrize("kind", ["tuned", "sharded"])
@pytest.mark.parametrize(("alpha", "end"), [(0.0, "base"), (1.0, "tuned")])
def test_the_end_points_of_a_clip_are_its_bytes_also_in_shards(checkpoints, tmp_path, kind, alpha, end):
    merge(checkpoints / "base", checkpoints / kind, alpha, tmp_path / "m")
    expected, found = load_file(checkpoints / end / "model.safetensors"), {}
    for file in (tmp_path / "m").glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == expected.keys()
    assert all(found[k].numpy().tobytes() == expected[k].numpy().tobytes() for k in expected)
    if end != "base":
        for file in (checkpoints / kind).glob("*.safetensors"):
            assert data(tmp_path / "m" / file.name) == data(file)


def test_layers_at_0_and_1_in_one_recipe_have_the_bytes_of_either_source(tmp_path):
    recipe = Recipe((("blocks.*", 0.0), ("*", 1.0)))
    merge(*pair(tmp_path), recipe, tmp_path / "m.safetensors")
    found, start, end = load_file(tmp_path / "m.safetensors"), tensors(0), tensors(1)
    for name, tensor in found.items():
        assert torch.equal(tensor, (start if name.startswith("blocks") else end)[name]), name


@pytest.mark.filterwarnings("ignore:alpha .* lies beyond the two models")
@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.7, -0.5, 1.5])
def test_a_uniform_recipe_is_the_path_bit_for_bit(checkpoints, tmp_path, alpha):
    from sharpscope.path import Path as WeightPath

    merge(checkpoints / "base", checkpoints / "tuned", alpha, tmp_path / "m")
    ends = [ss.load(checkpoints / name).network.state_dict() for name in ("base", "tuned")]
    ends = [{name: tensor for name, tensor in end.items() if tensor.is_floating_point()} for end in ends]
    expected, found = WeightPath(*ends)(alpha), ss.load(tmp_path / "m").network.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-15), (torch.float32, 1e-7), (torch.bfloat16, 2**-8)])
def test_between_the_ends_numpy_agrees_to_one_rounding(tmp_path, dtype, within):
    merge(*pair(tmp_path, dtype, dtype), 0.3, tmp_path / "m.safetensors")
    found, start, end = (x for x in (load_file(tmp_path / "m.safetensors"), tensors(0, dtype), tensors(1, dtype)))
    for name in NAMES:
        a, b = (np.asarray(x[name].double()) for x in (start, end))
        np.testing.assert_allclose(found[name].double(), a + 0.3 * (b - a), rtol=2 * within, atol=2 * within)
        assert found[name].dtype == dtype


def test_half_precision_is_mixed_in_float32_and_rounded_once(tmp_path):
    merge(*pair(tmp_path, torch.float16, torch.float16), 0.3, tmp_path / "m.safetensors")
    found, start, end = load_file(tmp_path / "m.safetensors"), tensors(0, torch.float16), tensors(1, torch.float16)
    for name in NAMES:
        a, b = (np.asarray(x[name].double()) for x in (start, end))
        exact = torch.as_tensor(a + 0.3 * (b - a)).half()
        assert torch.allclose(found[name].double(), exact.double(), rtol=2**-12, atol=1e-7), name
    naive = {n: start[n] + 0.3 * (end[n] - start[n]) for n in NAMES}  # rounded three times
    assert any(not torch.equal(found[n], naive[n]) for n in NAMES)


def test_dtypes_are_those_of_the_fine_tuned_model_and_it_is_said(tmp_path):
    zero_shot, fine_tuned = pair(tmp_path, torch.float32, torch.bfloat16)
    plan = merge_plan(read_weights(zero_shot), read_weights(fine_tuned), Recipe.uniform(0.0))
    assert plan.notes == [
        "6 tensors are float32 in the zero-shot and bfloat16 in the fine-tuned model (blocks.0.weight, ...); "
        "they are written as bfloat16"
    ]
    with pytest.warns(UserWarning, match="they are written as bfloat16"):
        merge(zero_shot, fine_tuned, 0.0, tmp_path / "m.safetensors")
    found = load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(found[name], tensors(0)[name].bfloat16()) for name in NAMES)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_float8_can_be_merged(tmp_path, alpha):
    for name, value in (("a", 1.0), ("b", 2.0)):
        save_file({"w": torch.full((4,), value).to(torch.float8_e4m3fn)}, tmp_path / f"{name}.safetensors")
    merge(tmp_path / "a.safetensors", tmp_path / "b.safetensors", alpha, tmp_path / "m.safetensors")
    found = load_file(tmp_path / "m.safetensors")["w"]
    assert (found.dtype, found.float().tolist()) == (torch.float8_e4m3fn, [1 + alpha] * 4)


# --- layout


def test_the_layout_is_that_of_the_fine_tuned_checkpoint(checkpoints, tmp_path):
    for name in ("trainer_state.json", "eval_results.json", "README.md", "optimizer.pt"):
        (checkpoints / "tuned" / name).write_text("{}")
    (checkpoints / "tuned" / "checkpoint-5").mkdir(exist_ok=True)
    merge(checkpoints / "base", checkpoints / "tuned", 0.5, tmp_path / "m")
    assert {path.name for path in (tmp_path / "m").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "recipe.toml",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for path in (tmp_path / "m").glob("*.json"):
        assert path.read_bytes() == (checkpoints / "tuned" / path.name).read_bytes()
    first, second = (
        json.loads(read_header(folder / "model.safetensors")) for folder in (checkpoints / "tuned", tmp_path / "m")
    )
    del first["__metadata__"], second["__metadata__"]
    assert list(first.items()) == list(second.items())  # order, dtypes, shapes, offsets


def read_header(path):
    content = path.read_bytes()
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


@pytest.mark.parametrize("kind", ["tuned", "sharded"])
def test_transformers_loads_the_merge_with_no_missing_or_unexpected_key(checkpoints, tmp_path, kind):
    from transformers import CLIPModel

    merge(checkpoints / "base", checkpoints / kind, Recipe((("visual.block.01", 0.0), ("*", 0.5))), tmp_path / "m")
    with contextlib.redirect_stderr(io.StringIO()):
        model, info = CLIPModel.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info.values()), info
    names = {path.name for path in (checkpoints / kind).glob("model*")}
    assert {path.name for path in (tmp_path / "m").glob("model*")} == names
    start, end = clips.network().state_dict(), clips.moved(clips.network()).state_dict()
    for name, tensor in model.state_dict().items():
        alpha = 0.0 if ".layers.1." in name and name.startswith("vision") else 0.5
        torch.testing.assert_close(tensor, start[name] + alpha * (end[name] - start[name]))


def test_hashes_and_recipe_are_in_every_file_and_beside_them(checkpoints, tmp_path):
    recipe = Recipe((("visual.proj", 0.25), ("*", 0.5)))
    merge(checkpoints / "base", checkpoints / "sharded", recipe, tmp_path / "m")
    base = hashlib.sha256((checkpoints / "base" / "model.safetensors").read_bytes()).hexdigest()
    shards = sorted((checkpoints / "sharded").glob("*.safetensors"))
    lines = "".join(f"{hashlib.sha256(shard.read_bytes()).hexdigest()}  {shard.name}\n" for shard in shards)
    for shard in shards:
        with safe_open(tmp_path / "m" / shard.name, "pt") as file:
            stored = file.metadata()
        assert stored["format"] == "pt"
        assert stored["sharpscope.zero_shot.sha256"] == base
        assert stored["sharpscope.fine_tuned.sha256"] == hashlib.sha256(lines.encode()).hexdigest()
        assert json.loads(stored["sharpscope.recipe"]) == [["visual.proj", 0.25], ["*", 0.5]]
        assert stored["sharpscope.version"] == ss.__version__
        assert stored["sharpscope.alpha_convention"].startswith("alpha 0 = zero-shot")
    assert read_recipe(tmp_path / "m").recipe == recipe
    assert read_recipe(tmp_path / "m").sources["zero_shot_sha256"] == base


def test_a_source_without_metadata_gives_one_that_transformers_reads(checkpoints, tmp_path):
    import shutil

    shutil.copytree(checkpoints / "tuned", tmp_path / "bare")
    save_file(load_file(tmp_path / "bare" / "model.safetensors"), tmp_path / "bare" / "model.safetensors")
    merge(checkpoints / "base", tmp_path / "bare", 0.5, tmp_path / "m")
    assert ss.load(tmp_path / "m").network.logit_scale.isfinite()


def test_a_merge_of_a_merge_is_the_point_between(checkpoints, tmp_path):
    merge(checkpoints / "base", checkpoints / "tuned", 0.5, tmp_path / "half")
    merge(checkpoints / "base", tmp_path / "half", 0.5, tmp_path / "quarter")
    found, direct = (
        load_file(tmp_path / "quarter/model.safetensors"),
        merge(checkpoints / "base", checkpoints / "tuned", 0.25, tmp_path / "direct"),
    )
    for name, tensor in load_file(direct / "model.safetensors").items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


# --- layers


def test_head_speaks_for_the_text_tower_that_makes_it(checkpoints):
    weights = read_weights(checkpoints / "base"), read_weights(checkpoints / "tuned")
    rules = (("text.proj", 0.1), ("head", 0.2), ("visual.*", 0.3), ("*", 0.4))
    alphas = merge_plan(*weights, Recipe(rules)).alphas
    assert {layer: alphas[layer] for layer in ("text.embed", "text.proj", "visual.proj", "logit_scale")} == {
        "text.embed": 0.2,
        "text.proj": 0.1,
        "visual.proj": 0.3,
        "logit_scale": 0.4,
    }


def test_a_head_of_its_own_keeps_its_rule_to_itself(tmp_path):
    for i, name in enumerate("ab"):
        found = {"text.w": torch.ones(2) * i, "head.weight": torch.ones(2) * i}
        save_file(found, tmp_path / f"{name}.safetensors")
    recipe = Recipe((("head", 0.25), ("*", 0.5)))
    merge(tmp_path / "a.safetensors", tmp_path / "b.safetensors", recipe, tmp_path / "m.safetensors")
    found = load_file(tmp_path / "m.safetensors")
    assert (found["text.w"][0], found["head.weight"][0]) == (0.5, 0.25)


def test_the_plan_shows_every_layer_once_in_depth_order_and_all_bytes(checkpoints):
    plan = merge_plan(
        read_weights(checkpoints / "base"), read_weights(checkpoints / "sharded"), Recipe((("visual.*", 0.5), ("*", 0)))
    )
    lines = repr(plan).splitlines()
    layers = ss.layers(ss.load(checkpoints / "base")).layers
    assert [line.split()[0] for line in lines] == ["layer", *layers, "all"]
    assert [int(line.split()[2]) for line in lines[1:-1]] == [len(names) for names in layers.values()]
    size = sum(p.nbytes for p in clips.network().parameters())
    assert lines[-1].split() == ["all", str(sum(map(len, layers.values()))), f"{size:,}"]
    assert lines[2].split()[:2] == ["visual.block.00", "0.5"]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module."),
        lambda name: f"image_encoder.model.{name}",
    ],
)
def test_wrappers_are_seen_through_and_kept(checkpoints, tmp_path, wrap):
    wrapped = {wrap(name): tensor for name, tensor in load_file(checkpoints / "tuned" / "model.safetensors").items()}
    save_file(wrapped, tmp_path / "ft.safetensors")
    recipe = Recipe((("visual.block.01", 0.0), ("*", 0.5)))
    merge(checkpoints / "base", tmp_path / "ft.safetensors", recipe, tmp_path / "m.safetensors")
    merge(checkpoints / "base", checkpoints / "tuned", recipe, tmp_path / "plain")
    found, expected = load_file(tmp_path / "m.safetensors"), load_file(tmp_path / "plain" / "model.safetensors")
    assert found.keys() == wrapped.keys()
    assert all(torch.equal(found[wrap(name)], tensor) for name, tensor in expected.items())


# --- integers, statistics


@pytest.mark.parametrize(("alpha", "shown"), [(0.0, "0"), (0.5, "1"), (1.0, "1")])
def test_integers_are_a_line_of_the_plan_with_the_end_they_come_from(tmp_path, alpha, shown):
    plan = merge_plan(*map(read_weights, pair(tmp_path)), Recipe.uniform(alpha))
    assert repr(plan).splitlines()[-2].split() == ["integers", shown, "1", "56"]


def test_position_indices_that_one_version_saves_and_another_does_not_are_no_mismatch(tmp_path):
    with_ids, without = tensors(0), tensors(1)
    del without["position_ids"]
    save_file(with_ids, tmp_path / "with.safetensors")
    save_file(without, tmp_path / "without.safetensors")
    merge(tmp_path / "with.safetensors", tmp_path / "without.safetensors", 0.5, tmp_path / "m1.safetensors")
    merge(tmp_path / "without.safetensors", tmp_path / "with.safetensors", 0.5, tmp_path / "m2.safetensors")
    first, second = load_file(tmp_path / "m1.safetensors"), load_file(tmp_path / "m2.safetensors")
    assert "position_ids" not in first
    assert torch.equal(second["position_ids"], torch.arange(7))


def test_batch_norm_counters_are_copied_and_statistics_are_warned_of(tmp_path):
    for name, count in (("a", 3), ("b", 9)):
        module = torch.nn.BatchNorm1d(2)
        with torch.no_grad():
            module.running_mean.fill_(count)
            module.num_batches_tracked.fill_(count)
        save_file(module.state_dict(), tmp_path / f"{name}.safetensors")
    plan = merge_plan(*(read_weights(tmp_path / f"{n}.safetensors") for n in "ab"), Recipe.uniform(0.5))
    assert plan.notes[0].startswith("2 tensors are batch-norm statistics (running_mean, ...)")
    assert plan.tensor("num_batches_tracked") == 9
    assert plan.tensor("running_mean")[0] == 6


# --- files of torch


def save_torch(root, *, wrapper=None, **besides):
    for name, seed in (("zs", 0), ("ft", 1)):
        state = tensors(seed)
        torch.save({wrapper: state, **besides} if wrapper else state, root / f"{name}.pt")
    return root / "zs.pt", root / "ft.pt"


@pytest.mark.parametrize("wrapper", [None, "state_dict"])
def test_state_dicts_of_torch_keep_their_wrapper_and_nothing_that_belongs_to_other_weights(tmp_path, wrapper):
    besides = {"epoch": 3, "optimizer": {"state": {0: torch.ones(4)}}} if wrapper else {}
    sources = save_torch(tmp_path, wrapper=wrapper, **besides)
    said = pytest.warns(UserWarning, match="ft.pt holds epoch, optimizer beside the weights; they are left out")
    with said if wrapper else contextlib.nullcontext():
        merge(*sources, 0.5, tmp_path / "m.pt")
    found = torch.load(tmp_path / "m.pt", weights_only=True)
    assert list(found) == ([wrapper] if wrapper else list(tensors(0)))
    found = found[wrapper] if wrapper else found
    expected = {n: torch.lerp(t, tensors(1)[n], 0.5) for n, t in tensors(0).items() if n in NAMES}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert torch.equal(found["position_ids"], torch.arange(7))
    assert {path.name for path in tmp_path.iterdir()} == {"zs.pt", "ft.pt", "m.pt", "m.pt.recipe.toml"}


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_end_points_of_state_dicts_are_bit_exact(tmp_path, alpha):
    sources = save_torch(tmp_path)
    merge(*sources, alpha, tmp_path / "m.pt")
    found, expected = (torch.load(p, weights_only=True) for p in (tmp_path / "m.pt", sources[int(alpha)]))
    assert all(found[k].numpy().tobytes() == expected[k].numpy().tobytes() for k in expected)


def test_tied_tensors_of_torch_stay_tied(tmp_path):
    for i, name in enumerate("ab"):
        tied = torch.ones(1000) * i
        torch.save({"body.0.weight": tied, "body.1.weight": tied, "x": torch.ones(2)}, tmp_path / f"{name}.bin")
    merge(tmp_path / "a.bin", tmp_path / "b.bin", 0.5, tmp_path / "m.bin")
    found = torch.load(tmp_path / "m.bin", weights_only=True)
    assert found["body.0.weight"].data_ptr() == found["body.1.weight"].data_ptr()
    assert found["body.1.weight"][0] == 0.5
    assert (tmp_path / "m.bin").stat().st_size < 6500


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_tensors_tied_in_the_fine_tuned_file_alone_are_tied_only_where_the_merge_is(tmp_path, alpha):
    """Of three that one fine-tuned tensor is, the zero-shot file has two of equal bytes; -0 equals 0, but not so."""
    starts = {"emb.weight": torch.zeros(4), "neck.weight": -torch.zeros(4), "head.weight": torch.zeros(4)}
    tied = torch.ones(4)
    torch.save(starts, tmp_path / "zs.pt")
    torch.save(dict.fromkeys(starts, tied), tmp_path / "ft.pt")
    merge(tmp_path / "zs.pt", tmp_path / "ft.pt", alpha, tmp_path / "m.pt")
    found = torch.load(tmp_path / "m.pt", weights_only=True)
    for name, start in starts.items():
        expected = start if alpha == 0 else torch.full((4,), alpha)
        assert found[name].numpy().tobytes() == expected.numpy().tobytes(), name
    assert found["emb.weight"].data_ptr() == found["head.weight"].data_ptr()
    assert (found["emb.weight"].data_ptr() == found["neck.weight"].data_ptr()) == (alpha > 0)


def test_a_head_that_was_tied_by_fine_tuning_keeps_its_zero_shot_values(tmp_path):
    tied = torch.full((4,), 3.0)
    torch.save({"emb.weight": torch.zeros(4), "head.weight": torch.ones(4)}, tmp_path / "zs.pt")
    torch.save({"emb.weight": tied, "head.weight": tied}, tmp_path / "ft.pt")
    for alpha, expected in ((0.0, (0.0, 1.0)), (0.5, (1.5, 2.0)), (1.0, (3.0, 3.0))):
        merge(tmp_path / "zs.pt", tmp_path / "ft.pt", alpha, tmp_path / f"{alpha}.pt")
        found = torch.load(tmp_path / f"{alpha}.pt", weights_only=True)
        assert tuple(found[name][0].item() for name in ("emb.weight", "head.weight")) == expected


def test_shards_of_torch_are_read_and_written(checkpoints, tmp_path):
    state = clips.moved(clips.network()).state_dict()
    names = list(state)
    parts = {"pytorch_model-1.bin": names[:9], "pytorch_model-2.bin": names[9:]}
    (tmp_path / "ft").mkdir()
    for part, mine in parts.items():
        torch.save({n: state[n] for n in mine}, tmp_path / "ft" / part)
    places = {n: part for part, mine in parts.items() for n in mine}
    (tmp_path / "ft" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    merge(checkpoints / "base", tmp_path / "ft", 1.0, tmp_path / "m")
    for part, mine in parts.items():
        found = torch.load(tmp_path / "m" / part, weights_only=True)
        assert list(found) == mine
        assert all(torch.equal(found[n], state[n]) for n in mine)


def test_the_format_before_torch_1_6_is_read_too(tmp_path):
    torch.save(tensors(0), tmp_path / "zs.pt", _use_new_zipfile_serialization=False)
    torch.save(tensors(1), tmp_path / "ft.pt")
    merge(tmp_path / "zs.pt", tmp_path / "ft.pt", 0.0, tmp_path / "m.pt")
    found = torch.load(tmp_path / "m.pt", weights_only=True)
    assert all(torch.equal(found[name], tensors(0)[name]) for name in NAMES)


def test_formats_may_differ_between_the_sources(tmp_path):
    torch.save(tensors(0), tmp_path / "zs.pt")
    save_file(tensors(1), tmp_path / "ft.safetensors")
    merge(tmp_path / "zs.pt", tmp_path / "ft.safetensors", 0.0, tmp_path / "m.safetensors")
    found = load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(0).items())


# --- memory


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_pair_of_tensors_is_held_at_a_time_and_no_file_stays_mapped(tmp_path, monkeypatch, kind):
    count = 40
    for i, name in enumerate(("zs", "ft")):
        state = {f"body.{j}.weight": torch.full((64, 64), float(i + j)) for j in range(count)}
        path = tmp_path / f"{name}.{kind}"
        save_file(state, path) if kind == "safetensors" else torch.save(state, path)
    alive, most, mapped = weakref.WeakSet(), [], []

    def counted(made):
        def call(self, key):
            found = made(self, key).clone()  # of its own: what lives is what the merge holds
            alive.add(found)
            most.append(len(alive))
            maps = Path("/proc/self/maps").read_text().splitlines()
            mapped.append(sum(str(tmp_path / name) in line for line in maps for name in ("zs.safe", "ft.safe")))
            return found

        return call

    monkeypatch.setattr(Weights, "tensor", counted(Weights.tensor))
    monkeypatch.setattr(MergePlan, "tensor", counted(MergePlan.tensor))
    merge(tmp_path / f"zs.{kind}", tmp_path / f"ft.{kind}", 0.5, tmp_path / f"m.{kind}")
    assert len(most) == 3 * count
    assert max(most) <= 3  # both sources and, on return, what was made of them
    assert max(mapped) <= 1


def test_a_downloaded_hub_id_is_found_without_network(checkpoints, tmp_path, monkeypatch):
    import shutil

    import huggingface_hub.constants as constants

    cache = tmp_path / "hub" / "models--owner--name"
    shutil.copytree(checkpoints / "base", cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert read_weights("hf:owner/name").sha256 == read_weights(checkpoints / "base").sha256
