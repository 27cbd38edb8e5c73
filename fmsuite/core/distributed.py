"""The few collective operations that objectives and the loop need; each is the identity in a single process."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fmsuite.errors import FmsuiteError

Value = TypeVar("Value")

PATIENCE = timedelta(days=7)
"""How long ranks wait in ``barrier`` and for each other's objects: while rank 0 builds an index of many slides, NCCL's
own limit of ten minutes would end the run. A rank that dies closes its connection, which ends the wait at once."""

MEETING_S = 1800.0
"""Seconds that the processes of a run have to start."""

_patient: dist.ProcessGroup | None = None

_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "connection was likely closed",
    "broken pipe",
    "socket closed",
    "socket error",
    "failed to recv",
    "failed to send",
    "remote process exited",
    "connectfullmesh failed",
)
"""How gloo, NCCL and the store say that the process at the other end is gone."""


def active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if active() else 0


def world_size() -> int:
    return dist.get_world_size() if active() else 1


def is_main() -> bool:
    return rank() == 0


@contextmanager
def process_group(device: torch.device, alone: bool = False) -> Iterator[None]:
    """Joins the group that torchrun describes in the environment; does nothing outside torchrun.

    Tensors travel over gloo on CPUs and NCCL on GPUs; objects and barriers over a gloo group that waits long.

    Args:
        alone: outside torchrun make a group of this one process, for what needs a group to work at all.

    Raises:
        FmsuiteError: if another process of the group ended while this one needed it.
    """
    global _patient
    if active() or not (alone or launched()):
        yield
        return
    with peers_named():
        store, number, ranks = _meet() if launched() else (dist.HashStore(), 0, 1)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", device_id=device, store=store, rank=number, world_size=ranks)
        else:
            dist.init_process_group("gloo", store=store, rank=number, world_size=ranks)
        _patient = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))
        try:
            yield
        finally:
            _patient = None
            dist.destroy_process_group()


def _meet() -> tuple[dist.Store, int, int]:
    """Where this start's processes leave each other their addresses; this process's rank; how many there are."""
    store, number, ranks = next(iter(dist.rendezvous("env://")))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # It outlives a restart, and so do the addresses of processes that are dead.
        store = dist.PrefixStore(_agree(store, number, ranks), store)
    return store, number, ranks


def _agree(store: dist.Store, number: int, ranks: int) -> str:
    """A name for this start that all ranks know to be of this start, whatever earlier ones have left in the store: rank
    0 offers one, each rank accepts with a name of its own, and rank 0 confirms by those names.

    Raises:
        FmsuiteError: if not all processes come.
    """
    mine, deadline = uuid.uuid4().hex, time.monotonic() + MEETING_S

    def wait() -> None:
        if time.monotonic() > deadline:
            raise FmsuiteError(f"The {ranks} processes of the run did not meet within {MEETING_S / 60:.0f} minutes.")
        time.sleep(0.05)

    def read(key: str) -> list[str]:
        return store.get(key).decode().split() if store.check([key]) else []

    if number == 0:
        store.set("fmsuite/offer", mine)
        names = []
        for other in range(1, ranks):
            while (answer := read(f"fmsuite/accept/{other}"))[:1] != [mine]:
                wait()
            names.append(answer[1])
        store.set(f"fmsuite/confirm/{mine}", " ".join(names))
        return mine
    while True:
        for offer in read("fmsuite/offer"):
            store.set(f"fmsuite/accept/{number}", f"{offer} {mine}")
            if mine in read(f"fmsuite/confirm/{offer}"):
                return offer
        wait()


@contextmanager
def peers_named() -> Iterator[None]:
    """Puts what a collective operation says of a peer that is gone into one sentence.

    Raises:
        FmsuiteError: in place of such an error.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        raise FmsuiteError(
            "Another process of this run has ended, so this one cannot go on.",
            "What that process printed last says why; --resume continues from the last checkpoint.",
        ) from error


def is_lost_peer(error: BaseException) -> bool:
    """Whether a failure is that of a connection to another process (PyTorch has a type of its own for some only)."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _LOST)


def extra_group() -> dist.ProcessGroup | None:
    """Another gloo group of all ranks, for a thread of its own: operations of one group must not cross. ``None`` in a
    single process. Every rank has to ask at the same point."""
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE)) if active() else None


def launched() -> bool:
    """Whether torchrun (or a compatible launcher) started this process."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def restart_count() -> int:
    """How often torchrun has started this run's processes anew; 0 the first time, and outside torchrun."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launch_id() -> str | None:
    """What all starts and restarts under one launcher have in common, and those under another have not; ``None``
    outside torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name == "none":  # torchrun without a rendezvous: its agent's address has to do.
        return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return name


def local_rank() -> int:
    """This process's number on its node, as torchrun gives it; 0 outside torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def barrier() -> None:
    """Wait for all ranks, however long rank 0 works on its own."""
    if active():
        dist.barrier(group=_patient)


def all_sum(value: Tensor) -> Tensor:
    """Sum over ranks, without gradient."""
    if not active():
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def all_mean(value: Tensor) -> Tensor:
    """Mean over ranks, without gradient. A loss summed on each rank and divided by ``all_mean(count)`` has, averaged
    over ranks, the value and the gradient of the loss of the global batch."""
    return all_sum(value) / world_size()


def mean_over(values: Tensor, counted: Tensor) -> Tensor:
    """The mean of the values that count, over all ranks: a scalar whose mean over ranks is the global batch's; zero
    where nothing counts.

    Args:
        values: of any shape and any number on each rank, with gradient; what does not count may be infinite.
        counted: bool of the same shape.
    """
    number = all_mean(counted.sum().to(torch.float32))
    return torch.where(counted, values, 0.0).sum() / torch.where(number > 0, number, 1.0)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        parts = [torch.empty_like(value) for _ in range(world_size())]
        dist.all_gather(parts, value)
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        # A row served every rank's loss, so its gradient is the sum of theirs.
        return all_sum(gradient).chunk(world_size())[rank()]


def gather_rows(value: Tensor) -> Tensor:
    """(B, ...) of every rank in rank order as (world * B, ...), with gradients to all of them. B must be equal."""
    return _GatherRows.apply(value.contiguous()) if active() else value  # type: ignore[no-untyped-call]


def gather_objects(value: Value) -> list[Value]:
    """Every rank's Python object, in rank order, on every rank."""
    if not active():
        return [value]
    gathered: list[Value] = [value] * world_size()
    dist.all_gather_object(gathered, value, group=_patient)
    return gathered


def on_main(work: Callable[[], Value]) -> Value:
    """What ``work`` returns on rank 0, on every rank; the others wait for it.

    Raises:
        FmsuiteError: on every rank, if rank 0 met one.
    """
    outcome: tuple[Value | None, FmsuiteError | None] = (None, None)
    if is_main():
        try:
            outcome = work(), None
        except FmsuiteError as error:
            outcome = None, error
    value, failure = from_main(outcome)
    if failure is not None:
        raise failure
    return cast(Value, value)


def from_main(value: Value) -> Value:
    """Rank 0's Python object on every rank."""
    if not active():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, group=_patient)
    return holder[0]
