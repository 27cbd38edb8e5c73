"""In a single process every collective is the identity."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from fmsuite.core import distributed
from fmsuite.errors import FmsuiteError
from tests.ranks import averaged


def test_one_process_is_rank_zero_of_one() -> None:
    assert not distributed.active()
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)


def test_collectives_are_the_identity() -> None:
    value = torch.arange(6.0).view(3, 2).requires_grad_()
    assert distributed.all_sum(value) is value
    assert torch.equal(distributed.all_mean(value), value)
    assert distributed.gather_rows(value) is value
    assert distributed.from_main({"a": 1}) == {"a": 1}
    distributed.barrier()


def unequal(rank: int = 0, ranks: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean over what counts, and its gradient, for a rank's rows: of the first two ranks' values, nine count of one
    and none of the other."""
    values = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    counted = torch.arange(20).view(4, 5) < 9
    values[3, 4] = torch.inf
    mine = slice(4 * rank // ranks, 4 * (rank + 1) // ranks)
    weight = torch.ones(5, requires_grad=True)
    mean = distributed.mean_over(values[mine] * weight, counted[mine])
    mean.backward()
    return mean.detach(), weight.grad


def test_the_mean_over_what_counts_is_the_global_batchs(two_ranks) -> None:
    mean, gradient = averaged(two_ranks(unequal, 2))
    expected, own = unequal()
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(gradient[:4], own[:4])
    values = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)).flatten()
    torch.testing.assert_close(expected, values[:9].mean())
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert distributed.mean_over(torch.ones(2, 3), nothing).item() == 0


def test_no_group_is_joined_outside_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with distributed.process_group(torch.device("cpu")):
        assert not distributed.active()
    assert distributed.local_rank() == 0


def test_a_group_of_one_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "RANK" in os.environ
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with distributed.process_group(torch.device("cpu")):
            assert distributed.active()
            value = torch.arange(4.0).view(2, 2).requires_grad_()
            gathered = distributed.gather_rows(value)
            (gathered * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
            assert torch.equal(value.grad, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
            assert torch.equal(distributed.all_mean(value), value.detach())
            assert distributed.from_main("x") == "x"
        assert distributed.active()  # A group that someone else made is left alone.
    finally:
        dist.destroy_process_group()


def test_processes_that_start_anew_do_not_meet_the_dead() -> None:
    """Three starts in one store; in each rank 1 comes first, and finds what the start before has left."""
    store = dist.HashStore()
    agreed = []
    for _ in range(3):
        with ThreadPoolExecutor(3) as ranks:
            later = [ranks.submit(distributed._agree, store, number, 3) for number in (1, 2)]
            time.sleep(0.12)
            assert not any(each.done() for each in later)
            first = distributed._agree(store, 0, 3)
            assert [each.result(10) for each in later] == [first, first]
        agreed.append(first)
    assert len(set(agreed)) == 3


def test_processes_that_do_not_come_are_not_waited_for_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "MEETING_S", 0.1)
    with pytest.raises(FmsuiteError, match="The 2 processes of the run did not meet"):
        distributed._agree(dist.HashStore(), 0, 2)


SLOW_MAIN = """
import functools, time
from datetime import timedelta
import torch, torch.distributed as dist
from fmsuite.core import distributed
from tests.ranks import averaged

dist.init_process_group = functools.partial(dist.init_process_group, timeout=timedelta(seconds=1))
with distributed.process_group(torch.device("cpu")):
    if distributed.is_main():
        time.sleep(2.5)
    assert distributed.from_main("index" if distributed.is_main() else None) == "index"
    if distributed.is_main():
        time.sleep(2.5)
    distributed.barrier()
    assert distributed.gather_objects(distributed.rank()) == [0, 1]
    assert distributed.all_sum(torch.ones(())).item() == 2
    rank = distributed.rank()
    value = torch.full((2, 3), float(rank), requires_grad=True)
    rows = distributed.gather_rows(value)
    assert rows[:, 0].tolist() == [0, 0, 1, 1]
    weights = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])[rank]
    (rows.sum(1) * weights).sum().backward()
    assert value.grad[:, 0].tolist() == [[11, 22], [33, 44]][rank]
"""


def test_ranks_wait_for_the_first_one_beyond_the_time_limit_and_share_rows_with_gradients() -> None:
    """Rank 0 may read slides for hours while the others stand in a barrier; here the limit is one second."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SLOW_MAIN], env={**common, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
