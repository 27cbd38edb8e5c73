from __future__ import annotations

import io

import pytest
from rich.console import Console

from fmsuite.core.training import progress
from fmsuite.core.training.progress import console_progress, format_rate, format_seconds, silent


class Clock:
    def __init__(self, step: float) -> None:
        self.now, self.step = 100.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def show(monkeypatch: pytest.MonkeyPatch, terminal: bool, count: int, step: float) -> str:
    output = io.StringIO()
    monkeypatch.setattr(progress, "console", lambda: Console(file=output, force_terminal=terminal, width=80))
    monkeypatch.setattr(progress.time, "monotonic", Clock(step))
    assert list(console_progress(range(count), count, "tiling")) == list(range(count))
    return output.getvalue()


def test_plain_lines_have_count_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    # One look at the clock an item, four seconds apart: a line at every third item, and one at the end.
    lines = show(monkeypatch, terminal=False, count=7, step=4.0).splitlines()
    assert lines == [
        "tiling: 3/7, 15.0/min, 16 s left",
        "tiling: 6/7, 15.0/min, 4 s left",
        "tiling: 7/7, 13.1/min",
    ]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    output = show(monkeypatch, terminal=True, count=5, step=0.01)
    assert "tiling" in output
    assert "5/5" in output


def test_progress_ends_with_an_error_of_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken():  # type: ignore[no-untyped-def]
        yield 1
        raise ValueError("source")

    monkeypatch.setattr(progress, "console", lambda: Console(file=io.StringIO(), force_terminal=True))
    with pytest.raises(ValueError, match="source"):
        list(console_progress(broken(), 2, "reading"))


def test_silence_shows_nothing(capsys: pytest.CaptureFixture) -> None:
    assert list(silent(range(3), 3, "x")) == [0, 1, 2]
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_progress_goes_to_the_error_stream(capsys: pytest.CaptureFixture) -> None:
    list(console_progress(range(2), 2, "[tiling]"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("[tiling]: 2/2")


def test_rates_and_durations_read_well() -> None:
    assert [format_rate(r) for r in (None, 0.25, 3.21, 250.4)] == ["-/s", "15.0/min", "3.2/s", "250/s"]
    assert [format_seconds(s) for s in (4.4, 125, 12000)] == ["4 s", "2 min 05 s", "3 h 20 min"]
