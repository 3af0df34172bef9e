"""A torch module as a pure function of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from operator import is_not
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from sharpscope.errors import ModelError
from sharpscope.tree import Tree

_LIBRARIES, _CLIP_VERBS = ("transformers", "open_clip", "clip"), ("get_text_features", "encode_text")
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Network:
    """A module in evaluation mode: its forward as a function, its parameters and copies of its buffers, detached."""

    module: nn.Module
    parameters: Tree
    buffers: Tree

    def forward(self, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """Return the logits ``(n, classes)`` at the weights; ``weights`` must hold parameters and buffers."""
        tied = {name: weights[first] for name, first in self.ties.items() if first in weights}
        with _attributes_kept(self._own):
            # Left to itself torch puts tensors in by every name of a submodule, and gives back what it found last.
            return logits(functional_call(self.module, {**weights, **tied}, (inputs,), tie_weights=False))

    @cached_property
    def _own(self) -> list[dict[str, Any]]:
        """The attributes of every submodule."""
        return [vars(sub) for sub in self.module.modules()]

    @cached_property
    def ties(self) -> dict[str, str]:
        """Further places of a tensor, each by the one name that its submodule goes by here -> its first name."""
        first: dict[int, str] = {}
        found = {}
        for prefix, sub in self.module.named_modules():  # each once
            own = (*sub.named_parameters(prefix, False, False), *sub.named_buffers(prefix, False, False))
            for name, tensor in own:
                if first.setdefault(id(tensor), name) != name:
                    found[name] = first[id(tensor)]
        return found


MODULE_PARTS = frozenset(vars(nn.Module()))  # of a module, which torch itself puts weights in and out of


@contextmanager
def _attributes_kept(submodules: Iterable[dict[str, Any]]) -> Iterator[None]:
    """Put back attributes where plain tensors are written among them: what pruning computes from weights, a cache.

    All of a submodule's or none: a number that says what a cached tensor holds goes with it. Lists and dicts among
    them likewise.
    """
    before = [(own, own.copy()) for own in submodules]
    held = [
        (value, value.copy())
        for own, _ in before
        for name, value in own.items()
        if type(value) in (dict, list) and name not in MODULE_PARTS
    ]
    try:
        yield
    finally:
        for own, known in before:
            same = len(own) == len(known) and not any(map(is_not, own.values(), known.values()))  # quick, for most
            if not same and any(_of_tensors(value) and value is not known.get(n) for n, value in own.items()):
                own.clear()
                own.update(known)
        for value, known in held:
            new, old = (list(some.values()) if isinstance(some, dict) else some for some in (value, known))
            if any(_of_tensors(member) and all(member is not other for other in old) for member in new):
                value.clear()
                value.update(known) if isinstance(value, dict) else value.extend(known)


def _of_tensors(value: object) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, tuple) and any(isinstance(part, Tensor) for part in value))


def logits(outputs: Any) -> Tensor:
    """Return the tensor of a model's output: itself, its ``.logits``, or its first member, the only matrix."""
    found = getattr(outputs, "logits", outputs)
    if isinstance(found, tuple | list) and found:
        shapes = [tuple(member.shape) for member in found if _is_matrix(member)]
        if len(set(shapes)) > 1:  # of equal ones the first is what is meant, beside heads for a teacher
            raise ModelError(
                f"the model returned a {type(found).__name__} with {len(shapes)} matrices, of shapes "
                f"{', '.join(map(str, shapes))}: which of them are the logits is not known",
                "a wrapper around it whose forward returns the logits alone; return_dict=True of transformers",
            )
        found = found[0]
    if not _is_matrix(found):
        shape = f" of shape {tuple(found.shape)}, {found.dtype}" if isinstance(found, Tensor) else ""
        raise ModelError(
            f"the model returned {type(found).__name__}{shape}",
            "a forward that returns logits of shape (n, classes), floating-point numbers",
        )
    return found


def _is_matrix(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point()


def network(module: nn.Module, role: str) -> Network:
    """Return the module as a function of its weights; the module is not changed.

    Parameters
    ----------
    module
        Any module in evaluation mode.
    role
        Whose module it is, for messages: ``"the zero-shot model"``.

    Raises
    ------
    ModelError
        If it is no module, is wrapped, is in training mode, has no weights or half-precision ones, or ones without
        numbers, or embeddings that overwrite theirs; the message names the culprit.
    """
    if not isinstance(module, nn.Module):
        raise ModelError(f"{role} is a {type(module).__name__}", "a torch.nn.Module, or what sharpscope.load returns")
    _check_bare(module, role)
    _check_filled(module, role)
    _check_embeddings(module, role)
    if type(module).__module__.partition(".")[0] in _LIBRARIES and any(hasattr(module, verb) for verb in _CLIP_VERBS):
        raise ModelError(
            f"{role} is a {type(module).__name__} of {type(module).__module__.partition('.')[0]}: of images alone it "
            "gives features, not logits of classes",
            "save it and pass what sharpscope.load(DIR) returns, whose head is made of class names; or a module whose "
            "forward gives logits",
        )
    training = [name or "the module itself" for name, sub in module.named_modules() if sub.training]
    if training:
        raise ModelError(
            f"{role} is in training mode ({training[0]}; {len(training)} submodules): dropout and batch statistics "
            "would make its loss random",
            "call .eval() on it",
        )
    batch_norms = [n for n, sub in module.named_modules() if isinstance(sub, _BatchNorm) and sub.running_mean is None]
    if batch_norms:
        raise ModelError(
            f"{role} has a batch norm without running statistics ({batch_norms[0]!r}): its loss depends on how the "
            "examples are batched",
            "track_running_stats=True, or a norm that sees one example at a time",
        )
    if made := next((n for n, t in module.state_dict(keep_vars=True).items() if _is_inference(t)), None):
        raise ModelError(
            f"{role} was made in torch.inference_mode() ({made!r}): it has no gradient",
            "make it outside, or copy.deepcopy(model) there",
        )
    floating = {n: p.detach() for n, p in module.named_parameters() if p.is_floating_point()}
    if not floating:
        raise ModelError(f"{role} ({type(module).__name__}) has no floating-point parameters", "a model with weights")
    if half := next((n for n, p in floating.items() if p.dtype in _HALF), None):
        raise ModelError(
            f"{role} has {floating[half].dtype} weights ({half!r}); curvature in half precision is noise",
            "model.float(), or load it with sharpscope.load",
        )
    # Copies: a forward may count in a buffer.
    return Network(module, floating, {n: b.detach().clone() for n, b in module.named_buffers()})


def _check_filled(module: nn.Module, role: str) -> None:
    """Raise for tensors that hold no numbers."""
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if is_lazy(tensor):
            raise ModelError(
                f"{role} has {name!r} of no shape yet: a lazy module takes it from the first inputs",
                "run it once on a batch, then make the copy that is fine-tuned",
            )
        if tensor.is_meta:
            raise ModelError(f"{role} has {name!r} on the meta device: it holds no numbers", "load its weights first")


def _check_embeddings(module: nn.Module, role: str) -> None:
    """Raise for embeddings that overwrite their weights in the forward, or have sparse gradients."""
    for name, sub in module.named_modules():
        if not isinstance(sub, nn.Embedding | nn.EmbeddingBag):
            continue
        if sub.max_norm is not None:
            raise ModelError(
                f"{role} has an embedding with max_norm ({name!r}), which overwrites its weights in every forward",
                "renormalise the weights once, then set .max_norm = None on it",
            )
        if sub.sparse:
            raise ModelError(
                f"{role} has an embedding with sparse gradients ({name!r}), which cannot be differentiated again",
                "set .sparse = False on it: no number changes",
            )


def _is_inference(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_inference()


def _check_bare(module: nn.Module, role: str) -> None:
    """Raise for a wrapper whose forward cannot be called with other weights, or not be differentiated twice."""
    ways = {
        "DataParallel": "the module inside: model.module",
        "OptimizedModule": "the module before torch.compile: model._orig_mod",
    }
    kind = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(f"{role} is scripted ({kind})", "the module before torch.jit.script or torch.jit.trace")
    if kind in ways:
        raise ModelError(f"{role} is a {kind}: no function of given weights that is differentiable twice", ways[kind])
    spread = {
        # Its forward sends buffers: ranks with unequal numbers of batches would wait for each other for ever.
        "DistributedDataParallel": "the module inside: model.module",
        "FullyShardedDataParallel": "the plain module and parallel='weights', or fully_shard (FSDP2) in its place",
    }
    for name, sub in module.named_modules():
        if (kind := type(sub).__name__) in spread:
            place = f"holds a {kind} ({name!r})" if name else f"is a {kind}"
            raise ModelError(f"{role} {place}: its forward waits for other processes", spread[kind])
