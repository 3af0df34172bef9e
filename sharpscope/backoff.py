"""What is done where memory runs out: less is kept, then nothing, then batches are computed in ever smaller pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from sharpscope.curvature.workspace import NONE, Kept
from sharpscope.errors import MeasurementError
from sharpscope.job import Job
from sharpscope.table import Cell


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error says that memory ran out, on a GPU or not."""
    told = isinstance(error, RuntimeError) and "allocate memory" in str(error)
    return told or isinstance(error, torch.OutOfMemoryError | MemoryError)


def that_fit(job: Job, cells: Callable[[], Iterator[Cell]], where: str, say: Callable[[str], None]) -> Iterator[Cell]:
    """Yield the cells; where memory runs out, those that are missing are begun again with less.

    ``cells`` gives what is not in the journal yet, by the job's objective; ``say`` is told what was done, see
    :func:`back_off`. Where ranks measure together and one of them runs out of memory, all begin again.
    """
    while True:
        try:
            yield from cells()
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            job.team.give_up(error)
            kept = job.workspace.kept  # while the error holds them
        # Outside the block: the error holds the frames, and so the graphs, that are to be freed.
        say(back_off(job, where, kept))


def back_off(job: Job, where: str, kept: Kept = NONE) -> str:
    """Make the job take less memory; return what was done, which is also among its warnings.

    First half of the graphs that were kept are, then half of these, at last none; then every batch is computed in
    2, 4, ... pieces. Probes go with batches as before, so the numbers stay as they were, up to the rounding of sums
    that are taken in another order.

    Raises
    ------
    MeasurementError
        If batches are single examples already, or the loss couples the examples of a batch.
    """
    pieces, coupled = job.objective.pieces, job.objective.coupled
    if job.graph_bytes != 0 and kept.graphs > 1:
        half = kept.graphs // 2
        job.graph_bytes, done = kept.nbytes * half // kept.graphs, f"{half} of {kept.graphs} gradient graphs are kept"
    elif job.graph_bytes != 0:
        job.graph_bytes, done = 0, "gradient graphs are made anew for each product"
    elif coupled or pieces >= max(len(batch.targets) for batch in job.objective.batches):
        least = "a batch, which a contrastive loss needs whole" if coupled else "one example at a time"
        raise MeasurementError(
            f"{job.device} ran out of memory at {where} with {least}",
            "a device with more memory, or less on it beside this",
        )
    else:
        job.objective = replace(job.objective, pieces=2 * pieces)
        done = f"batches are computed in {2 * pieces} pieces"
    job.workspace.clear()
    if job.device.type == "cuda":
        torch.cuda.empty_cache()
    job.warnings.append(f"out of memory at {where}: from there on {done}; numbers change by rounding only")
    return job.warnings[-1]
