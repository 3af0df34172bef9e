"""What cannot be merged or written ends in a sentence, and leaves nothing half done, killed or not."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import clips
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models import Tripwire

from sharpscope.errors import MismatchError, ModelError, SharpscopeError, UsageError
from sharpscope.merging import merge, output, read_weights
from sharpscope.recipe import Recipe
from sharpscope.recipe_file import read_recipe


@pytest.fixture
def ends(tmp_path):
    """Two files of weights."""
    for i, name in enumerate(("zs", "ft")):
        save_file(weights(i), tmp_path / f"{name}.safetensors")
    return tmp_path / "zs.safetensors", tmp_path / "ft.safetensors"


def weights(value):
    found = {f"blocks.{i}.weight": torch.full((8, 8), float(value)) for i in range(3)}
    return found | {"head.weight": torch.full((2, 8), float(value)), "position_ids": torch.arange(4)}


@pytest.fixture
def sharded(tmp_path):
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()):
        clips.network().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


def changed(path, **tensors):
    """The fine-tuned file with other tensors; None removes one."""
    found = weights(1) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, path)


# --- the sources


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (
            {"head__weight": None},
            r"5 tensors in .*zs.*, 4 in .*ft.*; 'head.weight' is missing in .*ft.safetensors \(1 ",
        ),
        ({"new__weight": torch.ones(1)}, r"'new.weight' is missing in .*zs.safetensors"),
        ({"head__weight": torch.ones(3, 8)}, r"'head.weight' is \(2, 8\) float32 in .*zs.* but \(3, 8\) float32 in"),
        ({"head__weight": torch.ones(2, 8).int()}, r"'head.weight' is \(2, 8\) float32 .* but \(2, 8\) int32 in"),
        ({"position_ids": torch.arange(4).int()}, r"'position_ids' is \(4,\) int64 in .* but \(4,\) int32 in"),
        ({"position_ids": torch.arange(4) + 1}, r"'position_ids' holds int64 that differ .*: there is nothing between"),
        ({"head__weight": torch.full((2, 8), torch.inf)}, r"'head.weight' is not finite at alpha 0.5"),
    ],
)
def test_tensors_that_do_not_belong_together_are_named(ends, tmp_path, tensors, said):
    changed(ends[1], **tensors)
    with pytest.raises(SharpscopeError, match=said):
        merge(*ends, 0.5, tmp_path / "m.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"zs.safetensors", "ft.safetensors"}


def test_masks_of_infinities_that_both_have_are_merged(ends, tmp_path):
    for path, value in zip(ends, (0, 1), strict=True):
        save_file(weights(value) | {"mask": torch.full((3,), -torch.inf)}, path)
    merge(*ends, 0.5, tmp_path / "m.safetensors")
    assert load_file(tmp_path / "m.safetensors")["mask"].isneginf().all()


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_integers_that_differ_are_no_trouble_at_the_ends(ends, tmp_path, alpha):
    changed(ends[1], position_ids=torch.arange(4) + 1)
    merge(*ends, alpha, tmp_path / "m.safetensors")
    assert load_file(tmp_path / "m.safetensors")["position_ids"][0] == alpha


def test_adapters_and_other_libraries_have_their_own_way_out(ends, tmp_path):
    changed(ends[1], **{"blocks__0__lora_A__weight": torch.ones(2)})
    with pytest.raises(ModelError, match=r"LoRA adapters that are not merged.*\n  fix: merge them where"):
        merge(*ends, 0.5, tmp_path / "m.safetensors")
    for path, name in zip(ends, ("visual.conv1.weight", "vision_model.x.weight"), strict=True):
        save_file({name: torch.ones(2)}, path)
    with pytest.raises(
        MismatchError, match="fix: one is open_clip's, the other transformers': sharpscope convert REF --to"
    ):
        merge(*ends, 0.5, tmp_path / "m.safetensors")


def test_two_configurations_of_one_shape_are_refused(tmp_path):
    for name, act in (("a", "quick_gelu"), ("b", "gelu")):
        clips.save(tmp_path / name, clips.network(hidden_act=act))
    with pytest.raises(MismatchError, match=r"vision_config.hidden_act is 'quick_gelu' in .*a but 'gelu' in .*b"):
        merge(tmp_path / "a", tmp_path / "b", 0.5, tmp_path / "m")


def test_a_missing_shard_is_named(sharded):
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ModelError, match=rf"lacks the shard {gone.name} with \d+ tensors"):
        read_weights(sharded)


def test_an_index_that_names_a_tensor_of_no_shard_is_refused(sharded):
    index = sharded / "model.safetensors.index.json"
    stored = json.loads(index.read_text())
    stored["weight_map"]["ghost.weight"] = next(iter(stored["weight_map"].values()))
    index.write_text(json.dumps(stored))
    with pytest.raises(ModelError, match=r"the shards of .* lack 'ghost.weight'"):
        read_weights(sharded)
    index.write_text("{")
    with pytest.raises(ModelError, match=r"index.json is no index of shards"):
        read_weights(sharded)


@pytest.mark.parametrize("kept", [4, 40, 900])
def test_a_truncated_safetensors_is_named(ends, kept):
    ends[0].write_bytes(ends[0].read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"zs.safetensors cannot be read: .*\n  fix: copy or save"):
        read_weights(ends[0])


@pytest.mark.parametrize("kept", [0, 100, 1500])
def test_a_truncated_file_of_torch_is_named(tmp_path, kept):
    torch.save(weights(0), tmp_path / "zs.pt")
    (tmp_path / "zs.pt").write_bytes((tmp_path / "zs.pt").read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"zs.pt cannot be read: .*\n  fix: copy or save"):
        read_weights(tmp_path / "zs.pt")


def test_pickled_code_is_refused_and_not_run(tmp_path):
    torch.save(Tripwire(tmp_path / "trace"), tmp_path / "m.pt")
    with pytest.raises(ModelError, match=r"pickled module.*\n  fix: sharpscope convert .*m.pt --unsafe-pickle"):
        read_weights(tmp_path / "m.pt")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("stored", [[1, 2], {"state_dict": {"a": torch.ones(1), "b": "text"}}, {}])
def test_what_is_no_state_dict_is_said(tmp_path, stored):
    torch.save(stored, tmp_path / "m.pt")
    with pytest.raises(ModelError, match=r"no state dict"):
        read_weights(tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.eye(3).to_sparse(), r"holds 'b' as a sparse tensor \(torch.sparse_coo\)\n  fix: tensor.to_dense\(\)"),
        (torch.ones(3, device="meta"), r"holds no values of 'b': .* 'meta'\n  fix: load the weights"),
    ],
)
def test_tensors_without_plain_values_are_named(tmp_path, tensor, said):
    torch.save({"a": torch.ones(1), "b": tensor}, tmp_path / "m.pt")
    with pytest.raises(ModelError, match=said):
        read_weights(tmp_path / "m.pt")


@pytest.mark.parametrize("ref", ["nowhere/at/all", "./nothing", "owner/never-downloaded"])
def test_nothing_there_is_said(ref):
    with pytest.raises(UsageError, match=r"there (are no weights|is no model) at"):
        read_weights(ref)


def test_a_folder_of_several_candidates_asks_which(tmp_path):
    with pytest.raises(ModelError, match=r"holds no weights \(model.safetensors, "):
        read_weights(tmp_path)
    for name in ("a.pt", "b.pt"):
        torch.save(weights(0), tmp_path / name)
    with pytest.raises(ModelError, match=r"2 files that may be weights \(a.pt, ...\)\n  fix: name the file itself"):
        read_weights(tmp_path)


def test_a_tensor_twice_under_wrapped_names_is_refused(ends, tmp_path):
    save_file({"a._orig_mod.b": torch.ones(1), "a.b": torch.ones(1)}, ends[0])
    with pytest.raises(ModelError, match=r"are the same tensor 'a.b'"):
        merge(ends[0], ends[0], 0.5, tmp_path / "m.safetensors")


def test_one_tensor_under_two_alphas_is_refused(tmp_path):
    for i, name in enumerate("ab"):
        tied = torch.ones(4) * i
        torch.save({"one.weight": tied, "two.weight": tied}, tmp_path / f"{name}.pt")
    recipe = Recipe((("one", 0.0), ("*", 0.5)))
    with pytest.raises(MismatchError, match=r"'one.weight' and 'two.weight' are one tensor, .* alpha 0 and 0.5"):
        merge(tmp_path / "a.pt", tmp_path / "b.pt", recipe, tmp_path / "m.pt")


# --- the recipe


@pytest.mark.parametrize("given", [{"blocks.0": 0.1, "*": 0.5}, [("blocks.0", 0.1), ("*", 0.5)]])
def test_rules_that_are_no_recipe_are_told_how_to_be_one(ends, tmp_path, given):
    said = (
        rf"the recipe is a {type(given).__name__}\n  fix: sharpscope.Recipe\(\(\('blocks.0', 0.1\), \('\*', 0.5\)\)\)"
    )
    with pytest.raises(UsageError, match=said):
        merge(*ends, given, tmp_path / "m.safetensors")


def test_a_rule_that_matches_no_layer_names_the_nearest(ends, tmp_path):
    recipe = Recipe((("block.1", 0.0), ("*", 0.5)))
    with pytest.raises(
        UsageError, match=r"'block.1' matches no layer; the nearest is 'blocks.1'\n  fix: layers: blocks.0, "
    ):
        merge(*ends, recipe, tmp_path / "m.safetensors")


# --- the target


def test_what_exists_is_replaced_only_if_asked_and_only_if_it_is_a_merge(ends, tmp_path):
    out = merge(*ends, 0.25, tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match=r"m.safetensors exists already\n  fix: --overwrite"):
        merge(*ends, 0.5, out)
    merge(*ends, 0.5, out, overwrite=True)
    assert load_file(out)["head.weight"][0, 0] == 0.5
    save_file(weights(7), tmp_path / "mine.safetensors")
    with pytest.raises(UsageError, match="is no merge that was written before"):
        merge(*ends, 0.5, tmp_path / "mine.safetensors", overwrite=True)
    assert load_file(tmp_path / "mine.safetensors")["head.weight"][0, 0] == 7


def test_a_folder_of_other_things_is_never_replaced(tmp_path):
    clips.pair(tmp_path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("words")
    with pytest.raises(UsageError, match="is no merge that was written before"):
        merge(tmp_path / "base", tmp_path / "tuned", 0.5, tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "words"


@pytest.mark.parametrize("out", ["base", "tuned", ".", "tuned/merged"])
def test_a_source_is_never_written_to(tmp_path, out):
    clips.pair(tmp_path)
    with pytest.raises(UsageError, match="which is merged"):
        merge(tmp_path / "base", tmp_path / "tuned", 0.5, tmp_path / out, overwrite=True)


@pytest.mark.parametrize("out", ["v1", "v1/merged", "links", "links/tuned"])
def test_a_source_that_is_named_through_a_link_is_never_written_to(tmp_path, out):
    """The source is itself a merge, which --overwrite would replace."""
    clips.pair(tmp_path)
    merge(tmp_path / "base", tmp_path / "tuned", 0.5, tmp_path / "v1")
    before = {path.name: path.read_bytes() for path in (tmp_path / "v1").iterdir()}
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "tuned").symlink_to(tmp_path / "v1")
    with pytest.raises(UsageError, match=r"is, holds or lies in .*tuned, which is merged\n  fix: choose another --out"):
        merge(tmp_path / "base", tmp_path / "links" / "tuned", 0.5, tmp_path / out, overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "v1").iterdir()} == before


def test_a_file_that_a_folder_of_weights_links_to_is_never_written_to(ends, tmp_path):
    out = merge(*ends, 0.5, tmp_path / "m.safetensors")
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "model.safetensors").symlink_to(out)
    with pytest.raises(UsageError, match=r"m.safetensors is, holds or lies in .*zero/model.safetensors, which is"):
        merge(tmp_path / "zero", ends[1], 0.5, out, overwrite=True)
    assert load_file(out)["head.weight"][0, 0] == 0.5


@pytest.mark.parametrize("system", ["linux", "one without exchange", "win32"])
def test_a_link_to_a_merge_is_replaced_and_what_it_led_to_stays(tmp_path, monkeypatch, system):
    clips.pair(tmp_path)
    merge(tmp_path / "base", tmp_path / "tuned", 0.25, tmp_path / "old")
    (tmp_path / "m").symlink_to(tmp_path / "old")
    if system == "win32":
        monkeypatch.setattr(output.sys, "platform", system)
        monkeypatch.setattr(output.ctypes, "CDLL", lambda *_, **__: pytest.fail("which takes no None there"))
    elif system != "linux":
        monkeypatch.setattr(output.ctypes, "CDLL", lambda *_, **__: None)
    merge(tmp_path / "base", tmp_path / "tuned", 0.5, tmp_path / "m", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", "old", "m"}
    assert [read_recipe(tmp_path / n).recipe for n in ("old", "m")] == [Recipe.uniform(0.25), Recipe.uniform(0.5)]
    assert not (tmp_path / "m").is_symlink()


def test_a_recipe_written_by_hand_is_not_replaced(ends, tmp_path):
    """Neither one beside the stem, which is the user's name, nor one where the merge would put its own."""
    for name in ("m.recipe.toml", "m.safetensors.recipe.toml"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match=r"m.safetensors.recipe.toml exists already\n  fix: --overwrite"):
        merge(*ends, 0.5, tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()
    assert (tmp_path / "m.safetensors.recipe.toml").read_text() == "mine"
    merge(*ends, 0.5, tmp_path / "m.safetensors", overwrite=True)
    assert read_recipe(tmp_path / "m.safetensors.recipe.toml").recipe == Recipe.uniform(0.5)
    assert (tmp_path / "m.recipe.toml").read_text() == "mine"


def test_a_merge_of_the_same_stem_does_not_make_a_file_one(ends, tmp_path):
    for i, name in enumerate(("zs", "ft")):
        torch.save(weights(i), tmp_path / f"{name}.pt")
    merge(tmp_path / "zs.pt", tmp_path / "ft.pt", 0.5, tmp_path / "model.pt")
    save_file(weights(7), tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"model.safetensors is no merge that was written before"):
        merge(*ends, 0.5, tmp_path / "model.safetensors", overwrite=True)
    assert load_file(tmp_path / "model.safetensors")["head.weight"][0, 0] == 7


def test_a_file_gets_the_format_of_its_source(ends, tmp_path):
    with pytest.raises(UsageError, match=r"has not the ending of ft.safetensors.*\n  fix: --out m.safetensors"):
        merge(*ends, 0.5, tmp_path / "m.pt")


def test_a_place_that_cannot_be_written_is_said(ends, tmp_path):
    (tmp_path / "file").write_text("")
    too_long = tmp_path / f"{'m' * 250}.safetensors"
    for place in (tmp_path / "file" / "m.safetensors", Path("/proc/sharpscope/m.safetensors"), too_long):
        with pytest.raises(SharpscopeError, match=r"cannot be written to .*\n  fix: choose another --out"):
            merge(*ends, 0.5, place)


def test_too_little_room_is_said_before_anything_is_written(ends, tmp_path, monkeypatch):
    usage = output.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(SharpscopeError, match=r"has 0 MB left, the merge takes 1 MB\n  fix: make room"):
        merge(*ends, 0.5, tmp_path / "m.safetensors")


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_disk_that_fills_up_meanwhile_leaves_nothing(tmp_path, kind):
    """The limit on the size of a file is the disk that is full."""
    for i, name in enumerate(("zs", "ft")):
        state = {f"b.{j}.weight": torch.full((64, 64), float(i)) for j in range(8)}
        path = tmp_path / f"{name}.{kind}"
        save_file(state, path) if kind == "safetensors" else torch.save(state, path)
    code = (
        "import resource, signal, sys; from sharpscope.merging import merge\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))\n"
        f"sys.dont_write_bytecode = True; merge('zs.{kind}', 'ft.{kind}', 0.5, 'm.{kind}')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "SharpscopeError: the merge cannot be written to" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {f"zs.{kind}", f"ft.{kind}"}


def test_a_recipe_that_the_disk_has_no_room_for_leaves_no_merge_without_one(ends, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(output, "write_recipe", full)
    with pytest.raises(SharpscopeError, match=r"cannot be written to .*: No space left on device"):
        merge(*ends, 0.5, tmp_path / "m.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"zs.safetensors", "ft.safetensors"}


def test_a_name_that_is_no_utf8_is_refused_before_anything_is_written(ends, tmp_path):
    with pytest.raises(UsageError, match=r"is no UTF-8.*\n  fix: choose another --out"):
        merge(*ends, 0.5, tmp_path / "m\udcff.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"zs.safetensors", "ft.safetensors"}


def test_an_alpha_that_no_float32_holds_is_refused(ends, tmp_path):
    with pytest.raises(UsageError, match=r"gives 'blocks.0' the alpha 1e\+300"):
        merge(*ends, 1e300, tmp_path / "m.safetensors")


def test_an_error_on_the_way_leaves_the_old_merge_as_it_was(tmp_path, monkeypatch):
    clips.pair(tmp_path)
    merge(tmp_path / "base", tmp_path / "tuned", 0.25, tmp_path / "m")
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    monkeypatch.setattr(output, "_append", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path / "base", tmp_path / "tuned", 0.5, tmp_path / "m", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", "m"}


def _fails_on_scratch(rename):
    def called(self, target):
        if self.name.endswith(".part"):
            raise OSError("no")
        return rename(self, target)

    return called


def test_where_directories_cannot_change_places_they_are_renamed(tmp_path, monkeypatch):
    clips.pair(tmp_path)
    merge(tmp_path / "base", tmp_path / "tuned", 0.25, tmp_path / "m")
    monkeypatch.setattr(output.ctypes, "CDLL", lambda *_, **__: None)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", _fails_on_scratch(Path.rename))
        with pytest.raises(SharpscopeError, match=r"cannot be written to .*m: no"):
            merge(tmp_path / "base", tmp_path / "tuned", 1.0, tmp_path / "m", overwrite=True)
    assert read_recipe(tmp_path / "m").recipe == Recipe.uniform(0.25)
    merge(tmp_path / "base", tmp_path / "tuned", 1.0, tmp_path / "m", overwrite=True)
    found = load_file(tmp_path / "m" / "model.safetensors")
    assert torch.equal(found["visual_projection.weight"], clips.network().visual_projection.weight)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", "m"}


# --- killed

_MERGER = """
import os, sys
import torch; torch.set_num_threads(1)
from sharpscope.merging import merge
root = sys.argv[1]
for line in sys.stdin:
    out, overwrite = line.split()
    child = os.fork()
    if child == 0:
        for turn in range(1000):
            alpha = (0.25, 0.75)[turn % 2]
            merge(f"{root}/zs", f"{root}/ft", alpha, f"{root}/{out}{'' if overwrite == '1' else turn}", overwrite=True)
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
"""


def whole(folder):
    """The one alpha that every tensor and the recipe of a merge have."""
    values = {float(x) for file in folder.glob("*.safetensors") for t in load_file(file).values() for x in t.unique()}
    assert len(values) == 1, values
    assert {path.name for path in folder.iterdir()} == {*SHARDS, "model.safetensors.index.json", "recipe.toml"}
    alpha = values.pop()
    assert f'["*", {alpha}]' in (folder / "recipe.toml").read_text()
    return alpha


SHARDS = {f"model-{i}.safetensors": [f"b{i}.{j}" for j in range(4)] for i in range(6)}


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_killed_merge_leaves_a_whole_checkpoint_or_none(tmp_path, overwrite):
    for value, name in enumerate(("zs", "ft")):
        (tmp_path / name).mkdir()
        for shard, keys in SHARDS.items():
            save_file({key: torch.full((128, 64), float(value)) for key in keys}, tmp_path / name / shard)
        places = {key: shard for shard, keys in SHARDS.items() for key in keys}
        (tmp_path / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    delay = random.Random(0)
    seen, left = [], 0
    command = [sys.executable, "-c", _MERGER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as merger:
        for turn in range(12):
            merger.stdin.write(f"m{'' if overwrite else turn}_ {int(overwrite)}\n")
            merger.stdin.flush()
            child = int(merger.stdout.readline())
            wait_for(tmp_path / ("m_" if overwrite else f"m{turn}_0"))
            time.sleep(delay.uniform(0, 0.15))
            os.kill(child, signal.SIGKILL)
            time.sleep(0.02)
            seen += [whole(folder) for folder in tmp_path.glob("m*_*") if not folder.name.endswith((".part", ".old"))]
            left += len(list(tmp_path.glob("*.part")))
        merger.stdin.close()
    assert seen
    assert set(seen) <= {0.25, 0.75}  # which of the two a slow machine gets to is chance
    assert left > 0  # at least one was killed while it wrote
    assert not list(tmp_path.glob("*.old"))


def wait_for(folder):
    for _ in range(500):
        if folder.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{folder} never came")
