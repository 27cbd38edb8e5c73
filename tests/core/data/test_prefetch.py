"""Batches on their way to the device: untouched on CPUs, copied beside the work on GPUs, and waited for."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from fmsuite.core.data.adjust import Adjustment, stacked
from fmsuite.core.data.prefetch import on_device
from fmsuite.core.data.sample import Batch, View
from fmsuite.core.training.loop import _Clock

CPU = torch.device("cpu")


def batch(number: int) -> Batch:
    pixels = torch.full((4, 3, 16, 16), number, dtype=torch.uint8)
    keys = torch.arange(4) + 10 * number
    view = View(pixels, pixels[:, :1] > 1, keys > 2, keys=keys, adjust=stacked([Adjustment(gamma=2.0)] * 4))
    return Batch({"a": [view]}, torch.arange(4), torch.full((4,), -1), pairs=pixels[:, 0, 0].float())


class Source:
    """Counts what was asked for, and knows whether it was closed."""

    def __init__(self, count: int, seconds: float = 0.0) -> None:
        self.count, self.seconds, self.asked, self.closed = count, seconds, 0, False

    def __iter__(self) -> Iterator[Batch]:
        try:
            for number in range(self.count):
                time.sleep(self.seconds)
                self.asked += 1
                yield batch(number)
        finally:
            self.closed = True


def test_on_a_cpu_it_is_the_identity_and_asks_for_nothing_in_advance() -> None:
    source = Source(3)
    moved = on_device(source, CPU)
    first = next(moved)
    assert source.asked == 1
    assert first.views["a"][0].pixels.device == CPU
    assert torch.equal(first.views["a"][0].pixels, batch(0).views["a"][0].pixels)
    moved.close()
    assert source.closed
    assert len(list(on_device(Source(3), CPU))) == 3


def test_an_error_of_the_loader_passes_through() -> None:
    def failing() -> Iterator[Batch]:
        yield batch(0)
        raise ZeroDivisionError

    moved = on_device(failing(), CPU)
    next(moved)
    with pytest.raises(ZeroDivisionError):
        next(moved)


@pytest.mark.parametrize(("load", "work", "share"), [(0.02, 0.02, 0.5), (0.0, 0.03, 0.0), (0.03, 0.01, 0.75)])
def test_the_share_of_waiting_is_the_loaders_part_of_the_time(
    load: float, work: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", sleep)
    batches, clock = on_device(Source(6, load), CPU), _Clock(4, CPU)
    for step in range(6):
        clock.next_batch(batches, step)
        sleep(work)
    line = clock.lap()
    assert line["data_wait"] == pytest.approx(share)
    assert line["samples_per_second"] == pytest.approx(4 / (load + work))
    sleep(1.0)
    assert clock.lap()["data_wait"] == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_everything_arrives_and_what_hosts_decide_by_stays() -> None:
    device = torch.device("cuda")
    pinned = (batch(number).pin_memory() for number in range(8))
    for number, moved in enumerate(on_device(pinned, device)):
        view, expected = moved.views["a"][0], batch(number)
        busy = torch.randn(2048, 2048, device=device) @ torch.randn(2048, 2048, device=device)
        assert view.pixels.is_cuda
        assert view.pixels.dtype == torch.uint8
        assert not view.keys.is_cuda
        assert not view.adjust["gamma"].is_cuda
        assert torch.equal(view.pixels.cpu(), expected.views["a"][0].pixels)
        assert torch.equal(view.mask.cpu(), expected.views["a"][0].mask)
        assert busy.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_waiting_counts_only_where_the_gpu_waits() -> None:
    """A loader that takes half as long as a step costs nothing, though the host waits for it."""
    device = torch.device("cuda")
    matrix = torch.randn(8192, 8192, device=device)

    def work() -> None:
        for _ in range(8):
            matrix @ matrix

    work()
    torch.cuda.synchronize()
    begun = time.monotonic()
    work()
    torch.cuda.synchronize()
    step = time.monotonic() - begun
    for load, low, high in ((step / 2, 0.0, 0.15), (2 * step, 0.3, 0.7)):
        batches, clock = on_device(Source(8, load), device), _Clock(4, device)
        clock.next_batch(batches, 0)
        work()
        torch.cuda.synchronize()
        clock.lap()
        for number in range(1, 8):
            clock.next_batch(batches, number)
            work()
        torch.cuda.synchronize()
        assert low <= clock.lap()["data_wait"] <= high
