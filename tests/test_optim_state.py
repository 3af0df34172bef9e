"""Anchors by name, and saved states that come back bit for bit or are refused before anything changes."""

import copy
import io
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from sharpscope.errors import MismatchError, ModelError, UsageError
from sharpscope.optim import SGDSPD, AdamL2SP, AdamSPD
from sharpscope.optim.anchor import digest, plain_name
from sharpscope.partition import Partition


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def train(model, optimizer, steps, start=0):
    """Deterministic in the step number, with gradients that turn: momentum and gradient disagree now and then."""
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step // 3)
        x = torch.randn(6, 5, generator=generator).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def through_disk(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", [AdamSPD, SGDSPD])
@pytest.mark.parametrize("stored", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(kind, stored):
    options = {"lr": 0.05, "store_anchor": stored} | ({"momentum": 0.9} if kind is SGDSPD else {})
    straight = network()
    optimizer = kind(straight.named_parameters(), anchor=network(1), **options)
    optimizer.record()
    train(straight, optimizer, 40)
    assert any(one.active for one in optimizer.activity())

    first = network()
    before = kind(first.named_parameters(), anchor=network(1), **options)
    train(first, before, 17)
    model, state = through_disk(first.state_dict()), through_disk(before.state_dict())
    second = network(7)
    second.load_state_dict(model)
    after = kind(second.named_parameters(), anchor=network(1), **options)
    after.load_state_dict(state)
    train(second, after, 23, start=17)
    assert same(weights(second), weights(straight))


def test_a_state_that_went_through_another_dtype_and_device_order_resumes_bit_for_bit():
    straight = network()
    train(straight, AdamSPD(straight.named_parameters(), 0.05, anchor=network(1)), 40)

    first = network()
    before = AdamSPD(first.named_parameters(), 0.05, anchor=network(1))
    train(first, before, 17)
    # A double-precision twin whose parameters come in another order holds the state for a while.
    twin = network(3, torch.float64)
    twin.load_state_dict(first.state_dict())
    middle = AdamSPD(reversed(list(twin.named_parameters())), 0.05, anchor=network(1))
    middle.load_state_dict(through_disk(before.state_dict()))
    assert middle.state[twin[0].weight]["exp_avg"].dtype == torch.float64
    second = network()
    second.load_state_dict(twin.state_dict())
    after = AdamSPD(second.named_parameters(), 0.05, anchor=network(1))
    after.load_state_dict(through_disk(middle.state_dict()))
    train(second, after, 23, start=17)
    assert same(weights(second), weights(straight))


def test_the_weights_follow_the_model_to_another_dtype():
    model = network()
    optimizer = AdamSPD(model.named_parameters(), 0.05, anchor=network(1))
    model.double()
    train(model, optimizer, 3)
    assert {anchor.dtype for anchor in optimizer.anchors.values()} == {torch.float64}


def test_the_weights_follow_the_model_to_another_device():
    model = network()
    optimizer = AdamSPD(model.named_parameters(), 0.05, anchor=network(1))
    model.to("meta")
    for name, parameter in model.named_parameters():
        assert optimizer.anchor_of(name, parameter).device.type == "meta"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anchor": network(2)}, r"anchor of '0.weight' is not the one"),
        ({"anchor": None}, r"anchor of '0.weight' is not the one .*zeros now"),
        ({"exclude": ["0.bias"]}, r"anchor of '0.bias' is not the one .*excluded now"),
    ],
)
def test_a_state_with_another_anchor_is_refused_by_name_and_nothing_changes(change, message):
    model = network()
    optimizer = AdamSPD(model.named_parameters(), 0.05, anchor=network(1))
    train(model, optimizer, 5)
    state = through_disk(optimizer.state_dict())
    other = AdamSPD(model.named_parameters(), **{"lr": 0.3, "anchor": network(1)} | change)
    train(model, other, 2)
    before, kept = copy.deepcopy(other.state_dict()), weights(model)
    with pytest.raises(MismatchError, match=message):
        other.load_state_dict(state)
    after = other.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(after["state"][i]["exp_avg"], before["state"][i]["exp_avg"]) for i in range(4))
    assert same(weights(model), kept)


def test_one_changed_number_in_one_anchor_tensor_is_found():
    model, anchor = network(), network(1)
    state = AdamSPD(model.named_parameters(), anchor=anchor).state_dict()
    with torch.no_grad():
        anchor[2].bias[1] += 1e-6
    with pytest.raises(MismatchError, match=r"'2\.bias'"):
        AdamSPD(model.named_parameters(), anchor=anchor).load_state_dict(state)


def test_a_state_of_another_shape_or_name_is_refused_by_name():
    state = AdamSPD(network().named_parameters(), anchor="init")
    train_model = network()
    optimizer = AdamSPD(train_model.named_parameters(), anchor="init")
    train(train_model, optimizer, 1)
    state = optimizer.state_dict()
    wider = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))
    with pytest.raises(MismatchError, match=r"'0\.weight' is \(9, 5\), its exp_avg in the saved state \(8, 5\)"):
        AdamSPD(wider.named_parameters(), anchor="init").load_state_dict(state)
    renamed = [(name.replace("2.", "head."), p) for name, p in network().named_parameters()]
    with pytest.raises(MismatchError, match=r"'head\.weight' of group 0 is only in the optimiser"):
        AdamSPD(renamed, anchor="init").load_state_dict(state)
    groups = [{"params": [item]} for item in list(network().named_parameters())[:2]]
    with pytest.raises(MismatchError, match="1 parameter groups, the optimiser 2"):
        AdamSPD(groups, anchor="init").load_state_dict(state)


def test_what_is_no_state_of_such_an_optimiser_is_refused():
    model = network()
    optimizer = AdamSPD(model.named_parameters(), anchor="init")
    with pytest.raises(UsageError, match=r"keys \['model', 'optimizer'\]\n  fix: .*checkpoint\['optimizer'\]"):
        optimizer.load_state_dict({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    with pytest.raises(MismatchError, match="group 0 of the saved state has no 'betas'"):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters(), 0.1).state_dict())
    with pytest.raises(MismatchError, match="no 'momentum'"):
        SGDSPD(model.named_parameters(), anchor="init").load_state_dict(optimizer.state_dict())
    train(model, optimizer, 1)


def test_stored_anchors_replace_those_of_the_optimiser_loaded_into():
    model = network()
    optimizer = AdamSPD(model.named_parameters(), anchor=network(1), store_anchor=True)
    state = through_disk(optimizer.state_dict())
    other = AdamSPD(network(4).double().named_parameters(), anchor="init")
    other.load_state_dict(state)
    assert other.anchor_hash == optimizer.anchor_hash
    assert torch.equal(other.anchors["0.weight"].float(), network(1)[0].weight)
    assert other.anchors["0.weight"].dtype == torch.float64


def test_stored_anchors_of_half_precision_weights_keep_the_hash_of_what_was_given():
    def optimizer():
        return AdamSPD(network().bfloat16().named_parameters(), anchor=network(1), store_anchor=True)

    before, after = optimizer(), optimizer()
    after.load_state_dict(through_disk(before.state_dict()))
    assert (
        after.anchor_hash == before.anchor_hash == AdamSPD(network().named_parameters(), anchor=network(1)).anchor_hash
    )


def test_a_stored_anchor_zero_stays_zero():
    zero = AdamSPD(network().named_parameters(), anchor=None, store_anchor=True)
    other = AdamSPD(network().named_parameters(), anchor="init")
    other.load_state_dict(through_disk(zero.state_dict()))
    assert set(other.anchors.values()) == {None}
    assert other.anchor_hash == zero.anchor_hash


def test_a_state_of_adamw_loads_with_a_warning():
    model = network()
    plain = torch.optim.AdamW(model.named_parameters(), 0.05)
    train(model, plain, 3)
    optimizer = AdamSPD(model.named_parameters(), anchor="init")
    with pytest.warns(UserWarning, match="saved without anchors"):
        optimizer.load_state_dict({**plain.state_dict()})
    assert optimizer.state[model[0].weight]["step"] == 3
    assert optimizer.param_groups[0]["decay"] == 1.0
    train(model, optimizer, 1)


def test_the_state_dict_has_no_copy_of_the_anchor():
    optimizer = AdamSPD(network().named_parameters(), anchor=network(1))
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    assert state["param_groups"][0]["anchor_digests"][0] == digest(network(1)[0].weight)


def test_digests_do_not_depend_on_a_dtype_that_holds_the_values():
    values = torch.randn(7).bfloat16()
    assert digest(values) == digest(values.float()) == digest(values.double())
    assert digest(values.double()) != digest(values.double() + 1e-15)
    assert digest(values) != digest(values.reshape(7, 1))


def test_anchors_are_matched_by_name_not_by_position():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    other = {name: tensor + 1 for name, tensor in reversed(list(model.state_dict().items()))}
    optimizer = AdamSPD(model.named_parameters(), anchor=other)
    for name, parameter in model.named_parameters():
        assert torch.equal(optimizer.anchors[name], parameter + 1)


def test_anchors_are_copies():
    model = network()
    optimizer = AdamSPD(model.named_parameters(), 0.05, anchor=model)
    start = weights(model)
    train(model, optimizer, 3)
    assert same(list(optimizer.anchors.values()), start)
    assert not same(weights(model), start)


@pytest.mark.parametrize(
    ("anchor", "message"),
    [
        ({"0.weight": torch.zeros(8, 5)}, r"'0\.bias' has no anchor"),
        ({**network().state_dict(), "0.weight": torch.zeros(1, 5)}, r"'0\.weight' is \(8, 5\), its anchor \(1, 5\)"),
        ({**network().state_dict(), "2.bias": torch.zeros(3, dtype=torch.long)}, r"anchor of '2\.bias' is torch.int64"),
        ({**network().state_dict(), "2.bias": np.zeros(3)}, r"anchor of '2\.bias' is a ndarray\n  fix: tensors"),
    ],
)
def test_a_missing_or_broadcastable_or_integer_anchor_is_refused_by_name(anchor, message):
    with pytest.raises(MismatchError, match=message):
        AdamSPD(network().named_parameters(), anchor=anchor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anchor": "start"}, "anchor='start'"),
        ({"anchor": 3}, "anchor=3"),
        ({"decay": -0.1}, r"decay=-0\.1"),
        ({"decay": float("nan")}, "decay=nan"),
        ({"decay": "0.5"}, "decay='0.5'"),
        ({"exclude": None}, r"exclude=None\n  fix: regular expressions"),
        ({"exclude": [3]}, "exclude=3 is no regular expression"),
        ({"exclude": ["heda"]}, "exclude='heda' matches no parameter"),
        ({"exclude": ["("]}, r"exclude='\(' is no regular expression"),
        ({"exclude": [""]}, "every parameter is excluded"),
        ({"granularity": "block"}, "granularity='block'"),
        ({"gate": "momentum"}, "gate='momentum'"),
        ({"layers": Partition({"first": ("0.weight",)})}, r"'0\.bias' is in no layer"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        AdamSPD(network().named_parameters(), **{"anchor": "init"} | change)


def test_parameters_without_names_are_refused_with_the_way_out():
    with pytest.raises(UsageError, match=r"model\.named_parameters\(\)"):
        AdamSPD(network().parameters(), anchor="init")
    with pytest.raises(UsageError, match="no parameters"):
        AdamSPD([], anchor="init")


@pytest.mark.parametrize("given", [network(), network().state_dict(), dict(network().named_parameters()), None])
def test_what_holds_no_named_parameters_is_named(given):
    with pytest.raises(UsageError, match=rf"the parameters are a {type(given).__name__}\n  fix: model\.named_"):
        AdamSPD(given, anchor="init")


@pytest.mark.parametrize("groups", [False, True])
def test_two_parameters_of_one_name_are_refused(groups):
    """They would share one anchor."""
    named = [list(network(seed).named_parameters()) for seed in (0, 1)]
    with pytest.raises(UsageError, match=r"two parameters are called '0\.weight'"):
        AdamSPD([{"params": part} for part in named] if groups else named[0] + named[1], anchor="init")


def test_parameters_without_norms_are_refused_by_name():
    flat = nn.Parameter(torch.zeros(4))
    with pytest.raises(ModelError, match=r"'_fsdp_wrapped_module\._flat_param'.*FSDP1"):
        AdamSPD([("_fsdp_wrapped_module._flat_param", flat)], anchor="init")
    with pytest.raises(UsageError, match=r"'z' is torch\.complex64"):
        AdamSPD([("z", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))], anchor="init")


def test_sparse_gradients_are_refused_by_name():
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = SGDSPD([("table.weight", table.weight)], anchor="init")
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ModelError, match=r"gradient of 'table\.weight' is sparse"):
        optimizer.step()


def test_an_excluded_parameter_gets_the_plain_step():
    mine, theirs = network(), network()
    optimizer = AdamSPD(mine.named_parameters(), 0.3, anchor=network(1), exclude=[r"^2\."])
    generator = torch.Generator().manual_seed(0)
    plain = torch.optim.Adam(theirs.parameters(), 0.3)
    for _ in range(20):
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            a.grad = b.grad = torch.randn(a.shape, generator=generator)
        optimizer.step()
        plain.step()
    assert [torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True)][2:] == [True] * 2
    assert not torch.equal(mine[0].weight, theirs[0].weight)


def test_names_are_those_of_the_model_before_it_was_wrapped():
    model = network()
    wrapped = [("module._orig_mod." + name, p) for name, p in model.named_parameters()]
    optimizer = AdamSPD(wrapped, anchor=network(1))
    assert list(optimizer.anchors) == [name for name, _ in model.named_parameters()]
    assert plain_name("encoder.submodule.weight") == "encoder.submodule.weight"


def test_a_group_added_later_brings_its_anchor():
    model = network()
    names = dict(model.named_parameters())
    optimizer = AdamSPD([("2.weight", names["2.weight"])], anchor=network(1))
    with pytest.raises(MismatchError, match=r"'0\.weight' has no anchor"):
        optimizer.add_param_group({"params": [("0.weight", names["0.weight"])]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [("0.weight", names["0.weight"])], "anchor": network(1), "decay": 0.5})
    assert optimizer.param_groups[1]["decay"] == 0.5
    assert torch.equal(optimizer.anchors["0.weight"], network(1)[0].weight)
    assert set(optimizer.layers.names) == {"0.weight", "2.weight"}
    train(model, optimizer, 3)


def test_a_deep_copy_goes_on_alike():
    model = network()
    optimizer = AdamSPD(model.named_parameters(), 0.05, anchor=network(1))
    train(model, optimizer, 5)
    twin, other = copy.deepcopy((model, optimizer))
    train(model, optimizer, 10, start=5)
    train(twin, other, 10, start=5)
    assert same(weights(model), weights(twin))


def test_hooks_run_once_a_step_also_after_torch_has_wrapped_its_own():
    model = network()
    torch.optim.AdamW(model.parameters()).step()
    optimizer = AdamSPD(model.named_parameters(), anchor="init")
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, 2)
    assert calls == ["before", "after"] * 2


def test_the_gradient_of_a_closure_is_the_one_that_gates():
    first, second = network(), network()
    one = AdamSPD(first.named_parameters(), 0.05, anchor=network(1))
    other = AdamSPD(second.named_parameters(), 0.05, anchor=network(1))
    for step in range(20):
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(step // 3))

        def closure(x=x):
            second.zero_grad()
            loss = second(x).square().sum()
            loss.backward()
            return loss

        returned = other.step(closure)
        train(first, one, 1, start=step)
        assert returned.requires_grad
    assert same(weights(first), weights(second))


def test_scaler_accumulation_clipping_and_scheduler_work_as_with_adamw():
    def run(kind, **options):
        model = network()
        optimizer = kind(model.named_parameters(), lr=0.05, weight_decay=0.01, **options)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in range(20):
            for part in range(2):
                x = torch.randn(6, 5, generator=torch.Generator().manual_seed(2 * step + part))
                scaler.scale(model(x).square().sum() / 2).backward()
            if step == 7:
                model[0].weight.grad[0, 0] = float("inf")  # the scaler skips this step
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch, about the skipped step
                schedule.step()
            optimizer.zero_grad()
        return model, optimizer

    plain, _ = run(torch.optim.AdamW)
    zero, _ = run(AdamSPD, anchor=network(1), decay=0.0)
    assert same(weights(zero), weights(plain))
    held, optimizer = run(AdamSPD, anchor=network(1))
    assert not same(weights(held), weights(plain))
    assert all(torch.isfinite(weight).all() for weight in weights(held))
    assert optimizer.state[held[0].weight]["step"] == 19


def test_an_infinite_gradient_under_fused_scaling_changes_no_weight():
    model = network()
    optimizer = AdamSPD(model.named_parameters(), 0.05, anchor=network(1), fused=True)
    before = weights(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    optimizer.step()
    assert same(weights(model), before)


def test_there_is_one_anchor_copy_and_none_for_anchor_zero():
    def full_size(kind, **options):
        model = network()
        optimizer = kind(model.named_parameters(), **options)
        train(model, optimizer, 2)
        anchors = getattr(optimizer, "anchors", {}).values()
        tensors = [t for s in optimizer.state.values() for t in s.values() if t.ndim]
        return sum(t.numel() for t in (*tensors, *(a for a in anchors if a is not None)))

    size = sum(p.numel() for p in network().parameters())
    adam = full_size(torch.optim.AdamW)
    assert full_size(AdamSPD, anchor="init") == adam + size
    assert full_size(AdamSPD, anchor=None) == adam
    assert full_size(AdamL2SP, anchor="init", strength=0.1) == adam + size


def test_distributed_checkpoints_carry_state_and_anchor_hashes():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    straight = network()
    train(straight, AdamSPD(straight.named_parameters(), 0.05, anchor=network(1)), 20)
    first = network()
    before = AdamSPD(first.named_parameters(), 0.05, anchor=network(1))
    train(first, before, 9)
    state = get_optimizer_state_dict(first, before)
    second = network(4)
    second.load_state_dict(first.state_dict())
    after = AdamSPD(second.named_parameters(), 0.05, anchor=network(1))
    set_optimizer_state_dict(second, after, state)
    train(second, after, 11, start=9)
    assert same(weights(second), weights(straight))
    with pytest.raises(MismatchError, match=r"'0\.weight' is not the one"):
        set_optimizer_state_dict(second, AdamSPD(second.named_parameters(), anchor=network(2)), state)
