"""Where memory runs out the scan goes on with less, says so, and finds the same numbers."""

import gc

import numpy as np
import pytest
import torch
from nets import dense_hessian, fine_tuned, flat, images, made, objective
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sharpscope
from sharpscope.backoff import back_off, is_out_of_memory
from sharpscope.budget import GraphBytes, pieces_for
from sharpscope.capacity import free_bytes
from sharpscope.curvature.graphs import Graphs, Part
from sharpscope.curvature.groups import pieces_of
from sharpscope.curvature.point import Point
from sharpscope.errors import MeasurementError, UsageError
from sharpscope.losses import contrastive
from sharpscope.objective import Batch, Objective

DATA = DataLoader(TensorDataset(*images(12)), batch_size=4)


class Cramped(nn.Module):
    """A network that makes graphs of so many examples at once and no more."""

    def __init__(self, net, most):
        super().__init__()
        self.net, self.most = net, most

    def forward(self, x):
        if torch.is_grad_enabled() and len(x) > self.most:
            raise torch.OutOfMemoryError(f"tried to allocate {len(x)} examples")
        return self.net(x)


def test_a_scan_that_has_room_for_single_examples_begins():
    assert not scanned(1, alphas=[0, 1]).layers.empty


def scanned(most=100, **settings):
    start = made("mlp")
    nets = Cramped(start, most).eval(), Cramped(fine_tuned(start, "mlp"), most).eval()
    chosen = {
        "alphas": 2,
        "measures": ["trace", "lambda_max", "gauss_newton_trace"],
        "batch_size": 4,
    } | settings
    return sharpscope.scan(*nets, DATA, interventions=False, **{"progress": False, **chosen})


@pytest.mark.parametrize("pieces", [1, 2, 3, 7])
def test_products_in_pieces_are_those_of_the_dense_hessian(pieces):
    net = made("vit")
    whole, weights, names = objective(net)
    point = Point(Objective(whole.forward, whole.loss, whole.batches, pieces), weights, names)
    hessian, _ = dense_hessian(net)
    torch.manual_seed(3)
    v = {name: torch.randn_like(weights[name]) for name in names}
    torch.testing.assert_close(flat(point.product(v), names), hessian @ flat(v, names), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(point.objective.gradient(weights, names)[1], point.gradient, rtol=1e-10, atol=1e-14)


def test_one_graph_of_a_piece_is_there_at_a_time():
    alive, most = [0], [0]

    class Graph:
        groups, nbytes = range(1), 0

        def __init__(self, piece):
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            self.size = len(piece.batch.targets)

        def __del__(self):
            alive[0] -= 1

    x, y = images(12)
    gc.disable()
    try:
        graphs = Graphs(Graph, [pieces_of(Batch(x, y), 1, 5)] * 2, (), 10**9)
        found = [
            Part(lambda g, *_: {"n": torch.tensor(g.size)}, lambda _, group=group: group).block((), {})["n"]
            for group in graphs.by_batch()
        ]
    finally:
        gc.enable()
    assert [int(n) for n in found] == [12, 12]
    assert most == [1]


def test_a_graph_of_a_piece_is_made_once_for_all_layers(monkeypatch):
    whole, weights, names = objective(made("mlp"))
    point = Point(Objective(whole.forward, whole.loss, whole.batches[:1], 3), weights, names)
    v = {name: {name: torch.randn_like(weights[name])} for name in names}
    alone = {name: point.block_products({name: v[name]})[name] for name in names}
    walked = []
    monkeypatch.setattr(
        point._graphs, "_graph", lambda piece, make=point._graphs._graph: walked.append(1) or make(piece)
    )
    together = point.block_products(v)
    assert len(walked) == 3
    for name in names:
        assert together[name][name].equal(alone[name][name])


@pytest.mark.parametrize("split_mapping", [False, True])
def test_a_split_batch_holds_all_examples_in_order(split_mapping):
    x, y = images(7)
    parts = Batch({"image": x} if split_mapping else x, y).split(3)
    assert [len(part.targets) for part in parts] == [3, 2, 2]
    assert torch.cat([part.inputs["image"] if split_mapping else part.inputs for part in parts]).equal(x)
    assert torch.cat([part.targets for part in parts]).equal(y)
    assert [len(part.targets) for part in Batch(x, y).split(9)] == [1] * 7


def test_a_scan_that_runs_out_of_memory_goes_on_in_pieces_with_the_same_probes():
    plain = scanned()
    found = scanned(most=2)
    assert [note for note in found.meta["warnings"] if "out of memory" in note] == [
        "out of memory at alpha 0: from there on gradient graphs are made anew for each product; "
        "numbers change by rounding only",
        "out of memory at alpha 0: from there on batches are computed in 2 pieces; numbers change by rounding only",
    ]
    assert found.layers[["alpha", "layer", "measure", "draws"]].equals(
        plain.layers[["alpha", "layer", "measure", "draws"]]
    )
    np.testing.assert_allclose(found.layers["value"], plain.layers["value"], rtol=1e-9)
    np.testing.assert_allclose(found.evals["value"], plain.evals["value"], rtol=1e-6)  # kept in single precision


def test_a_scan_that_runs_out_of_memory_keeps_half_of_its_graphs_first(monkeypatch):
    plain, made_first = scanned(), Graphs._first

    def first(graphs, piece):
        if len(graphs.kept) == 2:
            raise torch.OutOfMemoryError("the third")
        return made_first(graphs, piece)

    monkeypatch.setattr(Graphs, "_first", first)
    found = scanned()
    assert [note for note in found.meta["warnings"] if "out of memory" in note] == [
        "out of memory at alpha 0: from there on 1 of 2 gradient graphs are kept; numbers change by rounding only"
    ]
    np.testing.assert_allclose(found.layers["value"], plain.layers["value"], rtol=1e-9)


def test_a_scan_for_which_one_example_is_too_much_ends_with_a_sentence(monkeypatch):
    class Full(Point):
        def parts(self):
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("sharpscope.measurement.Point", Full)
    with pytest.raises(MeasurementError, match="cpu ran out of memory at alpha 0 with one example at a time"):
        scanned(measures=["lambda_max"])


def test_a_loss_that_couples_the_examples_of_a_batch_is_not_split():
    from types import SimpleNamespace

    whole, _, _ = objective(made("mlp"))
    job = SimpleNamespace(
        objective=Objective(whole.forward, contrastive, whole.batches[:1]), graph_bytes=0, device="cpu"
    )
    with pytest.raises(MeasurementError, match="at alpha 0 with a batch, which a contrastive loss needs whole"):
        back_off(job, "alpha 0")


@pytest.mark.parametrize(
    ("error", "is_so"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 80 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, is_so):
    assert is_out_of_memory(error) is is_so


def test_with_little_memory_batches_come_in_pieces_and_graphs_are_not_kept(monkeypatch, capsys):
    plain = scanned()
    monkeypatch.setattr("sharpscope.preparation.free_bytes", lambda *_: 16_000)
    monkeypatch.setattr("sharpscope.job.free_bytes", lambda *_: 0)
    found = scanned(memory=16_000, progress=None)
    assert "on 12 images of 'id', batches in 2 pieces to stay within memory; " in capsys.readouterr().err
    assert found.meta["warnings"][-1] == "batches are computed in 2 pieces to stay within memory"
    np.testing.assert_allclose(found.layers["value"], plain.layers["value"], rtol=1e-9)
    assert found.layers["draws"].equals(plain.layers["draws"])


class Bent(torch.nn.Module):
    """Its graph keeps a function of its weights once, and little for each example."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(300, 200) / 20)

    def forward(self, x):
        return x @ torch.tanh(self.weight)


def test_what_a_graph_keeps_once_is_not_taken_for_that_of_each_example(monkeypatch):
    torch.manual_seed(0)
    first, second = Bent().eval(), Bent().eval()
    x, y = torch.randn(64, 300), torch.arange(64) % 200
    kept = []
    monkeypatch.setattr(
        "sharpscope.preparation.pieces_for",
        lambda batch, graph, *rest: kept.append(graph) or pieces_for(batch, graph, *rest),
    )
    sharpscope.scan(
        first, second, [(x, y)], alphas=[0.0], measures=["trace"], batch_size=64, progress=False, device="cpu"
    )
    weights = first.weight.nbytes
    assert weights <= kept[0].once <= 4 * weights
    assert 4 * 300 <= kept[0].example <= 40 * 4 * 500
    free = 40 * weights
    assert pieces_for(64, kept[0], weights, free) == 1
    assert pieces_for(64, GraphBytes(sum(kept[0])), weights, free) == 32


@pytest.mark.parametrize(("measured", "graph"), [((), (0, 0)), ((7,), (7, 0)), ((7, 9), (2, 5)), ((7, 15), (8, 0))])
def test_what_a_graph_keeps_is_told_by_two_sizes(measured, graph):
    assert GraphBytes.of(measured) == graph


def test_what_a_process_holds_counts_against_its_limit():
    cpu = torch.device("cpu")
    free, limit = free_bytes(cpu), 2**50
    assert free_bytes(cpu, limit) == pytest.approx(free, rel=0.2)  # others take and give meanwhile
    assert free_bytes(cpu, 1) == 0
    held = free_bytes(cpu, limit := 2**33)
    assert held < limit - 2**26  # torch alone is larger


def test_no_memory_is_refused():
    with pytest.raises(UsageError, match="memory=0"):
        scanned(memory=0)


@pytest.mark.parametrize(("free", "pieces"), [(10**9, 1), (10**4, 1), (3000, 2), (1500, 4), (100, 16)])
def test_pieces_are_as_few_as_what_is_free_allows(free, pieces):
    assert pieces_for(16, GraphBytes(50), weights=10, free=free) == pieces
    room = max(free - 120, free / 4) / 2
    assert pieces == 16 or 2 * 50 * 16 / pieces <= room
    assert pieces == 1 or 2 * 50 * 16 / (pieces / 2) > room
