"""The sample stream and the loader: which sample stands where is a function of the seed, not of who loads it."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fmsuite.core.data.pipeline import WindowDataset, collate
from fmsuite.core.data.sample import Batch, SampleKey, SkippedWindow
from fmsuite.core.data.supports import Supports
from fmsuite.core.seeding import derive, permuted
from fmsuite.errors import FmsuiteError, UsageError

Loaded = TypeVar("Loaded")
Asked = TypeVar("Asked", contravariant=True)

MAX_WORKERS = 16
_DEATH_NOTICE_S = 5.0
WORKERS_ADVICE = "Use fewer with --workers N; with --workers 0, an error in the reader shows where it happens."


class SampleStream:
    """An endless stream of samples: epoch after epoch, each in an order of its own.

    Sample ``k = step * batch_size + slot`` is element ``k % length`` of the permutation of epoch ``k // length``, so
    every window is seen once an epoch, batches run across the ends of epochs, and any step can be the first. A rank
    gets a contiguous range of slots. Nothing is stored, and nothing depends on workers or ranks.

    Args:
        length: windows in the index.
        batch_size: samples in a step, over all ranks.
        seed: the run's.
        rank, world_size: this process among those that share the batch.

    Raises:
        UsageError: if there are no windows, or the batch does not divide among the ranks.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if length < 1:
            raise UsageError("The index has no windows.", "Make one with `fmsuite tile`, or loosen its filters.")
        if batch_size % world_size:
            below, above = batch_size // world_size * world_size, (batch_size // world_size + 1) * world_size
            options = f"{below} or {above}" if below else str(above)
            raise UsageError(
                f"A batch of {batch_size} does not divide among {world_size} processes.",
                f"Set training.batch_size to a multiple of {world_size}, such as {options}.",
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        share = batch_size // world_size
        self.slots = range(rank * share, (rank + 1) * share)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch, at least 1."""
        return max(1, self.length // self.batch_size)

    def keys(self, step: int) -> list[SampleKey]:
        """This rank's share of a step's batch, in order."""
        keys = []
        for slot in self.slots:
            epoch, position = divmod(step * self.batch_size + slot, self.length)
            row = permuted(position, self.length, derive(self.seed, epoch))
            keys.append(SampleKey(epoch, row, step, slot, self.batch_size))
        return keys


def make_loader(
    dataset: WindowDataset,
    stream: SampleStream,
    start_step: int,
    total_steps: int,
    workers: int,
    supports: Supports | None = None,
) -> Iterable[Batch]:
    """This rank's batches of the steps from ``start_step`` up to ``total_steps``, in order.

    Args:
        dataset: the samples.
        stream: which of them form a batch.
        start_step: the first step to load.
        total_steps: the step to stop before.
        workers: processes that read ahead; 0 reads in this one.
        supports: labelled windows for every step; ``None`` for none.

    Raises:
        FmsuiteError: while iterating, as ``WindowDataset`` does, or if a worker dies.
    """
    return _loader(
        partial(_collated, dataset, supports),
        _StepSampler(stream, start_step, total_steps),
        workers,
        derive(stream.seed, "loader"),
        "Use fewer with --set training.workers=N; with training.workers=0, an error in the reader shows where it "
        "happens.",
    )


class Windows(Protocol[Asked]):
    """What ``WholeWindows`` makes of a list of rows, made of whatever names the windows of a batch."""

    def __getitem__(self, asked: Asked, /) -> tuple[Batch | None, list[SkippedWindow]]: ...


def load_windows(
    windows: Windows[Asked], batches: Iterable[Asked], workers: int
) -> Generator[tuple[Batch | None, list[SkippedWindow]], None, None]:
    """The windows of one list of rows after another, read ahead in worker processes.

    Args:
        windows: reads them; a ``WholeWindows``, say.
        batches: what to read for each batch: rows of the index. Asked for as workers become free.
        workers: processes that read ahead; 0 reads in this one.

    Returns:
        For each list, in order, what ``WholeWindows`` makes of it. Closing the generator ends its workers.

    Raises:
        FmsuiteError: while iterating, if a worker dies.
    """
    return iter(_loader(windows.__getitem__, batches, workers, 0, WORKERS_ADVICE))


def _loader(
    read: Callable[[Any], Loaded], units: Iterable[Any], workers: int, seed: int, advice: str
) -> _Batches[Loaded]:
    generator = torch.Generator()
    # Without a generator of its own, the loader would draw from torch's global one.
    generator.manual_seed(seed)
    return _Batches(
        DataLoader(
            _BatchDataset(read),
            batch_size=None,
            sampler=units,
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_start_worker,
            generator=generator,
        ),
        advice,
    )


def default_workers() -> int:
    """Worker processes for one rank on this machine.

    With a GPU, this rank's share of the cores less one for the process that trains, at most ``MAX_WORKERS``. Without
    one the training itself needs the cores: a quarter of them read, none below four cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    wanted = share - 1 if torch.cuda.is_available() else share // 4
    return max(0, min(MAX_WORKERS, wanted))


class _StepSampler(Sampler[list[SampleKey]]):
    """The keys of one step after another. A step is one unit of work, so workers return batches in step order."""

    def __init__(self, stream: SampleStream, start: int, stop: int) -> None:
        self.stream = stream
        self.steps = range(start, stop)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        return map(self.stream.keys, self.steps)


class _Failed:
    """An error on its way from a worker; torch would turn it into a traceback with another message."""

    def __init__(self, message: str, hint: str) -> None:
        self.message = message
        self.hint = hint


def _collated(samples: WindowDataset, supports: Supports | None, keys: list[SampleKey]) -> Batch:
    batch = collate([samples[key] for key in keys])
    if supports is None:
        return batch
    support = supports.batch(keys[0].step)
    return replace(batch, skipped=batch.skipped + support.skipped, support=replace(support, skipped=[]))


class _BatchDataset(Dataset):
    """Makes one batch of one unit of work; an error that users can act on becomes a value."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        self.read = read

    def __getitem__(self, unit: Any) -> Any:
        try:
            return self.read(unit)
        except FmsuiteError as error:
            return _Failed(error.message, error.hint)


class _Batches(Generic[Loaded]):
    def __init__(self, loader: DataLoader, advice: str) -> None:
        self.loader = loader
        self.advice = advice

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Generator[Loaded, None, None]:
        with explained_deaths(self.advice):
            try:
                for batch in self.loader:
                    if isinstance(batch, _Failed):
                        raise FmsuiteError(batch.message, batch.hint)
                    yield batch
            except (EOFError, ConnectionError, FileNotFoundError):
                # What a worker that dies while it hands over a batch leaves behind. torch's own error about its death
                # is on the way: left alone, it would come up in whatever code runs then.
                if self.loader.num_workers:
                    time.sleep(_DEATH_NOTICE_S)
                raise


@contextmanager
def explained_deaths(advice: str) -> Iterator[None]:
    """Says what to do when a worker dies. torch notices in a signal handler, so the error may come up anywhere in the
    code that uses the batches, not only where it waits for one.

    Raises:
        FmsuiteError: in place of torch's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise FmsuiteError(
            f"A data worker died ({str(error).splitlines()[0]}), most often because memory ran out.", advice
        ) from error


def _as_it_is(value: Any) -> Any:
    return value


def _start_worker(worker: int) -> None:
    """One thread a worker, and Ctrl-C is the main process's business."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A collection writes to every object it looks at, and would copy the memory that is shared with the main process.
    gc.freeze()
