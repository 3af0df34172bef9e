"""Weights in shards: gathered twice differentiably, exact products, and the rows of one process."""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from nets import dense_hessian, flat, made, objective
from processes import run
from test_scan import loader, pair
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import sharpscope
from sharpscope.curvature.lanczos import Eigenvalue
from sharpscope.curvature.point import Point
from sharpscope.curvature.trace import Trace
from sharpscope.errors import ModelError, UsageError
from sharpscope.gathering import checked_mesh, sharded, spread
from sharpscope.losses import cross_entropy
from sharpscope.network import network
from sharpscope.objective import Objective
from sharpscope.perturbation import MSharpness
from sharpscope.sharding import cut, whole

MEASURES = [Trace(most=2), Eigenvalue(most=3), MSharpness(m=7)]


def scan(folder, name, nets, **settings):
    return sharpscope.scan(
        *(*nets, loader(7, 4)), ood={"far": loader(3, 2)}, alphas=[0.5, 1.0], measures=MEASURES, batch_size=4,
        out=folder / name, progress=False, **settings,
    )  # fmt: skip


def wrapped(net):
    """The module after fully_shard, the first block and the root: the second block belongs to the root."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (net.blocks[0], net):
        fully_shard(module, mesh=mesh)
    return net


def one(folder):
    return scan(folder, "one", pair("vit"))


def modules(folder):
    return scan(folder, "modules", [wrapped(net) for net in pair("vit")], interventions=False)


def plain(folder):
    return scan(folder, "plain", pair("vit"), parallel="weights")


def mixed(folder):
    a, b = pair("vit")
    return scan(folder, "mixed", [wrapped(a), b])


def products(folder):
    """Hessian and Gauss-Newton products on shards of three processes, kept graphs or not, whole or in pieces."""
    reference, net = made("vit"), made("vit")
    shards = network(wrapped(net), "it")
    split = sharded(shards, net, checked_mesh(shards.parameters))
    whole_objective, weights, names = objective(reference, (4, 2))
    hessian, _ = dense_hessian(reference, 6)
    torch.manual_seed(3)
    v = {name: torch.randn_like(weights[name]) for name in names}
    plain = Point(whole_objective, weights, names)
    for budget, pieces in ((10**9, 1), (0, 2)):
        mine = Objective(split.forward, cross_entropy, whole_objective.batches, pieces, again=split.gatherings.kept)
        point = Point(mine, shards.parameters, names, graph_bytes=budget)
        assert point.loss == pytest.approx(plain.loss, rel=1e-14)
        own = {name: cut(tensor, shards.parameters[name]) for name, tensor in v.items()}
        for operator, expected in (
            (point, hessian @ flat(v, names)),
            (point.gauss_newton, flat(plain.gauss_newton.product(v), names)),
        ):
            found = {name: whole(tensor) for name, tensor in operator.product(own).items()}
            torch.testing.assert_close(flat(found, names), expected, rtol=1e-10, atol=1e-13)
        if budget:
            weights_bytes = sum(tensor.nbytes for tensor in weights.values())
            assert len(point._graphs.kept) == 2
            assert point._graphs.kept_bytes < plain._graphs.kept_bytes / 2 + weights_bytes
    (folder / f"products-{dist.get_rank()}").touch()


def scalar(folder):
    """A tensor without rows is whole everywhere, its gradient the sum, its entries counted once."""
    from sharpscope.tree import dot, flat, norm, rademacher, unflat

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tree = {"scale": torch.tensor(3.0), "rows": torch.arange(10.0).view(5, 2), "row": torch.ones(1, 4)}
    shards = spread(tree, mesh)
    assert dot(shards, shards) == dot(tree, tree)
    back = unflat(flat(shards), shards)
    for name, tensor in tree.items():
        assert torch.equal(whole(back[name]), tensor)
        assert torch.equal(whole(rademacher(shards, 1)[name]), rademacher(tree, 1)[name])
    leaves = {name: tensor.requires_grad_() for name, tensor in shards.items()}
    share = float(dist.get_rank() + 1)
    loss = share * sum((whole(leaf) ** 3).sum() for leaf in leaves.values())
    slopes = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    total = sum(range(1, dist.get_world_size() + 1))
    for slope, (name, tensor) in zip(slopes, tree.items(), strict=True):
        torch.testing.assert_close(whole(slope), 3 * total * tensor**2)
        (bend,) = torch.autograd.grad(slope, leaves[name], torch.ones_like(slope), retain_graph=True)
        torch.testing.assert_close(whole(bend), 6 * total * tensor)
    assert norm(shards) > 0
    (folder / f"scalar-{dist.get_rank()}").touch()


WORK = {work.__name__: work for work in (one, modules, plain, mixed, products, scalar)}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The folder of the same scan by one process and on the shards of two."""
    folder = tmp_path_factory.mktemp("shards")
    one(folder)
    assert run(WORK, 2, ("modules", "plain", "mixed"), folder) == [0, 0]
    return folder


@pytest.mark.parametrize("name", ["modules", "plain"])
def test_a_scan_in_shards_gives_the_rows_of_one_process(found, name):
    assert not list(found.glob(f"{name}-*.error")), next(found.glob(f"{name}-*.error")).read_text()
    alone, shared = (sharpscope.open(found / folder) for folder in ("one", name))
    columns = ["alpha", "layer", "measure", "draws", "converged"]
    assert shared.layers[columns].equals(alone.layers[columns])
    np.testing.assert_allclose(shared.layers["value"], alone.layers["value"], rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(shared.evals["value"], alone.evals["value"], rtol=1e-6)  # kept in single precision
    assert shared.meta["plan"] == alone.meta["plan"]  # so that either goes on where the other was stopped
    assert shared.meta["cost"]["processes"] == 2
    if name == "plain":
        columns = ["layer", "question", "split", "effect"]
        assert shared.interventions[columns].equals(alone.interventions[columns])


def test_every_process_returns_the_rows(found):
    for name in ("modules", "plain"):
        assert (found / f"{name}-0.jsonl").read_text() == (found / f"{name}-1.jsonl").read_text() != ""


def test_one_model_in_shards_and_one_not_is_refused(found):
    said = (found / "mixed-0.error").read_text()
    assert "the zero-shot model is in shards and the fine-tuned model is not" in said


def test_products_in_shards_are_those_of_the_dense_hessian(tmp_path):
    codes = run(WORK, 3, ("products", "scalar"), tmp_path)
    assert not list(tmp_path.glob("*.error")), next(tmp_path.glob("*.error")).read_text()
    assert codes == [0, 0, 0]
    assert len(list(tmp_path.glob("products-[012]"))) == len(list(tmp_path.glob("scalar-[012]"))) == 3


@pytest.fixture
def group_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
def test_modules_in_shards_of_one_process_are_measured_as_shards(tmp_path):
    alone = one(tmp_path)
    sharded_scan = modules(tmp_path)
    np.testing.assert_allclose(sharded_scan.layers["value"], alone.layers["value"], rtol=1e-9, atol=1e-13)


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("parallel", ["data", "alphas"])
def test_modules_in_shards_cannot_share_anything_but_weights(tmp_path, parallel):
    nets = [wrapped(net) for net in pair("vit")]
    with pytest.raises(UsageError, match=f"parallel='{parallel}' of models in shards.*\n  fix: parallel='weights'"):
        scan(tmp_path, "shared", nets, parallel=parallel)


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed.fsdp")  # that one process shards nothing
def test_a_wrapper_whose_forward_waits_for_other_processes_is_refused_with_the_way_out():
    distributed = nn.parallel.DistributedDataParallel
    with pytest.raises(ModelError, match=r"is a DistributedDataParallel: .* waits .*\n  fix: .* model\.module"):
        network(distributed(made("mlp")).eval(), "the model")
    with pytest.raises(ModelError, match=r"holds a DistributedDataParallel \('0'\)"):
        network(nn.Sequential(distributed(made("mlp"))).eval(), "the model")
    flat = FullyShardedDataParallel(made("mlp"), device_id=torch.device("cpu")).eval()
    with pytest.raises(ModelError, match=r"is a FullyShardedDataParallel: .*\n  fix: .* parallel='weights'"):
        network(flat, "the model")


def test_plain_tensors_have_no_mesh_and_other_spreads_are_refused(tmp_path):
    assert checked_mesh({"w": torch.ones(2)}) is None
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (1,))
        columns = distribute_tensor(torch.ones(2, 2), mesh, [Shard(1)])
        with pytest.raises(ModelError, match=r"'w' is spread as .*, not in rows over all processes"):
            checked_mesh({"w": columns})
        rows = distribute_tensor(torch.ones(2, 2), mesh, [Shard(0)])
        with pytest.raises(ModelError, match="'b' is spread as a plain tensor"):
            checked_mesh({"w": rows, "b": torch.ones(2)})
    finally:
        dist.destroy_process_group()
