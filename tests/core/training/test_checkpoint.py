from __future__ import annotations

import errno
import logging
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fmsuite.core.training import checkpoint as module
from fmsuite.core.training.checkpoint import Checkpoint, Plan, find_latest, list_checkpoints, save_checkpoint
from fmsuite.errors import FmsuiteError
from tests.core.training.helpers import ROOT, final_state, make_config, run_toy


def make_checkpoint(step: int, values: int = 1000) -> Checkpoint:
    return Checkpoint(step, {"seed": 0}, Plan(100, 10), {"weight": torch.full((values,), float(step))}, {"state": {}})


def test_the_newest_is_found_and_only_the_last_ones_stay(tmp_path: Path) -> None:
    for step in (5, 10, 100, 20):
        save_checkpoint(tmp_path, make_checkpoint(step), keep=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-00000100.pt",
        "step-00000020.pt",
        "step-00000010.pt",
    ]
    latest = find_latest(tmp_path)
    assert latest is not None
    assert (latest.step, latest.plan) == (100, Plan(100, 10))
    assert latest.objective["weight"][0] == 100


def test_no_checkpoint_at_all_is_none(tmp_path: Path) -> None:
    assert find_latest(tmp_path) is None
    (tmp_path / ".step-00000005.pt.partial").write_bytes(b"half")
    assert find_latest(tmp_path) is None


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_newest_falls_back_and_is_named(
    tmp_path: Path, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tmp_path, make_checkpoint(5), keep=3)
    newest = save_checkpoint(tmp_path, make_checkpoint(10), keep=3)
    content = newest.read_bytes()
    newest.write_bytes(content[: int(len(content) * share)])
    with caplog.at_level(logging.WARNING, "fmsuite"):
        latest = find_latest(tmp_path)
    assert latest is not None
    assert latest.step == 5
    assert "step-00000010.pt" in caplog.text


def test_files_that_are_no_checkpoints_do_not_resume(tmp_path: Path) -> None:
    (tmp_path / "step-00000007.pt").write_bytes(b"not a checkpoint")
    torch.save([1, 2], tmp_path / "step-00000008.pt")
    with pytest.raises(FmsuiteError, match="none of the 2 checkpoints can be read"):
        find_latest(tmp_path)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"format": 1, "objective": Hostile()}, tmp_path / "step-00000001.pt")
    with pytest.raises(FmsuiteError, match="none of the 1"):
        find_latest(tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("at", ["write", "fsync", "replace"])
def test_a_full_disk_keeps_the_last_good_one_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    save_checkpoint(tmp_path, make_checkpoint(5), keep=1)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if at == "write":
        monkeypatch.setattr(module._WriteRecorder, "write", full)
    else:
        monkeypatch.setattr(module.os, at, full)
    with pytest.raises(FmsuiteError) as error:
        save_checkpoint(tmp_path, make_checkpoint(10), keep=1)
    monkeypatch.undo()
    message = str(error.value)
    assert "No space left on device" in message
    assert "step-00000005.pt is intact" in message
    assert "--resume to continue from step 5" in message
    assert os.listdir(tmp_path) == ["step-00000005.pt"]
    latest = find_latest(tmp_path)
    assert latest is not None
    assert latest.step == 5


def test_a_real_write_limit_is_reported_as_what_it_is(tmp_path: Path) -> None:
    # A file-size limit makes the kernel refuse the write half-way, as a full disk does.
    script = f"""
import resource, signal, torch
from pathlib import Path
from fmsuite.core.training.checkpoint import Checkpoint, Plan, save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path({str(tmp_path)!r})
save_checkpoint(folder, Checkpoint(5, {{}}, Plan(9, 9), {{"weight": torch.ones(10)}}, {{}}), keep=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, {resource.RLIM_INFINITY}))
save_checkpoint(folder, Checkpoint(8, {{}}, Plan(9, 9), {{"weight": torch.ones(10**6)}}, {{}}), keep=1)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert "FmsuiteError" in done.stderr.splitlines()[-1]
    assert "File too large" in done.stderr
    assert os.listdir(tmp_path) == ["step-00000005.pt"]


def test_a_run_whose_disk_filled_up_continues_where_the_message_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(12, checkpoint_every=4)
    run_toy(tmp_path / "whole", config)
    write = module._write_synced

    def full(path: Path, content: dict) -> None:
        if content["step"] == 8:
            path.write_bytes(b"half a checkpoint")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(module, "_write_synced", full)
    with pytest.raises(FmsuiteError, match="continue from step 4"):
        run_toy(tmp_path / "parts", config)
    monkeypatch.undo()
    assert os.listdir(tmp_path / "parts" / "checkpoints") == ["step-00000004.pt"]
    run_toy(tmp_path / "parts", config, resume=True)
    whole, parts = final_state(tmp_path / "whole", 12), final_state(tmp_path / "parts", 12)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
