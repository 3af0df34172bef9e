"""The optimiser inside transformers' Trainer, Lightning, PEFT and FSDP2, each with its audit log read back."""

import importlib
import os
import socket

import pytest
import torch

from sharpscope.curvature.trace import Trace
from sharpscope.errors import ModelError, UsageError
from sharpscope.optim import AdamSPD, AuditLog, audited, read_audit
from sharpscope.optim.sharpness import SharpnessProbe
from sharpscope.partition import layers

SIDE = 16


def needs(name):
    """Import an optional dependency; a missing one skips here and fails in CI."""
    if importlib.util.find_spec(name) is None and not os.environ.get("CI"):
        pytest.skip(f"{name} is not installed")
    return importlib.import_module(name)


def classifier():
    transformers = needs("transformers")
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        vision_config=vision | {"image_size": SIDE, "patch_size": 8, "projection_dim": 8},
        text_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
        num_labels=3,
    )
    return transformers.CLIPForImageClassification(config)


def examples(count=24):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 3, SIDE, SIDE, generator=generator), torch.arange(count) % 3


def spd(model, **options):
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return AdamSPD(
        named, **{"lr": 5e-3, "anchor": "init", "exclude": ["classifier"], "layers": layers(model)} | options
    )


class TestTrainer:
    def run(self, folder, steps, *, model=None, optimizer=None, resume=None, callback=None):
        transformers = needs("transformers")
        needs("accelerate")
        model = model or classifier()
        optimizer = optimizer or spd(model)
        x, y = examples()
        arguments = transformers.TrainingArguments(
            str(folder / "out"),
            max_steps=steps,
            per_device_train_batch_size=8,
            lr_scheduler_type="constant",
            save_steps=6,
            seed=0,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
            dataloader_pin_memory=False,
        )
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=[{"pixel_values": a, "labels": b} for a, b in zip(x, y, strict=True)],
            optimizers=(optimizer, None),
            callbacks=[callback] if callback else None,
        )
        trainer.train(resume_from_checkpoint=resume)
        return model, optimizer

    def callback(self, folder, **options):
        from sharpscope.optim.hf import Callback

        x, y = examples(8)
        return Callback([{"pixel_values": x, "labels": y}], audit=folder / "spd.jsonl", **{"every": 3} | options)

    def test_the_log_has_every_layer_every_n_steps_and_the_sharpness_beside(self, tmp_path):
        callback = self.callback(tmp_path)
        _, optimizer = self.run(tmp_path, 7, callback=callback)
        log = read_audit(tmp_path / "spd.jsonl")
        assert list(dict.fromkeys(log.activity["step"])) == [3, 6, 7]
        assert set(log.activity["layer"]) == set(optimizer.layers.layers)
        used = len(optimizer.anchors) - 2  # this model does not use its last norm: no gradient, no decision
        assert log.activity["decisions"].sum() == 7 * used
        assert set(log.activity.groupby("layer")["decisions"].sum()[lambda d: d == 0].index) == {"visual.norm"}
        assert log.activity["active"].sum() > 0
        assert set(log.sharpness["step"]) == {3, 6}
        assert set(optimizer.layers.layers) <= set(log.sharpness["layer"])
        assert "held back" in callback.summary

    def test_a_run_resumed_from_a_checkpoint_continues_weights_and_log(self, tmp_path):
        (tmp_path / "a").mkdir()
        straight, _ = self.run(tmp_path / "a", 9, callback=self.callback(tmp_path / "a"))
        (tmp_path / "b").mkdir()
        self.run(tmp_path / "b", 8, callback=self.callback(tmp_path / "b"))
        resumed, _ = self.run(
            tmp_path / "b", 9, callback=self.callback(tmp_path / "b"), resume=str(tmp_path / "b/out/checkpoint-6")
        )
        for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b)
        logs = [read_audit(tmp_path / name / "spd.jsonl").activity for name in "ab"]
        assert logs[0].equals(logs[1])

    @pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
    def test_lora_adapters_have_anchor_zero_and_no_anchor_memory(self, tmp_path):
        peft = needs("peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
        torch.manual_seed(0)
        model = peft.get_peft_model(classifier(), config)
        optimizer = spd(model, anchor=None, lr=2e-2, layers=None)
        self.run(tmp_path, 12, model=model, optimizer=optimizer, callback=self.callback(tmp_path, every=6))
        assert set(optimizer.anchors.values()) == {None}
        assert all("lora_" in name and "base_model" not in name for name in optimizer.anchors)
        assert set(optimizer.layers.layers) == {"visual.block.00", "visual.block.01"}
        log = read_audit(tmp_path / "spd.jsonl")
        assert log.activity["active"].sum() > 0
        assert log.activity["relative_distance"].isna().all()
        assert (log.activity["distance"] > 0).all()
        assert set(log.sharpness["layer"]) >= {"visual.block.00", "visual.block.01"}


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*The number of training batches")
class TestLightning:
    def test_a_fit_is_logged_with_sharpness_and_equals_the_plain_loop(self, tmp_path):
        needs("lightning")
        import lightning.pytorch as pl

        from sharpscope.optim.lightning import Callback

        class Module(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.model = classifier()

            def forward(self, x):
                return self.model(x).logits

            def training_step(self, batch, index):
                return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

            def configure_optimizers(self):
                return spd(self, layers=None)

        x, y = examples()
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
        callback = Callback([(x[:8], y[:8])], every=3, audit=tmp_path / "spd.jsonl")
        module = Module()
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        pl.Trainer(
            max_steps=7,
            accelerator="cpu",
            default_root_dir=tmp_path,
            callbacks=[callback],
            **dict.fromkeys(quiet, False),
        ).fit(module, loader)
        log = read_audit(tmp_path / "spd.jsonl")
        layers = set(log.activity["layer"])
        assert len(layers) > 1  # those of the network inside the module
        assert all(list(mine["step"]) == [3, 6, 7] for _, mine in log.activity.groupby("layer"))
        assert log.activity["active"].sum() > 0
        assert set(log.sharpness["step"]) == {3, 6}
        assert "held back" in callback.summary

        plain = Module()
        optimizer = spd(plain, layers=None)
        for step in range(7):
            start = 8 * (step % 3)
            optimizer.zero_grad()
            plain.training_step((x[start : start + 8], y[start : start + 8]), step).backward()
            optimizer.step()
        for a, b in zip(module.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b)

    def test_an_optimiser_without_projection_is_refused(self, tmp_path):
        needs("lightning")
        from types import SimpleNamespace

        from sharpscope.optim.lightning import Callback

        trainer = SimpleNamespace(optimizers=[torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])], global_step=0)
        with pytest.raises(UsageError, match=r"none of the optimisers \(SGD\)"):
            Callback(audit=tmp_path / "spd.jsonl").on_train_start(trainer, torch.nn.Linear(1, 1))


class TestAccelerate:
    @pytest.fixture(autouse=True)
    def _its_own_state(self):
        """One process has one state, the Trainer's too."""
        state = needs("accelerate").state.AcceleratorState
        state._reset_state(reset_partial_state=True)
        yield
        state._reset_state(reset_partial_state=True)

    def test_the_log_sees_through_its_optimiser(self, tmp_path):
        accelerator, model = needs("accelerate").Accelerator(cpu=True), classifier()
        optimizer = accelerator.prepare_optimizer(spd(model))
        x, y = examples(8)
        with audited(optimizer, tmp_path / "spd.jsonl", every=1):
            for _ in range(2):
                optimizer.zero_grad()
                model(pixel_values=x, labels=y).loss.backward()
                optimizer.step()
        assert set(read_audit(tmp_path / "spd.jsonl").activity["step"]) == {1, 2}

    def test_its_autocast_is_left_out_of_the_measured_sharpness(self):
        model, seen = classifier(), []
        x, y = examples(8)
        probe = SharpnessProbe([{"pixel_values": x, "labels": y}], Trace(most=2))
        plain = [found.value for _, found in probe(model, layers(model))]
        prepared = needs("accelerate").Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
        prepared.classifier.register_forward_hook(lambda *call: seen.append(call[2].dtype))
        assert [found.value for _, found in probe(prepared, layers(model))] == plain
        assert set(seen) == {torch.float32}
        prepared(pixel_values=x)
        assert seen[-1] == torch.bfloat16


def toy(seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).double()


def toy_steps(model, optimizer, steps):
    for step in range(steps):
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(step // 3)).double()
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def sharded_rank(rank, port, folder, queue):
    """One of two processes: the same run sharded by FSDP2, compared with the whole one."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for granularity in ("tensor", "layer"):
        model = toy(0)
        fully_shard(model, mesh=mesh)
        optimizer = AdamSPD(model.named_parameters(), 0.05, anchor=toy(1), granularity=granularity)
        log = AuditLog(f"{folder}/{granularity}.jsonl", optimizer, every=20)
        toy_steps(model, optimizer, 20)
        summary = log.close(20)
        state = optimizer.state_dict()
        AdamSPD(model.named_parameters(), anchor=toy(1), granularity=granularity).load_state_dict(state)
        stored = AdamSPD(model.named_parameters(), anchor=toy(1), store_anchor=True).state_dict()
        again = AdamSPD(model.named_parameters(), anchor="init", granularity=granularity)
        again.load_state_dict(stored)
        for name, anchor in again.anchors.items():
            assert torch.equal(anchor, optimizer.anchors[name])
        assert again.anchor_hash == optimizer.anchor_hash
        weights = {name: p.full_tensor().detach().tolist() for name, p in model.named_parameters()}
        found[granularity] = (weights, optimizer.anchor_hash, summary)
    try:
        AdamSPD(model.named_parameters(), anchor="init", row_norms=True)
    except ModelError as refused:
        found["rows"] = refused.problem
    if rank == 0:
        queue.put(found)
    dist.destroy_process_group()


def test_sharded_over_two_processes_a_run_is_the_whole_one(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=sharded_rank, args=(rank, port, str(tmp_path), queue)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    found = queue.get(timeout=120)
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    for granularity in ("tensor", "layer"):
        model = toy(0)
        optimizer = AdamSPD(model.named_parameters(), 0.05, anchor=toy(1), granularity=granularity)
        with audited(optimizer, tmp_path / "whole.jsonl") as session:
            toy_steps(model, optimizer, 20)
        weights, anchor_hash, summary = found[granularity]
        for name, parameter in model.named_parameters():
            expected = torch.tensor(weights[name], dtype=torch.float64)
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-12)
        assert (anchor_hash, summary) == (optimizer.anchor_hash, session.summary)
        here, there = (read_audit(tmp_path / f"{name}.jsonl").activity for name in ("whole", granularity))
        assert here["distance"].tolist() == pytest.approx(there["distance"].tolist(), rel=1e-12)
        (tmp_path / "whole.jsonl").unlink()
    assert "'0.weight' is sharded, its rows have no norms here" in found["rows"]
