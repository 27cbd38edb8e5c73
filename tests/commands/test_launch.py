"""Processes that a launcher starts, restarts and stops."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands.test_ranks import check_equal, environments

LONG = {"training.steps": 200, "training.checkpoint_every": 4, "monitor.every": 0, "training.keep_checkpoints": 2}


@pytest.fixture
def start(launcher) -> Iterator[Callable[..., Any]]:
    """Starts a launcher; whatever is left of it after the test is killed."""
    started = []

    def run(by: str, *arguments: object) -> Any:
        started.append(launcher.start(*arguments, by=by, environment={"CUDA_VISIBLE_DEVICES": ""}))
        return started[-1]

    yield run
    for command in started:
        if not command.ended:
            for pid in [*descendants_of(command.pid), command.pid]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            command.wait()


def steps_of(run: Path) -> list[int]:
    metrics = run / "metrics.jsonl"
    if not metrics.exists():
        return []
    return [json.loads(line)["step"] for line in metrics.read_text(encoding="utf-8").splitlines() if '"loss"' in line]


def children_of(parent: int) -> list[int]:
    tasks = Path(f"/proc/{parent}/task").glob("*/children")
    return [int(word) for task in tasks for word in task.read_text().split()]


def descendants_of(parent: int) -> list[int]:
    found = children_of(parent)
    return found + [each for child in found for each in descendants_of(child)]


@pytest.mark.slow
def test_a_stopped_launcher_has_saved_and_leaves_no_process(
    start, tiles, tile_settings: Callable, until: Callable, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = ["pretrain", *tile_settings("mae", LONG), "--data", tiles, "--out", run]
    command = start("launch", 2, 3, run / "logs", *arguments)
    until(lambda: len(steps_of(run)) >= 5)
    started = descendants_of(command.pid)
    command.send(signal.SIGTERM)
    ran = command.wait()
    said = ran.text
    assert ran.code == 143, said
    assert "Interrupted at step" in said
    assert "Traceback" not in said
    reached = steps_of(run)[-1]
    assert reached < LONG["training.steps"]
    assert (run / "checkpoints" / f"step-{reached:08d}" / "checkpoint.json").is_file()
    assert len(started) >= 2
    until(lambda: not [pid for pid in started if Path(f"/proc/{pid}").exists()])
    # The second process's account is in a file of its own.
    assert said.count("float32 on cpu, 2 rank(s), ddp") == 1
    assert len(list((run / "logs").rglob("1/stderr.log"))) == 1
    facts = json.loads((run / "run.json").read_text())
    assert [start["ranks"] for start in facts["starts"]] == [2]


@pytest.mark.slow
def test_a_killed_rank_is_restarted_and_no_sample_is_repeated_or_dropped(
    start, launcher, tiles, tile_settings: Callable, facts_of: Callable, until: Callable, tmp_path: Path
) -> None:
    changes = {**LONG, "training.steps": 24, "model.drop_path": 0.3, "model.depth": 2}
    arguments = ["pretrain", *tile_settings("mae", changes), "--data", str(tiles)]
    run = tmp_path / "killed"
    torchrun = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = start("torchrun", *torchrun, "-m", "fmsuite", *arguments, "--out", run)
    until(lambda: len(steps_of(run)) >= 10)
    victim = max(pid for pid in children_of(command.pid) if "fmsuite" in Path(f"/proc/{pid}/cmdline").read_text())
    os.kill(victim, signal.SIGKILL)
    ran = command.wait()
    said = ran.text
    assert ran.code == 0, said
    assert "Restart 1: going on from the last checkpoint." in said
    assert said.count("Done at step") == 1
    (resumed,) = map(int, re.findall(r"Resuming after step (\d+)", said))
    assert 4 <= resumed < 24
    ran = launcher.start(*arguments, "--out", tmp_path / "whole").wait()
    assert ran.code == 0, ran.text
    check_equal(facts_of(run), facts_of(tmp_path / "whole"), 24)


def test_a_process_whose_peer_died_says_so_in_a_sentence(
    launcher, tiles, tile_settings: Callable, until: Callable, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = ["pretrain", *tile_settings("mae", LONG), "--data", tiles, "--out", run]
    survivor, victim = (launcher.start(*arguments, environment=each) for each in environments())
    until(lambda: len(steps_of(run)) >= 3)
    victim.send(signal.SIGKILL)
    assert victim.wait().code == -signal.SIGKILL
    ran = survivor.wait()
    assert ran.code == 1
    assert "Another process of this run has ended, so this one cannot go on." in ran.text
    assert "Traceback" not in ran.text
    assert "defect" not in ran.text


def test_auto_resume_begins_a_run_and_continues_it(
    fmsuite, tiles, tile_settings: Callable, facts_of: Callable, tmp_path: Path
) -> None:
    short = {"training.steps": 4, "training.checkpoint_every": 1}
    given = ["pretrain", *tile_settings("mae", short), "--data", tiles, "--auto-resume", "--out", tmp_path / "run"]
    ran = fmsuite(*given)
    assert ran.code == 0, ran.text
    expected = facts_of(tmp_path / "run")
    for path in sorted((tmp_path / "run" / "checkpoints").iterdir())[1:]:
        path.rename(tmp_path / path.name)
    ran = fmsuite(*given)
    assert ran.code == 0, ran.text
    assert "Resuming after step 3 of 4" in ran.text
    found = facts_of(tmp_path / "run")
    assert found.losses == expected.losses
    assert all(torch.equal(found.weights[name], weight) for name, weight in expected.weights.items())
    ran = fmsuite(*given)
    assert ran.code == 0
    assert "The run is complete" in ran.text
    ran = fmsuite(*given[:-2])
    assert ran.code == 2
    assert "--auto-resume needs --out" in ran.text
    ran = fmsuite(*given, "--resume")
    assert ran.code == 2
    assert "exclude each other" in ran.text


def test_a_restarted_process_continues_its_own_run_and_no_other(
    fmsuite, tiles, tile_settings: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    short = {"training.steps": 2, "training.checkpoint_every": 1, "monitor.every": 0}
    given = ["pretrain", *tile_settings("mae", short), "--data", tiles, "--out", run]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    ran = fmsuite(*given)
    assert ran.code == 0, ran.text
    assert "Restart" not in ran.text  # There was nothing to go on with.
    (run / "checkpoints" / "step-00000002").rename(tmp_path / "elsewhere")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert "there is a run in this folder already" in fmsuite(*given).text
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    ran = fmsuite(*given)
    assert ran.code == 0, ran.text
    assert "Restart 2: going on from the last checkpoint." in ran.text
    assert "Resuming after step 1 of 2" in ran.text
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    ran = fmsuite(*given)
    assert ran.code == 2
    assert "there is a run in this folder already" in ran.text


def test_gpus_that_are_not_there_are_refused(fmsuite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    given = ["pretrain", "--domain", "pathology", "--out", tmp_path / "run"]
    ran = fmsuite(*given, "--gpus", 2)
    assert ran.code == 2
    assert "--gpus 2: PyTorch sees 1 GPU(s) here." in ran.text
    assert "torchrun with --set training.device=cpu" in ran.text
    ran = fmsuite(*given, "--restarts", 2)
    assert ran.code == 2
    assert "--restarts belongs to --gpus" in ran.text
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    ran = fmsuite(*given, "--gpus", 1)
    assert ran.code == 2
    assert "Leave it out under torchrun" in ran.text
    assert not (tmp_path / "run").exists()
