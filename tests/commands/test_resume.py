"""Runs that are killed, interrupted, refused or out of space, and go on as if nothing had happened."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from fmsuite.core.training import saver

STEPS = 40
LONG = {"training.steps": STEPS, "training.checkpoint_every": 5, "model.depth": 2}
HARD = {
    "mae": {**LONG, "model.drop_path": 0.3, "training.accumulate": 2},
    "dino": {**LONG, "model.drop_path": 0.3, "objective.freeze_last_layer": 0},
}


def assert_equal_runs(found, expected) -> None:
    assert found.losses == expected.losses
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert torch.equal(found.weights[name], weight), name


def lines_of(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_text(encoding="utf-8").count('"loss"') if metrics.exists() else 0


@pytest.fixture(scope="module")
def uninterrupted(tiles: Path, tile_settings: Callable, facts_of: Callable, launcher, tmp_path_factory) -> Callable:
    """The facts of a run of an objective that nothing disturbed; each is made once."""
    known = {}

    def get(objective: str):
        if objective not in known:
            run = tmp_path_factory.mktemp("whole") / objective
            arguments = tile_settings(objective, HARD[objective])
            ran = launcher.start("pretrain", *arguments, "--data", tiles, "--out", run).wait()
            assert ran.code == 0, ran.text
            known[objective] = facts_of(run)
            assert set(known[objective].losses) == set(range(1, STEPS + 1))
        return known[objective]

    return get


@pytest.mark.parametrize("objective", ["mae", "dino"])
def test_a_run_that_was_killed_three_times_is_the_uninterrupted_run_bit_for_bit(
    launcher, tiles, tile_settings, facts_of, uninterrupted, until, tmp_path, objective: str
) -> None:
    expected = uninterrupted(objective)
    run = tmp_path / "run"
    arguments = [*tile_settings(objective, HARD[objective]), "--data", tiles]
    random = np.random.default_rng(7)
    reached = 0
    for _ in range(3):
        command = launcher.start("pretrain", *arguments, "--out", run)
        reached += int(random.integers(4, 11))
        until(lambda enough=reached: lines_of(run) >= enough)
        command.send(signal.SIGKILL)
        assert command.wait().code == -signal.SIGKILL
        arguments = ["--domain", "pathology", "--resume"]
    ran = launcher.start("pretrain", *arguments, "--out", run).wait()
    assert ran.code == 0, ran.text
    assert "Resuming after step" in ran.text
    assert_equal_runs(facts_of(run), expected)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 143)])
def test_a_run_that_was_told_to_stop_says_so_by_its_code_and_can_be_finished(
    launcher, tiles, tile_settings, facts_of, uninterrupted, until, tmp_path, number: int, code: int
) -> None:
    run = tmp_path / "run"
    command = launcher.start("pretrain", *tile_settings("mae", HARD["mae"]), "--data", tiles, "--out", run)
    until(lambda: lines_of(run) >= 5)
    command.send(number)
    ran = command.wait()
    assert ran.code == code
    assert "Interrupted at step" in ran.text
    assert f"--out {run} --resume" in ran.text
    assert "Traceback" not in ran.text
    stopped = lines_of(run)
    assert 5 <= stopped < STEPS
    newest = max((run / "checkpoints").glob("step-*"))
    assert int(newest.name.removeprefix("step-")) == stopped
    assert not (run / "encoder.safetensors").exists()
    ran = launcher.start("pretrain", "--domain", "pathology", "--out", run, "--resume").wait()
    assert ran.code == 0, ran.text
    assert_equal_runs(facts_of(run), uninterrupted("mae"))


def test_the_number_of_workers_changes_nothing(fmsuite, tiles, tile_settings, facts_of, tmp_path) -> None:
    changes = {"training.steps": 6, "model.drop_path": 0.3, "model.depth": 2}
    for workers in (0, 2):
        arguments = tile_settings("dino", {**changes, "training.workers": workers})
        ran = fmsuite("pretrain", *arguments, "--data", tiles, "--out", tmp_path / str(workers))
        assert ran.code == 0, ran.text
    assert_equal_runs(facts_of(tmp_path / "2"), facts_of(tmp_path / "0"))


@pytest.fixture(scope="module")
def finished(tiles, tile_settings, launcher, tmp_path_factory) -> Path:
    """A run of two steps, which tests may only fail to change."""
    run = tmp_path_factory.mktemp("finished") / "run"
    arguments = tile_settings("mae", {"training.steps": 2, "training.checkpoint_every": 1})
    ran = launcher.start("pretrain", *arguments, "--data", tiles, "--out", run).wait()
    assert ran.code == 0, ran.text
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--set", "optim.lr=0.5"], "optim.lr (was 0.001, is 0.5)"),
        (["--set", "objective.mask_ratio=0.5"], "objective.mask_ratio (was 0.75, is 0.5)"),
        (["--set", "seed=5"], "seed (was 0, is 5)"),
        (["--set", "training.steps=9"], "training.steps"),
        (["--objective", "dino"], "objective.name (was 'mae', is 'dino')"),
        (["--data", "elsewhere"], "--data"),
        (["--domain", "svg"], "is for --domain pathology, not svg"),
        (["--set", "optim.rl=0.5"], "Did you mean 'lr'"),
    ],
)
def test_going_on_with_something_else_is_refused_by_name_and_spoils_nothing(
    fmsuite, finished: Path, arguments: list[str], named: str
) -> None:
    before = contents(finished)
    ran = fmsuite("pretrain", "--domain", "pathology", "--out", finished, "--resume", *arguments)
    assert ran.code == 2
    assert named in ran.text
    assert contents(finished) == before


def test_a_batch_that_is_too_small_is_refused_before_the_run_has_begun(
    fmsuite, tiles: Path, tile_settings, tmp_path: Path
) -> None:
    def start(**changes) -> tuple[int, str]:
        settings = {"training.batch_size": 2, "training.steps": 1, "monitor.every": 0, **changes}
        words = tile_settings("dinov2", settings)
        ran = fmsuite("pretrain", "--data", tiles, "--out", tmp_path / "run", *words)
        return ran.code, ran.text

    code, text = start(**{"training.accumulate": 2})
    assert code == 2
    assert "Objective 'dinov2' compares the samples of a batch, and a batch of one has no other." in text
    assert start()[0] == 0


def test_a_folder_with_a_run_is_not_begun_again(fmsuite, finished: Path, tiles: Path, tile_settings) -> None:
    before = contents(finished)
    ran = fmsuite("pretrain", *tile_settings("mae"), "--data", tiles, "--out", finished)
    assert ran.code == 2
    assert "there is a run in this folder already" in ran.text
    assert "--resume" in ran.text
    assert contents(finished) == before


def test_resuming_where_no_run_is_does_not_begin_one(fmsuite, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = fmsuite("pretrain", "--domain", "pathology", "--out", "misspelt", "--resume")
    assert ran.code == 2
    assert "misspelt" in ran.text
    assert list(tmp_path.iterdir()) == []


def test_resuming_a_finished_run_says_so_and_keeps_its_encoder(fmsuite, finished: Path) -> None:
    before = (finished / "encoder.json").read_bytes()
    weights = load_file(finished / "encoder.safetensors")
    ran = fmsuite("pretrain", "--domain", "pathology", "--out", finished, "--resume")
    assert ran.code == 0
    assert "The run is complete" in ran.text
    assert (finished / "encoder.json").read_bytes() == before
    for name, weight in load_file(finished / "encoder.safetensors").items():
        assert torch.equal(weight, weights[name]), name
    assert len(yaml.safe_load((finished / "run.json").read_text())["starts"]) == 2


@pytest.fixture
def _file_size_limit() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("_file_size_limit")
def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_one_before(
    fmsuite, tiles, tile_settings, facts_of, tmp_path, monkeypatch
) -> None:
    changes = {"training.steps": 6, "training.checkpoint_every": 2, "training.keep_checkpoints": 1}
    arguments = [*tile_settings("mae", changes), "--data", tiles]
    assert fmsuite("pretrain", *arguments, "--out", tmp_path / "whole").code == 0
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    class FillTheDiskAfterwards(saver.Writer):
        def finish(self, **given: object) -> None:
            super().finish(**given)
            size = max(path.stat().st_size for path in self.target.iterdir())
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))

    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(saver, "Writer", FillTheDiskAfterwards)
        ran = fmsuite("pretrain", *arguments, "--out", run)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert ran.code == 1
    assert "step-00000004: the checkpoint could not be written" in ran.text
    assert "step-00000002 is intact" in ran.text
    assert "--resume to continue from step 2" in ran.text
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    ran = fmsuite("pretrain", "--domain", "pathology", "--out", run, "--resume")
    assert ran.code == 0, ran.text
    assert_equal_runs(facts_of(run), facts_of(tmp_path / "whole"))


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_is_used(
    fmsuite, tiles, tile_settings, facts_of, tmp_path
) -> None:
    run = tmp_path / "run"
    assert fmsuite("pretrain", *tile_settings("mae"), "--data", tiles, "--out", run).code == 0
    expected = facts_of(run)
    newest = max((run / "checkpoints").glob("step-*"))
    (data,) = newest.glob("*.distcp")
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    ran = fmsuite("pretrain", "--domain", "pathology", "--out", run, "--resume")
    assert ran.code == 0, ran.text
    assert f"{newest.name}: not a readable checkpoint" in ran.text
    assert "Resuming after step 4 of 6" in ran.text
    assert_equal_runs(facts_of(run), expected)
