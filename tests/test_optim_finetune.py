"""The fine-tuning loop: seeds, schedule, freezing, and resuming bit for bit."""

import numpy as np
import pytest
import torch
from torch import nn

from sharpscope.data import Split
from sharpscope.errors import MeasurementError, MismatchError, UsageError
from sharpscope.finetune import Schedule, finetune, trained
from sharpscope.optim import SAM, AdamSPD


def data(seed=0, count=50):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 3
    x = torch.randn(count, 6, generator=generator) + 2 * nn.functional.one_hot(y, 6)
    return Split([(x[:30], y[:30]), (x[30:], y[30:])], "train")


def network():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("body", nn.Linear(6, 8))
    model.add_module("drop", nn.Dropout(0.2))
    model.add_module("head", nn.Linear(8, 3))
    return model


def spd(model, **options):
    return AdamSPD(trained(model, **options), 0.02, anchor="init")


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_training_learns():
    model = network()
    losses = [p.loss for p in finetune(model, data(), spd(model), Schedule(60, batch_size=20))]
    assert len(losses) == 60
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path):
    straight = network()
    list(finetune(straight, data(), spd(straight), Schedule(30, batch_size=20)))
    first, path = network(), tmp_path / "run.pt"
    for progress in finetune(first, data(), spd(first), Schedule(30, batch_size=20), checkpoint=path, every=10):
        if progress.step == 17:
            break  # the checkpoint is of step 10
    torch.manual_seed(123)
    second = network()
    rest = list(finetune(second, data(), spd(second), Schedule(30, batch_size=20), checkpoint=path, every=10))
    assert [rest[0].step, rest[-1].step] == [11, 30]
    assert torch.equal(weights(second), weights(straight))


def test_a_checkpoint_of_another_schedule_or_other_data_is_refused(tmp_path):
    model, path = network(), tmp_path / "run.pt"
    list(finetune(model, data(), spd(model), Schedule(3), checkpoint=path))
    with pytest.raises(UsageError, match="another run: the schedule differs"):
        list(finetune(model, data(), spd(model), Schedule(4), checkpoint=path))
    with pytest.raises(UsageError, match="another run: the data differs"):
        list(finetune(model, data(1), spd(model), Schedule(3), checkpoint=path))


def spoiled(path, kind):
    """Make something else of a checkpoint."""
    if kind == "torn":
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    else:
        torch.save({"weights": network().state_dict(), "list": [1], "module": network()}[kind], path)


@pytest.mark.parametrize("kind", ["torn", "empty", "folder", "weights", "list", "module"])
def test_a_file_that_is_no_checkpoint_is_said_to_be_none(tmp_path, kind):
    model, path = network(), tmp_path / "run.pt"
    list(finetune(model, data(), spd(model), Schedule(3), checkpoint=path))
    spoiled(path, kind)
    with pytest.raises(UsageError, match=r"run\.pt is no checkpoint of finetune: .+"):
        list(finetune(model, data(), spd(model), Schedule(3), checkpoint=path))


def test_a_checkpoint_of_another_model_is_refused_and_the_model_stays(tmp_path):
    model, path = network(), tmp_path / "run.pt"
    list(finetune(model, data(), torch.optim.AdamW(model.parameters()), Schedule(3), checkpoint=path))
    other = nn.Linear(6, 3)
    before = weights(other).clone()
    with pytest.raises(MismatchError, match=r"run\.pt is the checkpoint of another model or optimiser"):
        list(finetune(other, data(), torch.optim.AdamW(other.parameters()), Schedule(3), checkpoint=path))
    assert torch.equal(weights(other), before)


def test_frozen_parameters_keep_their_bits():
    model = network()
    head = model.head.weight.detach().clone()
    body = model.body.weight.detach().clone()
    list(finetune(model, data(), spd(model, frozen=("head",)), Schedule(5)))
    assert torch.equal(model.head.weight, head)
    assert not torch.equal(model.body.weight, body)


@pytest.mark.parametrize(
    ("frozen", "message"), [(("haed",), "matches no parameter"), ((r"\.",), "leaves nothing to train")]
)
def test_freezing_nothing_or_everything_is_refused(frozen, message):
    with pytest.raises(UsageError, match=message):
        trained(network(), frozen=frozen)


def test_every_epoch_sees_every_example_once():
    schedule = Schedule(10, batch_size=20)
    seen = np.concatenate([schedule.chosen(step, 50) for step in range(10)])
    for epoch in range(4):
        assert sorted(seen[50 * epoch : 50 * (epoch + 1)]) == list(range(50))
    assert not np.array_equal(seen[:50], seen[50:100])
    assert not np.array_equal(seen[:20], Schedule(10, batch_size=20, seed=1).chosen(0, 50))


def test_sam_trains_in_the_loop():
    model = network().eval()
    optimizer = SAM(torch.optim.AdamW(model.parameters(), 0.02), rho=0.05)
    losses = [p.loss for p in finetune(model, data(), optimizer, Schedule(40, batch_size=20))]
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


def test_a_diverging_run_stops_with_the_step():
    model = network()
    model.head.weight.data.fill_(float("inf"))
    with pytest.raises(MeasurementError, match="the loss at step 0 is nan"):
        list(finetune(model, data(), spd(model), Schedule(3)))


def test_a_schedule_that_cannot_be_meant_is_refused():
    with pytest.raises(UsageError, match="cannot be meant"):
        Schedule(0)


def test_the_learning_rates_of_all_groups_follow_the_schedule():
    model = network()
    named = trained(model)
    optimizer = torch.optim.SGD([{"params": [named[0][1]], "lr": 0.1}, {"params": [named[2][1]], "lr": 0.02}])
    schedule = Schedule(10, batch_size=20, warm_up=0.2)
    for progress in finetune(model, data(), optimizer, schedule):
        expected = schedule.rate(progress.step - 1)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1 * expected, 0.02 * expected])
