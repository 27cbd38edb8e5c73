"""The few collective operations that objectives and the loop need; each is the identity in a single process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather

Value = TypeVar("Value")


def active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if active() else 0


def world_size() -> int:
    return dist.get_world_size() if active() else 1


def is_main() -> bool:
    return rank() == 0


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the group that torchrun describes in the environment; does nothing outside torchrun.

    gloo on CPUs, NCCL on GPUs.
    """
    if active() or not launched():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def launched() -> bool:
    """Whether torchrun (or a compatible launcher) started this process."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def local_rank() -> int:
    """This process's number on its node, as torchrun gives it; 0 outside torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def barrier() -> None:
    if active():
        dist.barrier()


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


def gather_rows(value: Tensor) -> Tensor:
    """(B, ...) of every rank in rank order as (world * B, ...), with gradients to all of them. B must be equal."""
    if not active():
        return value
    return torch.cat(list(all_gather(value.contiguous())))  # type: ignore[no-untyped-call]


def gather_objects(value: Value) -> list[Value]:
    """Every rank's Python object, in rank order, on every rank."""
    if not active():
        return [value]
    gathered: list[Value] = [value] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def from_main(value: Value) -> Value:
    """Rank 0's Python object on every rank."""
    if not active():
        return value
    holder = [value]
    dist.broadcast_object_list(holder)
    return holder[0]
