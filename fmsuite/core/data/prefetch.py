"""Batches on their way to a GPU, beside its work."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from functools import partial

import torch
from torch import Tensor

from fmsuite.core.data.sample import Batch


def on_device(batches: Iterable[Batch], device: torch.device) -> Generator[Batch, None, None]:
    """The batches on a GPU, each copied by a stream of its own while the GPU still works on what it was given before;
    on a CPU the batches as they are. Closing it closes the batches.

    The host runs ahead of a GPU by a step, so when it asks for the next batch the step before is still being computed:
    nothing needs to be fetched before it is asked for, and the time that asking takes is the time the loader takes.
    Copies overlap only from pinned memory (``Batch.pin_memory``, which the loader calls).
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    iterator = iter(batches)
    try:
        for batch in iterator:
            if stream is None:
                yield batch
                continue
            with torch.cuda.stream(stream):
                moved = batch.to(device)
            computing = torch.cuda.current_stream(device)
            computing.wait_stream(stream)
            moved.map(partial(_kept, computing))
            yield moved
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()


def _kept(stream: torch.cuda.Stream, tensor: Tensor) -> Tensor:
    """Its memory is not given to another tensor of the copying stream before ``stream`` is done with it."""
    if tensor.is_cuda:
        tensor.record_stream(stream)
    return tensor
