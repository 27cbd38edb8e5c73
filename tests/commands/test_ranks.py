"""Two processes and one: the same global batch, the same losses."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

STEPS = 6
TOLERANCE = 2e-6
"""Relative, of losses: float32 sums are taken in another order, and AdamW carries the difference from step to step."""
CHANGES = {
    "mae": {"model.drop_path": 0.3, "model.depth": 2},
    # KoLeo's neighbours and the centres are those of the global batch, so ranks have to exchange them.
    "dinov2": {"model.drop_path": 0.3, "model.depth": 2, "objective.freeze_last_layer": 0},
}


def check_equal(found, expected, steps: int = STEPS) -> None:
    assert set(found.losses) == set(expected.losses) == set(range(1, steps + 1))
    for step, (loss, grad_norm) in expected.losses.items():
        assert found.losses[step][0] == pytest.approx(loss, rel=TOLERANCE), step
        assert found.losses[step][1] == pytest.approx(grad_norm, rel=1e-5), step
    for name, weight in expected.weights.items():
        assert torch.allclose(found.weights[name], weight, rtol=1e-3, atol=1e-5), name


def environments() -> list[dict[str, str]]:
    """What torchrun tells two processes."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


def test_two_processes_have_the_losses_of_one_and_can_be_continued_by_one(
    launcher, tiles, tile_settings: Callable, facts_of: Callable, tmp_path: Path
) -> None:
    changes = {**CHANGES["mae"], "training.steps": STEPS, "training.checkpoint_every": 1}
    two, one = equal_runs(launcher, tmp_path, facts_of, *tile_settings("mae", changes), "--data", tiles)
    shutil.rmtree(max((two / "checkpoints").glob("step-*")))
    ran = launcher.start("pretrain", "--domain", "pathology", "--out", two, "--resume").wait()
    assert ran.code == 0, ran.text
    assert f"Resuming after step {STEPS - 1}" in ran.text
    check_equal(facts_of(two), facts_of(one))


def test_two_processes_in_parts_have_the_losses_of_one(
    launcher, tiles, tile_settings: Callable, facts_of: Callable, tmp_path: Path
) -> None:
    changes = {**CHANGES["dinov2"], "training.steps": STEPS, "training.strategy": "fsdp2"}
    equal_runs(launcher, tmp_path, facts_of, *tile_settings("dinov2", changes), "--data", tiles)


def equal_runs(launcher, folder: Path, facts_of: Callable, *arguments: object) -> tuple[Path, Path]:
    """The folders of one run by two processes and by one, which have been compared."""
    two, one = folder / "two", folder / "one"
    commands = [launcher.start("pretrain", *arguments, "--out", two, environment=e) for e in environments()]
    for ran in [command.wait() for command in commands]:
        assert ran.code == 0, ran.text
    ran = launcher.start("pretrain", *arguments, "--out", one).wait()
    assert ran.code == 0, ran.text
    check_equal(facts_of(two), facts_of(one))
    return two, one


def test_wrong_use_is_said_by_every_process_and_none_hangs(launcher, tiles, tile_settings, tmp_path) -> None:
    for changes, arguments, sentence in (
        ({"training.batch_size": 7}, ["--data", tiles, "--out", tmp_path / "a"], "7"),
        ({}, ["--data", tmp_path / "nowhere", "--out", tmp_path / "b"], "nowhere: there is no such file"),
        ({}, ["--data", tiles], "--out is needed"),
    ):
        commands = [
            launcher.start("pretrain", *tile_settings("mae", changes), *arguments, environment=e)
            for e in environments()
        ]
        for ran in [command.wait() for command in commands]:
            assert ran.code == 2, ran.text
            assert sentence in ran.text
