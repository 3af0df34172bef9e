"""Products recorded as CUDA graphs: thousands of kernels launched at once instead of one by one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from sharpscope.tree import Tree

Product = Callable[[Tree], Tree]


class Recorder:
    """Records functions of a tree on a GPU; on any other device it does nothing.

    A product with the kept graph of a batch runs the same kernels on the same memory each time, and launching them one
    by one can take longer than running them. Work on the GPU is done on a stream of its own, as recording needs.

    Parameters
    ----------
    device
        Of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.on = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self.on else None  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle() if self.on else None

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Work in here runs on the recorder's stream, after what is before it and before what comes after."""
        if self._stream is None:
            yield
            return
        around = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(around)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            around.wait_stream(self._stream)

    def record(self, product: Product, v: Tree) -> Product:
        """Return the product recorded, for trees like v; itself where it cannot be. Call within :meth:`stream`."""
        graph = torch.cuda.CUDAGraph()
        inputs = {name: tensor.clone() for name, tensor in v.items()}
        try:
            # Only this thread's calls count: others, as those that watch over a process group, go on meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                outputs = product(inputs)
            finally:
                graph.capture_end()
        except RuntimeError as refusal:  # an operation that waits for the device, or memory that is not there
            self.on = False
            warnings.warn(f"Hessian products run unrecorded: {str(refusal).splitlines()[0]}", stacklevel=2)
            return product
        return _Recording(graph, inputs, outputs)


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: Tree
    outputs: Tree

    def __call__(self, v: Tree) -> Tree:
        for name, tensor in self.inputs.items():
            tensor.copy_(v[name])
        self.graph.replay()
        return {name: tensor.clone() for name, tensor in self.outputs.items()}  # the next replay writes there


@dataclass
class Products:
    """Products by the tensors they are for: the first of each runs as it is, the second is recorded."""

    recorder: Recorder
    _known: dict[tuple[str, ...], Product | None] = field(default_factory=dict)

    def __call__(self, names: tuple[str, ...], v: Tree, product: Product) -> Tree:
        """Return ``product(v)``."""
        with self.recorder.stream():
            if not self.recorder.on:
                return product(v)
            if (
                names not in self._known
            ):  # kernels are compiled and libraries set up in the first, which none may record
                self._known[names] = None
                return product(v)
            recorded = self._known[names] or self.recorder.record(product, v)
            self._known[names] = recorded
            return recorded(v)
