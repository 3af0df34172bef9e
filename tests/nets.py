"""Small networks and data for tests, and dense Hessians made without sharpscope."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sharpscope.losses import cross_entropy
from sharpscope.objective import Batch, Objective
from sharpscope.tree import Tree


class Attention(nn.Module):
    """A token mixer on torch's fused attention, a LayerNorm and a residual MLP: all the traps in one."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.mlp(x)


class Vit(nn.Module):
    """Patches of an image (n, 1, 4, 4), two attention blocks, mean pooling, three classes."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 6, 2, stride=2)
        self.blocks = nn.ModuleList(Attention() for _ in range(blocks))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


NETS = {"mlp": mlp, "conv": conv, "vit": Vit}


def made(kind: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a network in evaluation mode with norms that are not the identity."""
    torch.manual_seed(seed)
    net = NETS[kind]().to(dtype).eval()
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if tensor.is_floating_point() and "running_var" not in name:
                tensor.add_(0.1 * torch.randn_like(tensor))
    return net


def fine_tuned(net: nn.Module, kind: str, seed: int = 1, step: float = 0.1) -> nn.Module:
    """Return a copy moved by random steps."""
    torch.manual_seed(seed)
    dtype = next(net.parameters()).dtype
    other = NETS[kind]().to(dtype).eval()
    moved = {k: v + step * torch.randn_like(v) if v.is_floating_point() else v for k, v in net.state_dict().items()}
    moved = {k: v.abs() if "running_var" in k else v for k, v in moved.items()}
    other.load_state_dict(moved)
    return other


def images(count: int = 12, seed: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(count, 1, 4, 4, dtype=torch.float64).to(dtype), torch.arange(count) % 3


def batches(x: Tensor, y: Tensor, sizes: tuple[int, ...]) -> tuple[Batch, ...]:
    return tuple(Batch(a, b) for a, b in zip(x.split(sizes), y.split(sizes), strict=True))


def objective(net: nn.Module, sizes: tuple[int, ...] = (7, 3, 2)) -> tuple[Objective, Tree, list[str]]:
    """Return an objective over unequal batches, all its tensors, and the names of the parameters."""
    x, y = images(sum(sizes), dtype=next(net.parameters()).dtype)

    def forward(weights: Tree, inputs: Tensor) -> Tensor:
        return functional_call(net, weights, (inputs,))

    weights = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    weights = {name: tensor.detach() for name, tensor in weights.items()}
    return Objective(forward, cross_entropy, batches(x, y, sizes)), weights, [n for n, _ in net.named_parameters()]


def dense_hessian(net: nn.Module, count: int = 12) -> tuple[Tensor, dict[str, slice]]:
    """Return the Hessian of the mean cross-entropy over all examples at once, and where each tensor lies in it.

    torch.autograd.functional (reverse over reverse) on one flat vector; none of sharpscope's code.
    """
    x, y = images(count, dtype=next(net.parameters()).dtype)
    sizes = {name: p.numel() for name, p in net.named_parameters()}
    starts = torch.cumsum(torch.tensor([0, *sizes.values()]), 0).tolist()
    places = {name: slice(a, b) for name, a, b in zip(sizes, starts, starts[1:], strict=False)}
    shapes = {name: p.shape for name, p in net.named_parameters()}

    def loss(flat: Tensor) -> Tensor:
        weights = {name: flat[place].view(shapes[name]) for name, place in places.items()}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return nn.functional.cross_entropy(functional_call(net, weights, (x,)), y)

    flat = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    return torch.autograd.functional.hessian(loss, flat), places


def block(hessian: Tensor, places: dict[str, slice], names: tuple[str, ...]) -> Tensor:
    """Return the rows and columns of the named tensors."""
    index = torch.cat([torch.arange(places[n].start, places[n].stop) for n in names])
    return hessian[index][:, index]


def flat(tree: Tree, names: list[str] | tuple[str, ...]) -> Tensor:
    return torch.cat([tree[name].reshape(-1) for name in names])
