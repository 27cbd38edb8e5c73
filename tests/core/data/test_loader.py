"""The stream does not depend on who loads it, starts anywhere, and worker failures say what to do."""

from __future__ import annotations

import os
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.loader import MAX_WORKERS, SampleStream, default_workers, make_loader
from fmsuite.core.data.pipeline import NoAugmentation, ViewPipeline, WindowDataset
from fmsuite.core.data.sample import ArraySample, Batch, MaskContext, ViewRequest
from fmsuite.core.tokens import PatchGrid
from fmsuite.errors import FmsuiteError, ReadFailure, UsageError

LENGTH = 13


class Reader:
    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def read(self, window: Window) -> ArraySample:
        number = int(window.source[2:])
        if self.fault == "die":
            os._exit(7)
        if self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "bug":
            raise ZeroDivisionError("a bug")
        if self.fault == "all" or number % 5 == 3:
            raise ReadFailure(window.source, "read", "damaged")
        if self.fault == "signals":
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert torch.get_num_threads() == 1
        values = np.random.default_rng(number).integers(0, 255, (3, 12, 12)).astype(np.uint16)
        valid = np.ones((1, 12, 12), dtype=bool)
        valid[:, :3, :3] = number % 2 == 0
        return ArraySample(values, valid)


def some(context: MaskContext) -> np.ndarray:
    return (
        context.generator.random(len(context.valid)) < 0.4 + 0.2 * context.key.slot / context.key.slots
    ) & context.valid


def dataset(fault: str = "") -> WindowDataset:
    index = SampleIndex.from_windows(Window(f"/s{i}", "g", (0.0, 0.0), (12.0, 12.0)) for i in range(LENGTH))
    requests = [ViewRequest("a", (8, 8), 2, (0.2, 1.0), mask=some), ViewRequest("b", (4, 4))]
    grid = PatchGrid(("y", "x"), (4, 4), ((0, 1, 2),))
    return WindowDataset(index, Reader(fault), ViewPipeline(requests, NoAugmentation(), grid, ("y", "x"), 5), 5)


def load(
    start: int = 0, stop: int = 5, workers: int = 0, rank: int = 0, ranks: int = 1, fault: str = ""
) -> list[Batch]:
    stream = SampleStream(LENGTH, 4, seed=5, rank=rank, world_size=ranks)
    return list(make_loader(dataset(fault), stream, start, stop, workers))


def tensors(batch: Batch) -> list[torch.Tensor]:
    found = [batch.indices, batch.labels]
    for group in batch.views.values():
        for view in group:
            found += [t for t in (view.pixels, view.valid, view.mask, view.keys) if t is not None]
    return found


def assert_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert len(first) == len(second)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_workers_change_nothing() -> None:
    alone, together = load(), load(workers=2)
    assert len(alone) == len(together) == 5
    for a, b in zip(alone, together, strict=True):
        assert_equal(tensors(a), tensors(b))
        assert a.skipped == b.skipped
    assert any(batch.skipped for batch in alone)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_batch_and_change_nothing(ranks: int) -> None:
    whole = load()
    shares = [load(rank=rank, ranks=ranks) for rank in range(ranks)]
    for step, batch in enumerate(whole):
        joined = [torch.cat(parts) for parts in zip(*(tensors(share[step]) for share in shares), strict=True)]
        assert_equal(joined, tensors(batch))
        assert [s for share in shares for s in share[step].skipped] == batch.skipped


@pytest.mark.parametrize("workers", [0, 1])
def test_any_step_can_be_the_first(workers: int) -> None:
    whole = load()
    later = load(start=3, workers=workers)
    assert len(later) == 2
    for a, b in zip(whole[3:], later, strict=True):
        assert_equal(tensors(a), tensors(b))


def test_loading_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    load(workers=1, stop=2)
    load(workers=0, stop=2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002


@settings(deadline=None, max_examples=40)
@given(length=st.integers(1, 40), batch=st.integers(1, 12), seed=st.integers(0, 99))
def test_every_window_is_seen_once_an_epoch(length: int, batch: int, seed: int) -> None:
    stream = SampleStream(length, batch, seed)
    keys = [key for step in range(-(-3 * length // batch)) for key in stream.keys(step)][: 3 * length]
    assert Counter((key.epoch, key.index) for key in keys) == {(e, i): 1 for e in range(3) for i in range(length)}
    assert stream.steps_per_epoch == max(1, length // batch)


def test_keys_say_where_they_stand() -> None:
    keys = SampleStream(100, 8, 0, rank=1, world_size=2).keys(20)
    assert [key.slot for key in keys] == [4, 5, 6, 7]
    assert {key.step for key in keys} == {20}
    assert {key.slots for key in keys} == {8}
    assert {key.epoch for key in keys} == {1}
    assert {key.attempt for key in keys} == {0}


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [key.index for key in SampleStream(50, 50, seed).keys(epoch)]

    orders = {tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    assert tuple(range(50)) not in orders


def test_a_batch_that_does_not_divide_is_refused_with_numbers_that_would() -> None:
    with pytest.raises(UsageError, match=r"10 does not divide among 4.*8 or 12"):
        SampleStream(100, 10, 0, 0, 4)
    with pytest.raises(UsageError, match=r"multiple of 4, such as 4\."):
        SampleStream(100, 3, 0, 0, 4)


def test_an_empty_index_is_refused() -> None:
    with pytest.raises(UsageError, match="no windows"):
        SampleStream(0, 4, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_for_people_reach_the_main_process_as_they_are(workers: int) -> None:
    with pytest.raises(FmsuiteError, match=r"^21 windows in a row.*skipped\.csv") as caught:
        load(workers=workers, fault="all")
    assert "Traceback" not in str(caught.value)


def test_bugs_in_a_worker_keep_their_type_and_name_the_window() -> None:
    with pytest.raises(ZeroDivisionError, match=r"(?s)a bug.*row \d+ of the index: /s\d+"):
        load(workers=1, fault="bug")


@pytest.mark.parametrize("fault", ["die", "killed"])
def test_a_dead_worker_gives_an_error_that_says_what_to_do(fault: str) -> None:
    with pytest.raises(FmsuiteError, match=r"worker died.*memory.*training\.workers=0"):
        load(workers=1, fault=fault)


def test_workers_ignore_interrupts_and_use_one_thread() -> None:
    assert len(load(workers=1, stop=2, fault="signals")) == 2


def test_workers_are_chosen_from_the_cores_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    def chosen(cores: int, cuda: bool) -> int:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        return default_workers()

    assert [chosen(cores, False) for cores in (1, 2, 4, 8)] == [0, 0, 1, 2]
    assert [chosen(cores, True) for cores in (1, 2, 8, 64)] == [0, 1, 7, MAX_WORKERS]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert chosen(64, True) == 7
