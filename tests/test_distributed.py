"""Several processes give the numbers of one, bit for bit; one that dies ends the scan, which goes on from its cells."""

import json
import os

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run
from test_backoff import Cramped
from test_scan import loader, pair

import sharpscope
from sharpscope import board, ranks
from sharpscope.curvature.lanczos import Eigenvalue
from sharpscope.curvature.trace import Trace
from sharpscope.device import own_device
from sharpscope.errors import UsageError
from sharpscope.journal import decode
from sharpscope.perturbation import AverageMSharpness, MSharpness
from sharpscope.ranks import Ranks, parallel_from
from sharpscope.search import RecipeSearch

# 14 images in batches of 3: five batches, so shares of 2 and 3 or of 1, 2 and 2, the last with a smaller batch.
IMAGES, BATCH = 14, 3
MEASURES = [
    Trace(most=4),
    Eigenvalue(most=8),
    MSharpness(m=4),
    AverageMSharpness(draws=1),
    Trace(most=2, matrix="gauss_newton"),
    Eigenvalue(matrix="gauss_newton", most=3),
]


def scan(out, *, seed=1, alphas=4, measures=MEASURES, **settings):
    a, b = pair("vit")
    with torch.no_grad():
        b.head.bias += seed - 1
    return sharpscope.scan(
        *(a, b, loader(IMAGES, BATCH)), ood={"far": loader(9, 2)}, alphas=alphas, measures=measures, batch_size=BATCH,
        out=out, progress=False, **settings,
    )  # fmt: skip


def whole(folder):
    """All phases, shared by data."""
    return scan(folder / "data", interventions=True, recipes=RecipeSearch(4))


def chains(folder):
    """The path as three chains, of which each process takes its own."""
    return scan(folder / "alphas", interventions=False, chains=3, parallel="alphas" if dist.is_initialized() else None)


def many(folder):
    """Two batches, so that a third process has nothing to do."""
    return scan(folder / "many", limit=6, alphas=2, measures=MEASURES[:3], interventions=False)


WORK = {work.__name__: work for work in (whole, chains, many)}


def cramped(folder, **settings):
    """Rank 1 has room for two examples at a time; its fault ends neither rank."""
    a, b = pair("vit")
    most = 2 if dist.is_initialized() and dist.get_rank() == 1 else 100
    nets = Cramped(a, most).eval(), Cramped(b, most).eval()
    return sharpscope.scan(
        *(*nets, loader(IMAGES, BATCH)), alphas=2, measures=MEASURES[:3], batch_size=BATCH, progress=False, **settings
    )


def cramped_apart(folder):
    """Rank 1 finds its own alpha with less."""
    return cramped(folder, chains=2, out=folder / "cramped_apart")


class Deadly(Trace):
    """Ends the process of rank 1 at the third point it is asked for."""

    def __call__(self, point, layers, seed):
        self.__dict__["points"] = self.__dict__.get("points", 0) + 1
        if self.__dict__["points"] == 3 and dist.is_initialized() and dist.get_rank() == 1:
            os._exit(9)
        return super().__call__(point, layers, seed)


def deadly(folder, name="deadly"):
    return scan(folder / name, alphas=4, measures=[Deadly(most=8), Eigenvalue()])


def undisturbed(folder):
    return deadly(folder, "undisturbed")


def deadly_apart(folder, name="deadly_apart"):
    if dist.is_initialized():
        board.SILENCE = 5.0  # in this process, which ends with the work
    return scan(folder / name, alphas=6, chains=2, measures=[Deadly(most=8), Eigenvalue()])


def undisturbed_apart(folder):
    return deadly_apart(folder, "undisturbed_apart")


class Faulty(Trace):
    """Rank 1 has a bug."""

    def __call__(self, point, layers, seed):
        if dist.get_rank() == 1:
            raise ZeroDivisionError("a bug")
        return super().__call__(point, layers, seed)


def faulty(folder):
    return scan(folder / "faulty", alphas=4, chains=2, measures=[Faulty(most=8)])


def unlike(folder):
    return scan(folder / "unlike", seed=1 + dist.get_rank(), measures=[Trace(most=4)])


def nan_in_the_last(folder):
    """The second chain meets an overflow; the first has finished cells."""
    a, b = pair("mlp")
    with torch.no_grad():
        b[4].weight[0, 0] = torch.inf
    return sharpscope.scan(
        *(a, b, loader()), alphas=[0, 1], chains=2, measures=["trace"], out=folder / "nan", progress=False
    )


LATER = (deadly, undisturbed, deadly_apart, undisturbed_apart, faulty, unlike, nan_in_the_last, cramped, cramped_apart)
WORK |= {work.__name__: work for work in LATER}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Folders of the same scans by 1, 2 and 3 processes."""
    folders = {size: tmp_path_factory.mktemp(f"of-{size}") for size in (1, 2, 3)}
    for size, folder in folders.items():
        codes = run(WORK, size, ("whole", "chains", "many"), folder)
        assert codes == [0] * size, [error.read_text() for error in folder.glob("*.error")]
        assert not list(folder.glob("*.error")), next(folder.glob("*.error")).read_text()
    return folders


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ["data", "alphas", "many"])
def test_the_file_of_several_processes_is_the_file_of_one(found, size, name):
    assert (found[size] / name / "cells.jsonl").read_bytes() == (found[1] / name / "cells.jsonl").read_bytes()
    metas = [json.loads((found[n] / name / "scan.json").read_text()) for n in (1, size)]
    assert [meta["cost"].pop("processes") for meta in metas] == [1, size]
    for meta in metas:
        del meta["cost"]["seconds"]
    gradients = [meta["cost"].pop("gradients") for meta in metas]
    # An alpha of which another process finds cells costs that one a gradient.
    elsewhere = 4 * 4 if name == "alphas" else 0  # cells that go on from nothing, of four alphas
    assert gradients[0] <= gradients[1] <= gradients[0] + elsewhere
    assert metas[0] == metas[1]


@pytest.mark.parametrize("size", [2, 3])
def test_every_process_returns_the_whole_result(found, size):
    for name in ("whole", "chains", "many"):
        assert len({(found[size] / f"{name}-{rank}.jsonl").read_text() for rank in range(size)}) == 1


def test_chains_change_nothing_but_where_eigenvector_searches_start(found):
    plain, chained = (sharpscope.open(found[1] / name).layers for name in ("data", "alphas"))
    both = plain.merge(chained, on=["alpha", "layer", "measure"], suffixes=("", "_chained"))
    same = both["value"] == both["value_chained"]
    assert same[~both["measure"].str.contains("lambda")].all()
    eigenvalues = both[both["measure"].str.contains("lambda")]
    assert not same[eigenvalues.index].all()
    gap = (eigenvalues["value"] - eigenvalues["value_chained"]).abs()
    assert (gap <= 3 * (eigenvalues["stderr"] + eigenvalues["stderr_chained"]) + 1e-9).all()


def test_a_process_that_dies_ends_the_scan_and_its_cells_are_gone_on_from(tmp_path):
    assert run(WORK, 2, ("deadly",), tmp_path) == [0, 9]
    said = (tmp_path / "deadly-0.error").read_text()
    assert "rank 0 of 2 has lost the others" in said
    assert "the same command again goes on from the cells on disk" in said
    cells = (tmp_path / "deadly" / "cells.jsonl").read_text().splitlines()
    assert len(cells) == 1 + 2 * 4 + 2  # header, two alphas, two evaluations of the third
    assert run(WORK, 1, ("deadly", "undisturbed"), tmp_path) == [0]
    resumed, whole = (tmp_path / name / "cells.jsonl" for name in ("deadly", "undisturbed"))
    assert resumed.read_bytes() == whole.read_bytes()


def test_a_process_that_dies_is_missed_by_one_that_works_apart(tmp_path):
    assert run(WORK, 2, ("deadly_apart",), tmp_path) == [0, 9]
    said = (tmp_path / "deadly_apart-0.error").read_text()
    assert "rank 0 of 2 has lost the others: rank 1 has given no sign of life for 5 s" in said
    assert "the same command again goes on from the cells on disk" in said
    cells = (tmp_path / "deadly_apart" / "cells.jsonl").read_text().splitlines()
    assert len(cells) >= 1 + 4 + 4  # header, the first alphas of both chains
    assert run(WORK, 1, ("deadly_apart", "undisturbed_apart"), tmp_path) == [0]
    resumed, whole = (tmp_path / name / "cells.jsonl" for name in ("deadly_apart", "undisturbed_apart"))
    assert resumed.read_bytes() == whole.read_bytes()


def test_a_bug_in_one_process_is_told_to_one_that_waits_for_it(tmp_path):
    run(WORK, 2, ("faulty",), tmp_path)
    assert "ZeroDivisionError" in (tmp_path / "faulty-1.error").read_text()
    assert "rank 1 ended with ZeroDivisionError: a bug" in (tmp_path / "faulty-0.error").read_text()


def values_in(cells):
    return {(cell.key, row.layer, row.measure): row.value for cell in cells for row in cell.rows}


def test_an_error_in_one_chain_is_raised_everywhere_and_leaves_the_others_cells(tmp_path):
    run(WORK, 2, ("nan_in_the_last", "unlike", "cramped", "cramped_apart"), tmp_path)
    values = [values_in(map(decode, (tmp_path / f"cramped-{rank}.jsonl").read_text().splitlines())) for rank in (0, 1)]
    assert values[0] == values[1]
    alone = values_in(cramped(tmp_path).cells)
    assert values[0] == pytest.approx(alone, rel=1e-6)
    apart = sharpscope.open(tmp_path / "cramped_apart")
    assert values_in(apart.cells) == pytest.approx(values_in(cramped(tmp_path, chains=2).cells), rel=1e-6)
    assert "out of memory at alpha 1: " in " ".join(apart.meta["warnings"]), "also what rank 1 has to say"
    for rank in (0, 1):
        assert "the loss at alpha 1 on 'id' is" in (tmp_path / f"nan_in_the_last-{rank}.error").read_text()
        said = (tmp_path / f"unlike-{rank}.error").read_text()
        assert f"do not measure the same: weights differ between rank {rank} and rank {1 - rank}" in said
    assert len((tmp_path / "nan" / "cells.jsonl").read_text().splitlines()) == 1 + 2
    assert not (tmp_path / "unlike").exists()


def test_alphas_are_shared_by_default_where_there_is_a_chain_for_each_process():
    two = Ranks(1, 2)
    assert [parallel_from(None, chains, two) for chains in (1, 2, 3)] == ["data", "alphas", "alphas"]
    assert parallel_from(None, 3, ranks.ALONE) == "data"
    with pytest.raises(UsageError, match=r"2 processes .* form 1 chain\(s\)"):
        parallel_from("alphas", 1, two)
    with pytest.raises(UsageError, match="chains=6 of 4 alphas"):
        scan(None, chains=6)


def test_a_process_of_torchrun_joins_its_group_and_leaves_it(monkeypatch, tmp_path):
    with ranks.launched(None) as leads:
        assert leads
        assert not dist.is_initialized()
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "0"}
    for name, value in {**torchrun, "MASTER_ADDR": "localhost", "GLOO_SOCKET_IFNAME": "lo"}.items():
        monkeypatch.setenv(name, value)
    with ranks.launched("cpu") as leads:
        assert leads
        assert dist.get_backend() == "gloo"
        with ranks.joined() as alone:
            assert alone == ranks.ALONE
    assert not dist.is_initialized()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "99")
    monkeypatch.setenv("LOCAL_RANK", "98")
    with pytest.raises(UsageError, match=r"torchrun started 99 processes, and there are .* GPUs"):
        own_device("cuda")
    assert own_device("cpu") == torch.device("cpu")


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 23), size=st.integers(1, 9), seed=st.integers(0, 9))
def test_sums_have_the_same_bits_for_any_number_of_ranks(count, size, seed):
    generator = torch.Generator().manual_seed(seed)
    spread = 10.0 ** torch.randint(-12, 12, (count, 1), generator=generator)
    parts = [{"w": row} for row in torch.randn(count, 4, generator=generator, dtype=torch.float64) * spread]
    like = {"w": torch.zeros(4, dtype=torch.float64)}
    expected = ranks.ALONE.summed(parts, like, count)["w"]
    nodes: list = []
    for rank in range(size):
        share, mine = Ranks(rank, size).share(count), []
        for place in share:
            ranks._push(mine, ranks._Node(0, place, parts[place]))
        assert [(node.level, node.place) for node in mine] == list(ranks._blocks(share))
        for node in mine:
            ranks._push(nodes, node)
    total = {}
    for node in reversed(nodes):
        total = ranks._plus(node.tree, total)
    assert torch.equal(total.get("w", like["w"]), expected)
    exact = torch.stack([like["w"], *(part["w"] for part in parts)])
    torch.testing.assert_close(expected, exact.sum(0), rtol=0, atol=1e-14 * float(exact.abs().sum()))


@given(count=st.integers(0, 50), size=st.integers(1, 9))
def test_shares_are_even_to_one_and_cover_everything_in_order(count, size):
    shares = [Ranks(rank, size).share(count) for rank in range(size)]
    assert [number for share in shares for number in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
