from __future__ import annotations

import builtins
import errno
import json
import logging
from pathlib import Path

import pytest

from fmsuite.core.training.metrics import MetricsLog, read_metrics
from fmsuite.errors import FmsuiteError


def test_lines_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (1, 2, 3, 4):
        log.write(step, {"loss": step / 2})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    log = MetricsLog(path, start_step=2)
    log.write(3, {"loss": 9.0})
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 9.0}]
    assert list(read_metrics(path)) == lines


def test_lines_are_on_the_disk_as_soon_as_they_are_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, {"loss": 0.5})
    assert next(read_metrics(tmp_path / "metrics.jsonl")) == {"step": 1, "loss": 0.5}
    log.close()


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard")
    log.write(3, {"loss": 0.5, "features/collapse": "yes"})
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.5)]


def test_without_tensorboard_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = builtins.__import__

    def absent(name: str, *arguments: object, **options: object) -> object:
        if name == "torch.utils.tensorboard":
            raise ImportError(name)
        return real(name, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", absent)
    with caplog.at_level(logging.INFO, "fmsuite"):
        log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard")
    log.write(1, {"loss": 0.5})
    log.close()
    assert [record.message for record in caplog.records if "TensorBoard is not installed" in record.message]
    assert not (tmp_path / "tensorboard").exists()


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log._file = full.open("a")
    with pytest.raises(FmsuiteError, match=r"metrics\.jsonl: cannot be written \(No space left") as error:
        log.write(1, {"loss": 0.5})
    cause = error.value.__cause__
    assert isinstance(cause, OSError)
    assert cause.errno == errno.ENOSPC
