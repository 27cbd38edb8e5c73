"""Processes that a launcher starts, restarts and stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.commands.test_ranks import check_equal, environments

LONG = {"training.steps": 200, "training.checkpoint_every": 4, "monitor.every": 0, "training.keep_checkpoints": 2}
LAUNCH = "import sys; from fmsuite.commands.launch import launch; from pathlib import Path; "
LAUNCH += "sys.exit(launch(sys.argv[3:], 2, int(sys.argv[1]), Path(sys.argv[2])))"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts Python; whatever is left of it after the test is killed."""
    started: list[subprocess.Popen] = []

    def run(*command: object) -> subprocess.Popen:
        words = [sys.executable, *map(str, command)]
        process = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(process)
        return process

    yield run
    for process in started:
        for pid in descendants_of(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.communicate()


def steps_of(run: Path) -> list[int]:
    metrics = run / "metrics.jsonl"
    if not metrics.exists():
        return []
    return [json.loads(line)["step"] for line in metrics.read_text(encoding="utf-8").splitlines() if '"loss"' in line]


def processes_of(run: Path) -> list[int]:
    """Processes of this machine that write to a run, by their command lines and their launchers'."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(run) in words:
            found.append(int(folder.name))
    return found


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
    command = start(
        "-c", LAUNCH, 3, run / "logs", "pretrain", *tile_settings("mae", LONG), "--data", tiles, "--out", run
    )
    until(lambda: len(steps_of(run)) >= 5)
    started = descendants_of(command.pid)
    command.send_signal(signal.SIGTERM)
    said, _ = command.communicate(timeout=120)
    assert command.returncode == 143, said
    assert "Interrupted at step" in said
    assert "Traceback" not in said
    reached = steps_of(run)[-1]
    assert reached < LONG["training.steps"]
    assert (run / "checkpoints" / f"step-{reached:08d}" / "checkpoint.json").is_file()
    assert len(started) >= 2
    until(lambda: not [pid for pid in started if Path(f"/proc/{pid}").exists()])
    assert processes_of(run) == []
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
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = start(*torchrun, "-m", "fmsuite", *arguments, "--out", run)
    until(lambda: len(steps_of(run)) >= 10)
    victim = max(pid for pid in children_of(command.pid) if "fmsuite" in Path(f"/proc/{pid}/cmdline").read_text())
    os.kill(victim, signal.SIGKILL)
    said, _ = command.communicate(timeout=120)
    assert command.returncode == 0, said
    assert "Restart 1: going on from the last checkpoint." in said
    assert said.count("Done at step") == 1
    (resumed,) = [int(line.split()[4]) for line in said.splitlines() if "Resuming after step" in line]
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
