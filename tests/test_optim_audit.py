"""The audit log says what happened, layer by layer, and measuring leaves no trace in the training."""

import copy
import json
import math
from contextlib import nullcontext

import pytest
import torch
from nets import Vit
from torch import nn
from torch.utils.checkpoint import checkpoint

from sharpscope.curvature.trace import Trace
from sharpscope.errors import DataError, MeasurementError, ModelError, UsageError
from sharpscope.optim import SAM, SGDSPD, AdamSPD, AuditLog, audited, read_audit, sentence
from sharpscope.optim.sharpness import SharpnessProbe
from sharpscope.partition import Partition, layers


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def batches(count=2):
    generator = torch.Generator().manual_seed(9)
    return [(torch.randn(4, 5, generator=generator), torch.tensor([0, 1, 2, 0])) for _ in range(count)]


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step // 3)
        optimizer.zero_grad()
        model(torch.randn(6, 5, generator=generator)).square().sum().backward()
        optimizer.step()


def spd(model, **options):
    return AdamSPD(model.named_parameters(), **{"lr": 0.05, "anchor": network(1), "layers": layers(model)} | options)


@pytest.mark.parametrize("granularity", ["tensor", "layer"])
def test_the_log_counts_what_single_steps_show(tmp_path, granularity):
    model = network()
    optimizer = spd(model, granularity=granularity)
    with audited(optimizer, tmp_path / "spd.jsonl", every=7) as session:
        train(model, optimizer, 20)
    log = read_audit(tmp_path / "spd.jsonl")

    # The same run again; after every step the weights are compared with those of AdamW from the same place.
    twin = network()
    other = spd(twin, granularity=granularity)
    expected = dict.fromkeys(optimizer.layers.layers, 0)
    for step in range(20):
        plain = network()
        plain.load_state_dict(twin.state_dict())
        adam = torch.optim.AdamW(plain.parameters(), 0.05, weight_decay=0)
        if step:
            adam.load_state_dict(copy.deepcopy(torch.optim.AdamW.state_dict(other)))
            adam.param_groups[0]["weight_decay"] = 0
        torch.manual_seed(step)
        train(plain, adam, 1, start=step)
        torch.manual_seed(step)
        train(twin, other, 1, start=step)
        for layer, names in optimizer.layers.layers.items():
            for name in names:
                expected[layer] += not torch.equal(twin.get_parameter(name), plain.get_parameter(name))
    del session
    assert set(log.activity["step"]) == {7, 14, 20}
    assert log.activity["decisions"].sum() == 20 * 6
    # The logged run drew other dropout masks; repeat it under the same ones.
    again, third = network(), tmp_path / "again.jsonl"
    optimizer = spd(again, granularity=granularity)
    with audited(optimizer, third, every=7):
        for step in range(20):
            torch.manual_seed(step)
            train(again, optimizer, 1, start=step)
    found = read_audit(third).activity.groupby("layer")["active"].sum().to_dict()
    assert found == expected
    assert sum(expected.values()) > 0


def test_a_line_holds_distance_learning_rate_and_lambda(tmp_path):
    model = network()
    named = list(model.named_parameters())
    groups = [{"params": named[:2], "lr": 0.1, "decay": 0.25}, {"params": named[2:], "lr": 0.02}]
    optimizer = AdamSPD(groups, anchor=network(1), decay=1.0, layers=layers(model))
    log = AuditLog(tmp_path / "spd.jsonl", optimizer, every=5)
    train(model, optimizer, 5)
    log.step(5)
    row = read_audit(tmp_path / "spd.jsonl").activity.set_index("layer").loc["0"]
    moved = [(p - a).detach() for p, a in zip(model[0].parameters(), network(1)[0].parameters(), strict=True)]
    size = torch.cat([a.detach().reshape(-1) for a in network(1)[0].parameters()]).norm().item()
    distance = torch.cat([m.reshape(-1) for m in moved]).norm().item()
    assert row["distance"] == pytest.approx(distance, rel=1e-6)
    assert row["relative_distance"] == pytest.approx(distance / size, rel=1e-6)
    assert (row["lr"], row["lambda"], row["tensors"], row["decisions"]) == (0.1, 0.25, 2, 10)


def test_the_header_names_anchor_partition_and_versions(tmp_path):
    model = network()
    optimizer = spd(model)
    AuditLog(tmp_path / "spd.jsonl", optimizer)
    header = json.loads((tmp_path / "spd.jsonl").read_text().splitlines()[0])
    assert header["anchor"] == optimizer.anchor_hash != spd(network(), anchor=network(2)).anchor_hash
    assert header["partition"] == optimizer.layers_hash
    assert header["versions"]["torch"] == torch.__version__


def test_a_run_without_activity_says_that_it_equals_adamw(tmp_path):
    model = network().eval()  # plain descent on one batch: a smooth way out
    optimizer = SGDSPD(model.named_parameters(), 1e-4, anchor="init")
    with audited(optimizer, tmp_path / "spd.jsonl") as session:
        train(model, optimizer, 3)
    assert "was inactive" in session.summary
    assert "equals the plain optimiser (AdamW" in session.summary
    assert session.summary == sentence(read_audit(tmp_path / "spd.jsonl").activity)


def test_lambda_zero_is_said_to_have_made_no_decision(tmp_path):
    model = network()
    optimizer = spd(model, decay=0.0)
    with audited(optimizer, tmp_path / "spd.jsonl") as session:
        train(model, optimizer, 4)
    assert "no decision was made: lambda was 0" in session.summary


def test_an_active_run_names_the_layer_held_back_most(tmp_path):
    model = network()
    optimizer = spd(model, exclude=[r"^[13]\."])
    with audited(optimizer, tmp_path / "spd.jsonl") as session:
        train(model, optimizer, 20)
    active = read_audit(tmp_path / "spd.jsonl").activity["active"].sum()
    assert session.summary.startswith(f"The projection held back {active} of 40 tensor-steps")
    assert "most in 0 (" in session.summary


@pytest.mark.parametrize("at", [8, 6, 9])
@pytest.mark.parametrize("granularity", ["tensor", "layer"])
def test_a_resumed_log_is_that_of_the_uninterrupted_run(tmp_path, at, granularity):
    def lines(name, interrupted):
        model, path = network(), tmp_path / name
        model.eval()
        optimizer = spd(model, granularity=granularity)
        log = AuditLog(path, optimizer, every=4)
        for step in range(1, 13):
            train(model, optimizer, 1, start=step)
            log.step(step)
            if step == at:
                saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                if interrupted:
                    break
        if interrupted:
            train(model, optimizer, 12 - at, start=at + 1)
            log.step(12)  # written after the checkpoint, then the run died while writing on
            path.write_text(path.read_text() + '{"kind": "acti')
            model = network(5).eval()
            model.load_state_dict(saved[0])
            optimizer = spd(model, granularity=granularity)
            optimizer.load_state_dict(saved[1])
            log = AuditLog(path, optimizer, every=4, step=at)
            for step in range(at + 1, 13):
                train(model, optimizer, 1, start=step)
                log.step(step)
        return path.read_text()

    assert lines("whole", False) == lines("resumed", True)


@pytest.mark.parametrize("at", [3, 6])
def test_a_run_that_adds_a_group_goes_on_with_its_log_from_before_and_after(tmp_path, at):
    """Layers that are unfrozen one after the other: the first comes after step 4."""
    path = tmp_path / "spd.jsonl"

    def run(step, saved=None):
        model, states = network().eval(), {}
        optimizer = AdamSPD(model[3].named_parameters(prefix="3"), lr=0.05, anchor=network(1))
        later = {"params": list(model[0].named_parameters(prefix="0")), "anchor": network(1)}
        if step > 4:
            optimizer.add_param_group(later)
        if saved:
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        with audited(optimizer, path, every=2, step=step):
            for done in range(step + 1, 9):
                train(model, optimizer, 1, start=done)
                states[done] = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                if done == 4:
                    optimizer.add_param_group(later)
        return states, path.read_text()

    states, text = run(0)
    header = read_audit(path).header
    assert [facts["partition"] != header["partition"] for facts in header["grown_from"]] == [True]
    assert run(at, states[at])[1] == text


def test_decisions_that_the_end_of_a_training_wrote_are_not_counted_again(tmp_path):
    """A trainer saves its last state first, and ends the log then."""
    model, path = network().eval(), tmp_path / "spd.jsonl"
    optimizer = spd(model)
    with audited(optimizer, path, every=4):
        train(model, optimizer, 6, start=1)
        saved = copy.deepcopy(optimizer.state_dict())
    other = spd(network().eval())
    other.load_state_dict(saved)
    assert all("decisions" not in group for group in other.param_groups)
    with audited(other, path, every=4, step=6):
        train(model, optimizer, 3, start=7)  # of the other nothing is stepped
        other.step()
    found = read_audit(path).activity
    assert list(dict.fromkeys(found["step"])) == [4, 6, 7]
    assert found["decisions"].sum() == 6 * len(optimizer.anchors)


def test_a_state_that_starts_another_training_brings_no_decisions_along(tmp_path):
    model = network().eval()
    optimizer = spd(model)
    AuditLog(tmp_path / "one.jsonl", optimizer, every=4)
    train(model, optimizer, 3)
    other = spd(network().eval())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with audited(other, tmp_path / "two.jsonl", every=4):
        other.step()
    assert read_audit(tmp_path / "two.jsonl").activity["decisions"].sum() == 0


def test_a_training_begun_anew_leaves_the_logs_of_earlier_ones_beside(tmp_path):
    path, texts = tmp_path / "spd.jsonl", []
    for seed, found in enumerate(([], ["spd.1.jsonl"], ["spd.1.jsonl", "spd.2.jsonl"])):
        model = network()
        optimizer = spd(model)
        with pytest.warns(UserWarning, match="log of an earlier training") if found else nullcontext():
            log = AuditLog(path, optimizer, every=1)
        train(model, optimizer, 1, start=seed + 1)
        log.step(1)
        assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*found, "spd.jsonl"])
        assert len(read_audit(path).activity) == len(layers(model).layers)
        texts.append(path.read_text())
    assert [(tmp_path / name).read_text() for name in ("spd.1.jsonl", "spd.2.jsonl", "spd.jsonl")] == texts


def test_a_log_of_another_anchor_or_of_something_else_is_refused(tmp_path):
    AuditLog(tmp_path / "spd.jsonl", spd(network()))
    with pytest.raises(UsageError, match="log of another run: anchor is"):
        AuditLog(tmp_path / "spd.jsonl", spd(network(), anchor=network(2)))
    (tmp_path / "cells.jsonl").write_text('{"format": 1}\n{"cell": 3}\n')
    with pytest.raises(UsageError, match=r"cells\.jsonl is not a readable audit log"):
        AuditLog(tmp_path / "cells.jsonl", spd(network()))
    with pytest.raises(UsageError, match="does not exist"):
        read_audit(tmp_path / "nowhere.jsonl")
    with pytest.raises(UsageError, match="an audit log of AdamW"):
        AuditLog(tmp_path / "adam.jsonl", torch.optim.AdamW(network().parameters()))
    for odd in (0, 2.5, "often", None):
        with pytest.raises(UsageError, match=f"every={odd!r}: needs a whole number, 1 or more"):
            AuditLog(tmp_path / "odd.jsonl", spd(network()), every=odd)
    for odd in (-1, 2.5, "8", None):
        with pytest.raises(UsageError, match=f"step={odd!r}: needs a whole number, 0 or more"):
            AuditLog(tmp_path / "odd.jsonl", spd(network()), step=odd)


def test_a_log_that_is_moved_away_meanwhile_is_followed_by_another(tmp_path):
    model, path = network(), tmp_path / "spd.jsonl"
    optimizer = spd(model)
    with audited(optimizer, path, every=2) as session:
        train(model, optimizer, 2)
        path.rename(tmp_path / "spd.1.jsonl")
        train(model, optimizer, 2)
    first, second = (read_audit(tmp_path / name) for name in ("spd.1.jsonl", "spd.jsonl"))
    assert (set(first.activity["step"]), set(second.activity["step"])) == ({2}, {4})
    assert first.header == second.header
    assert "held back" in session.summary or "inactive" in session.summary


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"format": 1, "anch', "has not one whole line"),
        ('{"format": 1}\n{"kind": "activity"}\n', "no audit log of format 1"),
    ],
)
def test_a_damaged_log_is_refused_in_words(tmp_path, text, said):
    (tmp_path / "spd.jsonl").write_text(text)
    for reading in (read_audit, lambda path: AuditLog(path, spd(network()))):
        with pytest.raises(UsageError, match=said):
            reading(tmp_path / "spd.jsonl")


def test_a_folder_is_no_log(tmp_path):
    for reading in (read_audit, lambda path: AuditLog(path, spd(network()))):
        with pytest.raises(UsageError, match=r"cannot be read \(.*Is a directory"):
            reading(tmp_path)


def test_an_empty_log_has_its_columns_and_a_sentence(tmp_path):
    AuditLog(tmp_path / "spd.jsonl", spd(network()))
    log = read_audit(tmp_path / "spd.jsonl")
    assert "mean_ratio" in log.activity
    assert sentence(log.activity).startswith("Nothing was logged")


def test_a_diverged_run_is_logged_to_its_end(tmp_path):
    model = network()
    optimizer = spd(model)
    with audited(optimizer, tmp_path / "spd.jsonl", every=1):
        train(model, optimizer, 1)
        model[0].weight.data.fill_(float("nan"))
        train(model, optimizer, 1)
    assert math.isnan(read_audit(tmp_path / "spd.jsonl").activity["distance"].iloc[-3])


def test_a_diverged_run_with_sharpness_is_logged_to_its_end(tmp_path):
    model = network()
    optimizer = spd(model)
    with audited(optimizer, tmp_path / "spd.jsonl", every=1, model=model, batches=batches()) as session:
        train(model, optimizer, 1)
        model[0].weight.data.fill_(math.nan)
        train(model, optimizer, 1)
    found = read_audit(tmp_path / "spd.jsonl").sharpness.set_index("step")
    assert found.loc[1, "value"].notna().all()
    assert found.loc[2, "value"].isna().all()
    assert not found.loc[2, "converged"].any()
    assert session.summary


class Root(nn.Linear):
    def forward(self, x):
        return super().forward(x) + (self.weight.sum() * 0).sqrt()  # its gradient is no number


class Bend(nn.Linear):
    def forward(self, x):
        return super().forward(x) + (self.weight.sum() * 0).abs() ** 1.5  # its second derivative is no number


def test_weights_without_a_finite_loss_or_derivative_are_said_to_have_no_sharpness():
    with pytest.raises(MeasurementError, match="the gradient by 'weight' at the present weights holds NaN"):
        SharpnessProbe(batches())(Root(5, 3), Partition({"all": ("weight", "bias")}))
    with pytest.raises(MeasurementError, match="the second derivative by 'weight' at the present weights holds NaN"):
        SharpnessProbe(batches())(Bend(5, 3), Partition({"all": ("weight", "bias")}))
    model = network()
    model[0].weight.data.fill_(math.nan)
    with pytest.raises(MeasurementError, match="the loss at the present weights is nan"):
        SharpnessProbe(batches())(model, layers(model))


def test_recording_changes_no_weight(tmp_path):
    first, second = network().eval(), network().eval()
    train(first, spd(first), 10)
    optimizer = spd(second)
    with audited(optimizer, tmp_path / "spd.jsonl", every=2, model=second, batches=batches()):
        train(second, optimizer, 10)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def quick(point, partition, seed):
    """The squared gradient of each layer: one visit, for tests of everything around the measure."""
    from sharpscope.curvature.estimate import Estimate

    for layer, names in partition.layers.items():
        value = sum(float(point.gradient[name].square().sum()) for name in names)
        yield layer, Estimate(value, 0.0, 1, True, torch.zeros(0).numpy())


def test_measuring_restores_modes_grad_mode_random_state_and_gradients():
    model = network().train()
    model[1].eval()
    model(torch.randn(4, 5)).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    weights = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()

    def drawing(point, partition, seed):
        torch.rand(3)
        return Trace(most=5)(point, partition, seed)

    with torch.no_grad():
        SharpnessProbe(batches(), drawing)(model, layers(model))
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert [sub.training for sub in model.modules()] == [True, True, False, True, True]
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


def test_modes_come_back_when_the_measure_fails():
    model = network().train()

    def broken(*_):
        raise ModelError("no curvature today")

    with pytest.raises(ModelError, match="today"):
        SharpnessProbe(batches(), broken)(model, layers(model))
    assert all(sub.training for sub in model.modules())


def test_inside_inference_mode_the_numbers_are_the_same():
    model = network()
    outside = [found.value for _, found in SharpnessProbe(batches(), quick)(model, layers(model))]
    with torch.inference_mode():
        inside = [found.value for _, found in SharpnessProbe(batches(), quick)(model, layers(model))]
    assert inside == outside
    assert all(value > 0 for value in outside)


def test_the_measured_gradient_is_that_of_the_mean_loss():
    model = network().train()  # dropout and batch statistics do not enter
    found = dict(SharpnessProbe(batches(), quick)(model, Partition({"last": ("3.weight", "3.bias")})))
    model.eval()
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    nn.functional.cross_entropy(model(x), y).backward()
    expected = sum(p.grad.square().sum().item() for p in model[3].parameters())
    assert found["last"].value == pytest.approx(expected, rel=1e-5)


def test_half_precision_weights_are_measured_in_float32():
    model = network().eval().bfloat16()
    single = network().eval().bfloat16().float()
    found, expected = (
        [one.value for _, one in SharpnessProbe(batches(), quick)(m, layers(m))] for m in (model, single)
    )
    assert found == expected


def test_the_log_sees_through_a_wrapper(tmp_path):
    model = network()
    optimizer = SAM(spd(model))

    def closure():
        optimizer.zero_grad()
        loss = model(batches()[0][0]).square().sum()
        loss.backward()
        return loss

    with audited(optimizer, tmp_path / "spd.jsonl", every=1):
        for _ in range(3):
            optimizer.step(closure)
    assert set(read_audit(tmp_path / "spd.jsonl").activity["step"]) == {1, 2, 3}


def test_sharpness_stands_in_the_log_beside_the_activity(tmp_path):
    model = network()
    optimizer = spd(model)
    with audited(optimizer, tmp_path / "spd.jsonl", every=3, model=model, batches=batches()):
        train(model, optimizer, 6)
    found = read_audit(tmp_path / "spd.jsonl").sharpness
    assert set(found["step"]) == {3, 6}
    assert set(found["layer"]) == {"0", "1", "3", "(model)"} or set(found["layer"]) >= {"0", "1", "3"}
    assert set(found["measure"]) == {"trace"}


def test_batches_without_labels_or_examples_are_refused():
    with pytest.raises(DataError, match="without labels"):
        SharpnessProbe([torch.zeros(2, 5)])
    with pytest.raises(DataError, match="no example"):
        SharpnessProbe([])


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, image, mask=None):
        return self.linear(image if mask is None else image * mask)


X, Y = batches()[0]


@pytest.mark.parametrize(
    ("model", "found", "said"),
    [
        (network, (X, Y + 1), r"'batches' has labels 1\.\.3, the model has 3 outputs"),
        (network, (X[:, :4], Y), r"the model fails on inputs of 'batches' of shape \(4, 4\) torch.float32: "),
        (Masked, {"image": X, "mask": X, "label": Y}, "'batches' gives 'mask' beside the images"),
    ],
)
def test_batches_that_cannot_be_measured_on_are_refused_before_the_first_step(tmp_path, model, found, said):
    net = model()
    with (
        pytest.raises((DataError, ModelError), match=said),
        audited(spd(net, anchor="init"), tmp_path / "spd.jsonl", every=500, model=net, batches=[batches()[1], found]),
    ):
        pytest.fail("the training has begun")
    assert not (tmp_path / "spd.jsonl").exists()
    assert net.training


class Whole(nn.Linear):
    """Takes batches of four only, as where a forward knows its batch."""

    def forward(self, x):
        return super().forward(x.view(4, 5))


def test_ignored_labels_and_a_forward_that_knows_its_batch_are_measured_on():
    data = [(torch.randn(4, 5), torch.tensor([0, -100, 2, 1])), (torch.randn(4, 5), torch.full((4,), -100))]
    probe, net = SharpnessProbe(data, quick), Whole(5, 3)
    probe.check(net)
    assert probe(net, layers(net))


def test_the_mean_is_over_the_labels_that_count():
    model, (x, y) = network(), (torch.cat(parts) for parts in zip(*batches(), strict=True))
    some = y.clone()
    some[[0, 3, 4]] = -100
    found, expected = (
        [one.value for _, one in SharpnessProbe([data], Trace(most=4))(model, layers(model))]
        for data in ((x, some), (x[some >= 0], y[some >= 0]))
    )
    assert found == pytest.approx(expected, rel=1e-5)
    with pytest.raises(DataError, match="no example"):
        SharpnessProbe([(x, torch.full_like(y, -100))])


def test_the_layers_of_a_wrapper_are_those_of_the_model_within():
    model = network()
    wrapped = torch.compile(model, backend="eager")
    found, expected = (
        [one.value for _, one in SharpnessProbe(batches(), quick)(model, layers(m))] for m in (wrapped, model)
    )
    assert found == expected
    assert [one.value for _, one in SharpnessProbe(batches(), quick)(wrapped, layers(wrapped))] == expected


class Checkpointed(nn.Module):
    """Patches of an image and attention over them, again in the backward pass, as timm has it while it evaluates."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.reentrant, self.net = reentrant, Vit(blocks=1)

    def forward(self, x):
        if self.reentrant is None:
            return self.net(x)
        return checkpoint(self.net, x, use_reentrant=self.reentrant)


def test_activation_checkpointing_changes_no_number_of_a_training():
    torch.manual_seed(0)
    data, plain, net = [(torch.randn(4, 1, 4, 4), torch.arange(4) % 3)], Checkpointed(), Checkpointed(False)
    net.load_state_dict(plain.state_dict())
    probe = SharpnessProbe(data, Trace(most=4))
    probe.check(net)
    found, expected = ([one.value for _, one in probe(module, layers(module))] for module in (net, plain))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, of forwards without gradients
def test_a_model_without_gradients_is_refused_before_the_first_step():
    probe = SharpnessProbe([(torch.randn(4, 1, 4, 4), torch.arange(4) % 3)])
    with pytest.raises(ModelError, match=r"gradient cannot be computed(.|\n)*fix: if it checkpoints activations"):
        probe.check(Checkpointed(True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_batches_of_another_precision_than_the_weights_are_measured_on(dtype):
    model, exact = network().eval().bfloat16(), network().eval().bfloat16().float()
    found, expected = (
        [one.value for _, one in SharpnessProbe(data, quick)(net, layers(net))]
        for net, data in (
            (model, [(x.to(dtype), y) for x, y in batches()]),
            (exact, [(x.to(dtype).float(), y) for x, y in batches()]),
        )
    )
    assert found == expected


def test_batches_without_a_model_are_refused(tmp_path):
    with (
        pytest.raises(UsageError, match=r"no model to measure on"),
        audited(spd(network()), tmp_path / "spd.jsonl", batches=batches()),
    ):
        pass


def test_a_module_wrapped_for_several_processes_is_measured_without_asking_the_others(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model, probe = network(), SharpnessProbe(batches(), Trace(most=5))
        wrapped = nn.parallel.DistributedDataParallel(model)
        monkeypatch.setattr(wrapped, "forward", None)  # sends the statistics of the batch norm
        probe.check(wrapped)
        found = probe(wrapped, layers(model))
    finally:
        torch.distributed.destroy_process_group()
    assert [(layer, one.value) for layer, one in found] == [(n, one.value) for n, one in probe(model, layers(model))]
