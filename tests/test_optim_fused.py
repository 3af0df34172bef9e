"""The kernels of the projection against the foreach calls, on a GPU; elsewhere they are not taken."""

import pytest
import torch
from torch import nn

from sharpscope.optim import AdamSPD, projection
from sharpscope.optim.fused import Fused

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton kernels run on a GPU")
SHAPES = [(768, 3072), (768,), (1,), (5, 7, 3), (16384,), (16385,)]


def tensors(dtype, device, seed):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random).to(device, dtype) for shape in SHAPES]


def test_tensors_on_a_cpu_are_left_to_foreach():
    assert not Fused.usable(tensors(torch.float32, "cpu", 0), None)


@on_gpu
@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_those_of_float64(dtype, anchored):
    weights, gradients = tensors(dtype, "cuda", 0), tensors(dtype, "cuda", 1)
    anchors = tensors(dtype, "cuda", 2) if anchored else None
    moved = [w.double() - (0 if anchors is None else anchors[i].double()) for i, w in enumerate(weights)]
    pairs = list(zip(moved, [g.double() for g in gradients], strict=True))
    exact = [[float((d * d).sum()) for d in moved], [float((d * g).sum()) for d, g in pairs]]
    found = Fused(weights, anchors).sums(weights, gradients).cpu()
    scale = torch.tensor([float(d.norm() * g.norm()) for d, g in pairs])
    torch.testing.assert_close(found[0], torch.tensor(exact[0], dtype=torch.float64), rtol=1e-6, atol=0)
    assert ((found[1] - torch.tensor(exact[1])).abs() < 1e-6 * scale).all()


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pull_is_that_of_foreach_and_a_share_of_zero_changes_no_bit(dtype):
    weights, anchors = tensors(dtype, "cuda", 0), tensors(dtype, "cuda", 2)
    before = [w.clone() for w in weights]
    shares = torch.tensor([0.3, 0.0, 1.0, 0.5, 0.0, 0.9], device="cuda", dtype=torch.float64)
    plain = [w.clone() for w in weights]
    projection.pull(plain, projection.deviations(plain, anchors), shares.float().unbind())
    Fused(weights, anchors).pull(weights, shares)
    for index, share in enumerate(shares.tolist()):
        if share == 0:
            assert torch.equal(weights[index], before[index])
        torch.testing.assert_close(
            weights[index], plain[index], rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6
        )


@on_gpu
@pytest.mark.parametrize("granularity", ["tensor", "layer"])
@pytest.mark.parametrize("gate", ["gradient", "update"])
@pytest.mark.parametrize("maximize", [False, True])
def test_twenty_steps_end_where_those_of_foreach_end(monkeypatch, granularity, gate, maximize):
    ends = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(Fused, "usable", staticmethod(lambda *_: False))
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 80), nn.Tanh(), nn.Linear(80, 10)).cuda()
        optimizer = AdamSPD(
            model.named_parameters(), anchor="init", lr=3e-2, granularity=granularity, gate=gate, maximize=maximize
        )
        optimizer.record()
        for _ in range(20):
            optimizer.zero_grad()  # noisy gradients: on a smooth way out nothing is ever gated
            x, y = torch.randn(8, 40, device="cuda"), torch.randint(0, 10, (8,), device="cuda")
            loss = nn.functional.cross_entropy(model(x), y)
            (-loss if maximize else loss).backward()
            optimizer.step()
        active = sum(found.active for found in optimizer.activity())
        ends.append((torch.cat([p.detach().flatten() for p in model.parameters()]), active))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-3, atol=1e-4)
    if gate == "gradient":
        assert ends[0][1] > 0
