"""Work recorded as CUDA graphs: thousands of kernels launched at once instead of one by one."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from sharpscope.tree import Tree, flat, unflat

Product = Callable[[Tree], Tree]
Result = TypeVar("Result")
SLOW = 0.8  # share of the time until a work is done that the host needs to start its kernels, from which recording pays


class Recorder:
    """Records work on a GPU; on any other device it is off.

    Parameters
    ----------
    device
        That the work runs on.
    """

    def __init__(self, device: torch.device) -> None:
        self.on = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self.on else None  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle() if self.on else None
        self._slow: dict[object, bool] = {}  # is the host, by kind of work

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Work in here runs on a stream of its own, as recording needs, in its turn with what is around it."""
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

    def first(self, kind: object, work: Callable[[], Result]) -> Result | None:
        """Return the result of the first work of its kind, timed for :meth:`pays`; of later ones nothing."""
        if not self.on or kind in self._slow:
            return None
        _wait()
        begun = time.perf_counter()
        result = work()
        started = time.perf_counter()
        _wait()
        self._slow[kind] = started - begun > SLOW * (time.perf_counter() - begun)
        return result

    def pays(self, kind: object) -> bool:
        """Return whether the device waits for the host in work of this kind, so that a recording is quicker."""
        return self.on and self._slow[kind]

    def record(self, work: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """Return a function that does the work again, and the work's result, which is not there before that.

        To be called within :meth:`stream`. The memory that the work takes belongs to the recording; what it leaves
        behind may be overwritten by another recording's replay, except its result.

        Raises
        ------
        RuntimeError
            If the work cannot be recorded, as it waits for the device.
        """
        graph = torch.cuda.CUDAGraph()
        with _nothing_compiled():
            # Only this thread's calls count: others, as those that watch over a process group, go on meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = work()
            except BaseException:
                self._pool = torch.cuda.graph_pool_handle()  # nothing more goes where a recording was broken off
                raise
            finally:
                graph.capture_end()
        return graph.replay, result


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _nothing_compiled() -> AbstractContextManager[Any]:
    """Let functions that have not been compiled for their arguments run as they are: no compiler can be recorded."""
    set_stance = getattr(torch.compiler, "set_stance", None)  # torch 2.6
    return set_stance("eager_on_recompile") if set_stance else nullcontext()


@dataclass(frozen=True)
class _Recorded:
    """A recorded product; what goes in and comes out lies in one row each, so that it is copied in one go."""

    replay: Callable[[], None]
    given: Tensor
    found: Tensor
    like: Tree  # of what is found

    def __call__(self, v: Tree) -> Tree:
        self.given.copy_(flat(v))
        self.replay()
        return unflat(self.found.clone(), self.like)  # the next replay writes there


@dataclass
class Products:
    """Products with a graph; with a recorder recorded where that pays.

    Parameters
    ----------
    recorder
        None: nothing is recorded.
    examples
        That the graph is of: products with graphs of as many take as long.
    """

    recorder: Recorder | None = None
    examples: int = 0
    _known: dict[tuple[str, ...], _Recorded] = field(default_factory=dict)

    def __call__(self, names: tuple[str, ...], v: Tree, product: Product) -> Tree:
        """Return ``product(v)``, the same function for the same names."""
        if self.recorder is None:
            return product(v)
        with self.recorder.stream():
            return self._quickest(names, v, product, self.recorder)

    def unrecorded(self, v: Tree, product: Product) -> Tree:
        """Return ``product(v)`` as it is: for few calls with vectors too large to be held."""
        if self.recorder is None:
            return product(v)
        with self.recorder.stream(), _nothing_compiled():
            return product(v)

    def _quickest(self, names: tuple[str, ...], v: Tree, product: Product, recorder: Recorder) -> Tree:
        if names in self._known or not recorder.on:
            return self._known.get(names, product)(v)
        kind = self.examples, names
        with _nothing_compiled():  # so that an unrecorded product runs what a recorded one does
            if (found := recorder.first(kind, lambda: product(v))) is not None:
                return found
            if recorder.pays(kind):
                self._record(names, v, product, recorder)
            return self._known.get(names, product)(v)

    def _record(self, names: tuple[str, ...], v: Tree, product: Product, recorder: Recorder) -> None:
        given = flat(v)

        def work() -> tuple[Tensor, Tree]:
            found = product(unflat(given, v))
            return flat(found) if found else given[:0], {n: t.to("meta") for n, t in found.items()}

        try:
            replay, (found, like) = recorder.record(work)
            self._known[names] = _Recorded(replay, given, found, like)
        except RuntimeError as refusal:  # also for want of memory
            recorder.on = False
            warnings.warn(f"Hessian products run unrecorded: {shortened(refusal)}", stacklevel=2)


def shortened(error: BaseException) -> str:
    """Return the beginning of what an error says, in one line."""
    return " ".join(str(error).split())[:300]
