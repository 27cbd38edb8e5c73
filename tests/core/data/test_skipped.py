"""skipped.csv: appended line by line, each line once, read back after a restart."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from fmsuite.core.data.skipped import SkippedLog
from fmsuite.errors import FmsuiteError, ReadFailure


def test_lines_are_on_disk_as_soon_as_they_are_added(tmp_path: Path) -> None:
    log = SkippedLog(tmp_path / "run" / "skipped.csv")
    log.add("/a,b.svs", "open", 'not a\n "slide"')
    log.add("/c.svs", "read", "damaged")
    with (tmp_path / "run" / "skipped.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["path", "stage", "reason"],
            ["/a,b.svs", "open", 'not a "slide"'],
            ["/c.svs", "read", "damaged"],
        ]


def test_the_same_line_is_written_once_even_across_restarts(tmp_path: Path) -> None:
    path = tmp_path / "skipped.csv"
    for _ in range(2):
        log = SkippedLog(path)
        log.add("/a.svs", "open", "damaged")
        log.add("/a.svs", "open", "damaged")
    assert len(path.read_text().splitlines()) == 2
    assert len(log) == 1


def test_no_file_appears_while_nothing_is_skipped(tmp_path: Path) -> None:
    assert SkippedLog(tmp_path / "skipped.csv").summary() == ""
    assert not (tmp_path / "skipped.csv").exists()


def test_a_line_cut_off_by_a_crash_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "skipped.csv"
    path.write_text("path,stage,reason\n/a.svs,open,damaged\n/b.sv")
    log = SkippedLog(path)
    assert [entry.path for entry in log.entries] == ["/a.svs"]
    log.add("/c.svs", "open", "damaged")
    assert [entry.path for entry in SkippedLog(path).entries] == ["/a.svs", "/c.svs"]


def test_order_is_kept_across_restarts(tmp_path: Path) -> None:
    path = tmp_path / "skipped.csv"
    first = SkippedLog(path)
    for number in range(20):
        first.add(f"/{number}.svs", "open", "damaged")
    assert SkippedLog(path).entries == first.entries


def test_strict_raises_and_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(FmsuiteError, match=r"/a\.svs: damaged"):
        SkippedLog(tmp_path / "skipped.csv", strict=True).add("/a.svs", "open", "damaged")


def test_the_summary_counts_by_stage() -> None:
    log = SkippedLog()
    log.add_failure(ReadFailure("/a.svs", "open", "damaged.", "Copy it again."))
    log.add("/b.svs", "read", "x")
    log.add("/c.svs", "read", "y")
    assert log.summary() == "3 skipped (2 at read, 1 at open)."
    assert log.entries[0].reason == "damaged. Copy it again."
