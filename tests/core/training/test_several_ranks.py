"""The whole loop on one, two and four ranks, under both strategies; and a batch in micro-batches."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from fmsuite.core.training import checkpoint_files, saver
from fmsuite.core.training.checkpoint import list_checkpoints
from fmsuite.core.training.metrics import read_metrics
from fmsuite.errors import FmsuiteError
from tests.core.training.helpers import final_state, make_config, run_toy

STEPS = 6
TOLERANCE = 2e-6


class Killed(Exception):
    pass


def train_toy(rank: int, folder: Path, strategy: str, stop: int = -1, resume: bool = False, **changes: object) -> None:
    """A run of the toy; ``stop`` ends it before that step, as a crash would."""

    def at(step: int) -> None:
        if step == stop:
            raise Killed

    config = make_config(STEPS, strategy=strategy, **{"log_every": 1, "checkpoint_every": 2, **changes})
    try:
        run_toy(folder, config, resume=resume, at=at)
    except Killed:
        assert stop >= 0


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    train_toy(0, folder, "ddp")
    return folder


def check_equal(found: Path, expected: Path) -> None:
    lines, others = (list(read_metrics(folder / "metrics.jsonl")) for folder in (found, expected))
    assert [line["step"] for line in lines] == [line["step"] for line in others] == list(range(1, STEPS + 1))
    for line, other in zip(lines, others, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=TOLERANCE), line["step"]
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5), line["step"]
    state, other_state = final_state(found, STEPS), final_state(expected, STEPS)
    assert state.keys() == other_state.keys()
    for name, value in other_state.items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("count", [2, 4])
def test_ranks_have_the_losses_of_one_process(request, alone: Path, tmp_path: Path, count: int, strategy: str) -> None:
    ranks = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[count])
    ranks(train_toy, tmp_path, strategy)
    check_equal(tmp_path, alone)


def test_a_run_in_four_parts_goes_on_whole_on_two_ranks_and_ends_on_one(
    four_ranks, two_ranks, alone: Path, tmp_path: Path
) -> None:
    four_ranks(train_toy, tmp_path, "fsdp2", 3)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000002"]
    two_ranks(train_toy, tmp_path, "ddp", 5, True)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000004", "step-00000002"]
    train_toy(0, tmp_path, "ddp", resume=True)
    check_equal(tmp_path, alone)


def test_a_run_of_one_process_goes_on_in_four_parts(four_ranks, alone: Path, tmp_path: Path) -> None:
    train_toy(0, tmp_path, "ddp", stop=3)
    four_ranks(train_toy, tmp_path, "fsdp2", -1, True)
    check_equal(tmp_path, alone)


def train_on_a_full_disk(rank: int, folder: Path) -> str:
    """The disk of the last rank alone is full, from step 4 on."""

    class Full(checkpoint_files.Writer):
        def write_data(self, *given: object):  # type: ignore[no-untyped-def]
            if rank == 1 and self.target.name == "step-00000004":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write_data(*given)  # type: ignore[arg-type]

    before, saver.Writer = saver.Writer, Full
    try:
        train_toy(rank, folder, "fsdp2")
    except FmsuiteError as error:
        return str(error)
    finally:
        saver.Writer = before
    return ""


def test_a_checkpoint_that_one_rank_cannot_write_ends_all(two_ranks, tmp_path: Path) -> None:
    first, second = two_ranks(train_on_a_full_disk, tmp_path)
    assert first == second
    assert "step-00000004: the checkpoint could not be written (No space left on device)" in first
    assert "--resume to continue from step 2" in first
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000002"]


def test_micro_batches_in_parts_give_the_whole_batchs_losses(two_ranks, alone: Path, tmp_path: Path) -> None:
    two_ranks(train_accumulated, tmp_path)
    check_equal(tmp_path, alone)


def train_accumulated(rank: int, folder: Path) -> None:
    train_toy(rank, folder, "fsdp2", accumulate=2)
