"""The three-argument call, its numbers, its refusals, and resuming."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import NETS, block, dense_hessian, fine_tuned, images, made
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sharpscope
from sharpscope.curvature.lanczos import Eigenvalue
from sharpscope.curvature.trace import Trace
from sharpscope.device import own_device
from sharpscope.errors import DataError, MeasurementError, MismatchError, ModelError, UsageError
from sharpscope.perturbation import AverageMSharpness, MSharpness
from sharpscope.table import MODEL


def loader(count=12, batch_size=5, dtype=torch.float64, **settings):
    return DataLoader(TensorDataset(*images(count, dtype=dtype)), batch_size=batch_size, **settings)


def pair(kind):
    first = made(kind)
    return first, fine_tuned(first, kind)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", NETS)
def test_three_arguments_are_enough(kind):
    a, b = pair(kind)
    result = sharpscope.scan(a, b, loader(), alphas=3, progress=False)
    assert set(result.layers["layer"]) == {*sharpscope.layers(a).layers, MODEL}
    assert set(result.layers["measure"]) == {"trace", "lambda_max", "m_sharpness"}
    assert sorted(set(result.layers["alpha"])) == [0.0, 0.5, 1.0]
    assert np.isfinite(result.layers["value"]).all()


@pytest.mark.parametrize("kind", NETS)
def test_both_ends_have_the_dense_curvature_and_the_plain_accuracy(kind):
    a, b = pair(kind)
    measures = [Trace(most=200), Eigenvalue(tolerance=1e-9, most=100)]
    result = sharpscope.scan(a, b, loader(), alphas=2, measures=measures, batch_size=5, progress=False)
    for alpha, net in ((0.0, a), (1.0, b)):
        hessian, places = dense_hessian(net)
        rows = result.layers[result.layers["alpha"] == alpha]
        for layer, names in {**sharpscope.layers(a).layers, MODEL: tuple(places)}.items():
            mine = block(hessian, places, names)
            trace, top = (
                rows[(rows["layer"] == layer) & (rows["measure"] == m)].iloc[0] for m in ("trace", "lambda_max")
            )
            assert abs(trace["value"] - float(mine.trace())) <= 5 * trace["stderr"] + 1e-12, layer
            assert top["value"] == pytest.approx(float(torch.linalg.eigvalsh(mine)[-1]), rel=1e-8), layer
        x, y = images()
        accuracy = result.evals.query("alpha == @alpha and measure == 'accuracy'")["value"].item()
        assert accuracy == pytest.approx(float((net(x).argmax(1) == y).double().mean()))
        loss = result.evals.query("alpha == @alpha and measure == 'loss'")["value"].item()
        assert loss == pytest.approx(nn.functional.cross_entropy(net(x), y).item(), abs=1e-6)


def test_the_middle_of_the_path_is_the_mean_of_the_weights():
    a, b = pair("mlp")
    middle = made("mlp")
    theirs = b.state_dict()
    middle.load_state_dict({k: (v + theirs[k]) / 2 for k, v in a.state_dict().items()})
    on_path = sharpscope.scan(a, b, loader(), alphas=[0.5], measures=["trace"], progress=False).layers
    alone = sharpscope.scan(middle, b, loader(), alphas=[0.0], measures=["trace"], progress=False).layers
    np.testing.assert_allclose(on_path["value"], alone["value"], rtol=1e-9)


def test_models_are_left_as_they_were():
    a, b = pair("conv")
    before = {k: v.clone() for k, v in a.state_dict().items()}
    sharpscope.scan(a, b, loader(), alphas=2, progress=False)
    assert all(torch.equal(before[k], v) for k, v in a.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in a.parameters())


def test_sharpness_is_measured_on_the_given_data_and_limit():
    a, b = pair("mlp")
    other = loader(60, batch_size=30)
    result = sharpscope.scan(a, b, loader(), sharpness_on=other, limit=24, alphas=2, progress=False)
    assert set(result.layers["split"]) == {"sharpness"}
    assert result.meta["splits"]["sharpness"]["measured"] == 24
    assert set(result.evals["split"]) == {"id"}


def test_a_layer_that_the_loss_does_not_touch_is_listed_as_unused():
    a, b = (nn.ModuleDict({"net": net, "text": nn.Linear(2, 2).double()}).eval() for net in pair("mlp"))
    for module in (a, b):
        module.forward = module["net"].forward
    result = sharpscope.scan(a, b, loader(), alphas=2, measures=["trace"], progress=False)
    assert result.meta["unused"] == ["text"]
    assert "text" not in set(result.layers["layer"])


class AlwaysDropout(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, training=True)


def batch_statistics():
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16, track_running_stats=False), nn.Linear(16, 3)).double().eval()


def headless():
    return nn.Conv2d(1, 3, 2).double().eval()


def with_dropout(net):
    return nn.Sequential(net, AlwaysDropout()).eval()


def spoiled(x):
    return x.index_put((torch.tensor(3),), torch.tensor(torch.nan, dtype=x.dtype))


def steep():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3).double()).eval()
    nn.init.constant_(net[1].weight, 100)
    return net


X, Y = images()
BROKEN = {
    "architectures": (
        lambda a, b: (a, made("vit"), loader()), MismatchError, r"do not share an architecture.*'1\.weight' is missing",
    ),
    "shapes": (
        lambda a, b: (nn.Linear(3, 2).eval(), nn.Linear(3, 4).eval(), loader()), MismatchError, r"\(2, 3\).*\(4, 3\)",
    ),
    "dtype": (lambda a, b: (a, b.float(), loader()), MismatchError, "torch.float64 in the zero-shot model but"),
    "half": (lambda a, b: (a.half(), b.half(), loader()), ModelError, "curvature in half precision is noise"),
    "training": (lambda a, b: (a, b.train(), loader()), ModelError, "the fine-tuned model is in training mode"),
    "no module": (lambda a, b: (a, {"w": 1}, loader()), ModelError, "the fine-tuned model is a dict"),
    "empty": (lambda a, b: (a, b, []), DataError, "'id' gave no example"),
    "no labels": (lambda a, b: (a, b, [X]), DataError, "without labels"),
    "labels": (lambda a, b: (a, b, [(X, Y + 7)]), DataError, r"labels 7\.\.9, the model has 3 outputs"),
    "nan": (lambda a, b: (a, b, [(spoiled(X), Y)]), DataError, "batch 0 of 'id' holds NaN or infinities in 1 of 12"),
    "overflow": (
        lambda a, b: (steep(), steep(), [(X * 1e307, Y)]), MeasurementError, "loss at the zero-shot end is (nan|inf)"
    ),
    "random": (lambda a, b: (with_dropout(a), with_dropout(b), loader()), MeasurementError, "random in evaluation"),
    "batch norm": (
        lambda a, b: (batch_statistics(), batch_statistics(), loader()), ModelError, "without running statistics",
    ),
    "no logits": (lambda a, b: (headless(), headless(), loader()), ModelError, r"logits of shape \(n, classes\)"),
    "image size": (
        lambda a, b: (a, b, [(X[..., :2], Y)]), ModelError, r"inputs of .* \(1, 1, 4, 2\) torch.float64: mat1",
    ),
    "input dtype": (lambda a, b: (a, b, [(X.float(), Y)]), ModelError, "torch.float32: mat1 and mat2 must have"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_bad_input_is_refused_with_a_sentence_and_nothing_written(kind, tmp_path):
    make, error, message = BROKEN[kind]
    arguments = make(*pair("mlp"))
    with pytest.raises(error, match=f"(?s){message}"):
        sharpscope.scan(*arguments, alphas=2, out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_overflows_on_the_way_is_named_and_earlier_cells_are_kept(tmp_path):
    a, b = pair("mlp")
    with torch.no_grad():
        b[4].weight[0, 0] = torch.inf
    with pytest.raises(MeasurementError, match="alpha 1 on 'id'"):
        sharpscope.scan(a, b, loader(), alphas=[0, 1], out=tmp_path, progress=False)
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 1 + 4


@pytest.mark.parametrize("chosen", ["trase", ["trace", "trace"]])
def test_measures_that_cannot_be_meant_are_refused(chosen):
    with pytest.raises(UsageError, match=r"did you mean 'trace'|given twice"):
        sharpscope.scan(*pair("mlp"), loader(), measures=chosen)


def test_a_second_measure_of_a_kind_is_asked_for_a_name():
    with pytest.raises(UsageError, match=r"'m_sharpness' is given twice\n  fix: .*label='NAME'"):
        sharpscope.scan(*pair("mlp"), loader(), measures=[MSharpness(), MSharpness(rho=0.1)])
    measures = [MSharpness(), MSharpness(rho=0.1, label="wide")]
    found = sharpscope.scan(*pair("mlp"), loader(), alphas=[0], measures=measures, progress=False)
    assert set(found.layers["measure"]) == {"m_sharpness", "wide"}


def test_a_word_for_progress_is_refused():
    with pytest.raises(UsageError, match="progress='foo'"):
        sharpscope.scan(*pair("mlp"), loader(), progress="foo")


@pytest.mark.parametrize("alphas", [1, [], [0, 0], [0, float("nan")]])
def test_alphas_that_cannot_be_meant_are_refused(alphas):
    with pytest.raises(UsageError, match="alphas="):
        sharpscope.scan(*pair("mlp"), loader(), alphas=alphas)


def test_a_seed_below_zero_is_refused():
    with pytest.raises(UsageError, match=r"seed=-1: needs a whole number, 0 or more"):
        sharpscope.scan(*pair("mlp"), loader(), seed=-1)


class Unread:
    def __iter__(self):
        pytest.fail("data were read")


# torch refuses each in its own way: RuntimeError, AssertionError, ImportError, no numbers, TypeError
@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "hpu", "meta", 1.5])
def test_a_device_that_is_not_there_is_refused_before_data_are_read(device):
    with pytest.raises(
        UsageError,
        match=rf"--device {device} .* is no device of this machine that can be computed on: .*\n  fix: one of cpu",
    ):
        sharpscope.scan(*pair("mlp"), Unread(), device=device)


def test_a_device_without_float64_is_refused_before_data_are_read(monkeypatch):
    ones = torch.ones

    def without(*shape, dtype=None, **how):
        if dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return ones(*shape, dtype=dtype, **how)

    monkeypatch.setattr(torch, "ones", without)
    with pytest.raises(UsageError, match=r"can be computed on: Cannot convert a MPS Tensor to float64"):
        sharpscope.scan(*pair("mlp"), Unread(), device="cpu")


def test_a_device_that_is_full_is_not_taken_for_one_that_is_not_there(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "ones", full)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        own_device("cpu")


FULL = [Trace(most=8), Eigenvalue(), MSharpness(m=4), AverageMSharpness(draws=2)]


def full_scan(out, fresh=False, seed=0):
    a, b = pair("vit")
    return sharpscope.scan(
        a, b, loader(), ood={"far": loader(9)}, alphas=5, measures=FULL, out=out, fresh=fresh, seed=seed, progress=False
    )


def test_a_scan_cut_after_any_cell_ends_with_the_same_bytes(tmp_path):
    full_scan(tmp_path / "whole")
    whole = (tmp_path / "whole" / "cells.jsonl").read_bytes()
    assert not list((tmp_path / "whole").glob("memory-*"))
    import sharpscope.journal as journal

    class Cut(Exception):
        pass

    append, left = journal.Journal.append, [0]

    def cut(self, cell):
        if left[0] == 0:
            raise Cut
        left[0] -= 1
        append(self, cell)

    for step in (1, 3, 7):
        out = tmp_path / f"cut-{step}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(journal.Journal, "append", cut)
            while True:
                left[0] = step
                try:
                    full_scan(out)
                    break
                except Cut:
                    continue
        assert (out / "cells.jsonl").read_bytes() == whole


CHILD = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_scan import full_scan
full_scan({out!r})
"""


def test_a_killed_scan_resumes_and_ends_with_the_same_rows(tmp_path):
    """SIGKILL at growing times until it gets through; each restart goes on from the cells on disk."""
    whole = full_scan(tmp_path / "whole")
    out, kills = tmp_path / "killed", 0
    code = CHILD.format(tests=str(Path(__file__).parent), out=str(out))
    while True:
        child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code])
        lines = _lines(out)
        while child.poll() is None and (kills >= 4 or _lines(out) < lines + 3):
            time.sleep(0.01)
        if child.poll() is not None:
            break
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        kills += 1
    assert child.returncode == 0
    assert kills == 4
    resumed = sharpscope.open(out)
    assert resumed.cells == whole.cells
    assert resumed.meta["plan"] == whole.meta["plan"]


def _lines(out):
    path = out / "cells.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_finished_scan_is_not_measured_again_and_another_plan_is_refused(tmp_path):
    first = full_scan(tmp_path)
    again = full_scan(tmp_path)
    assert again.cells == first.cells
    assert again.meta["cost"] == first.meta["cost"]
    with pytest.raises(UsageError, match="belongs to another scan: seed"):
        full_scan(tmp_path, seed=1)
    assert full_scan(tmp_path, seed=1, fresh=True).meta["seed"] == 1


def test_precision_is_set_for_the_scan_recorded_and_given_back():
    before = torch.get_float32_matmul_precision()
    result = sharpscope.scan(*pair("mlp"), loader(), alphas=2, measures=["trace"], precision="high", progress=False)
    assert result.meta["provenance"]["float32_matmul_precision"] == "high"
    assert torch.get_float32_matmul_precision() == before


def test_the_loss_can_be_chosen_and_is_part_of_the_plan(tmp_path):
    a, b = pair("mlp")
    plain, smooth, squared = (
        sharpscope.scan(a, b, loader(), alphas=2, measures=["trace"], progress=False, **chosen).layers["value"]
        for chosen in ({}, {"label_smoothing": 0.2}, {"loss": "squared_error"})
    )
    assert not np.allclose(plain, smooth)
    assert not np.allclose(plain, squared)
    sharpscope.scan(a, b, loader(), alphas=2, measures=["trace"], progress=False, out=tmp_path)
    with pytest.raises(UsageError, match="belongs to another scan: loss"):
        sharpscope.scan(
            a, b, loader(), alphas=2, measures=["trace"], out=tmp_path, loss="squared_error", progress=False
        )


def test_open_gives_back_what_was_saved(tmp_path):
    result = full_scan(None)
    result.save(tmp_path / "saved")
    assert sharpscope.open(tmp_path / "saved") == result
    stored = np.load(tmp_path / "saved" / "correct.npz")
    assert (stored["0.25|far"] == result.correct[0.25, "far"]).all()
    with pytest.raises(UsageError, match="holds no scan"):
        sharpscope.open(tmp_path)


def test_half_precision_of_a_path_changes_nothing_in_float32_beyond_rounding():
    a, b = (net.float() for net in pair("vit"))
    single = sharpscope.scan(a, b, loader(dtype=torch.float32), alphas=3, measures=[Trace(most=5)], progress=False)
    double = sharpscope.scan(a.double(), b.double(), loader(), alphas=3, measures=[Trace(most=5)], progress=False)
    np.testing.assert_allclose(single.layers["value"], double.layers["value"], rtol=2e-3, atol=1e-4)
