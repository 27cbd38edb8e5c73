"""Parts of an index that is being built."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fmsuite.core.data.skipped import Skipped
from fmsuite.errors import FmsuiteError
from fmsuite.tiling.labels import SourceLabel
from fmsuite.tiling.parts import PartStore, discard_parts
from fmsuite.tiling.table import windows_table
from fmsuite.tiling.tasks import SourceRows, SourceTask

FACTS = {"mpp": 0.25, "vendor": "aperio"}
NOTE = Skipped("slide.svs", "tissue", "a corner is missing")


@pytest.fixture
def task(tmp_path: Path) -> SourceTask:
    path = tmp_path / "slide.svs"
    path.write_bytes(b"pixels")
    return SourceTask(str(path), "slide", SourceLabel(label="tumour"))


def found(task: SourceTask, first: float = 0.0) -> SourceRows:
    return SourceRows(task.rows(np.array([[first, 1.5], [2.0, 3.5]]), (4.0, 4.0)), FACTS, (NOTE,))


def kept(folder: Path | None, task: SourceTask, decided_by: object = None) -> PartStore:
    store = PartStore(folder, decided_by)
    store.add(store.key(task), found(task))
    store.flush()
    return store


def test_a_finished_source_is_found_again_as_it_was(tmp_path: Path, task: SourceTask) -> None:
    kept(tmp_path / "parts", task)
    store = PartStore(tmp_path / "parts", None)
    again = store.get(store.key(task))
    assert again is not None
    assert (again.rows, again.facts, again.notes) == (2, FACTS, (NOTE,))
    (table,) = store.tables([store.key(task)])
    rows = found(task).rows
    assert rows is not None
    expected = windows_table([rows])
    assert table.to_pylist() == expected.to_pylist()
    assert table.schema == expected.schema


@pytest.mark.parametrize("change", ["options", "label", "details", "bytes", "time", "other bytes", "damage", "gone"])
def test_what_changed_is_looked_at_again(tmp_path: Path, task: SourceTask, change: str) -> None:
    folder, other = tmp_path / "parts", tmp_path / "other.svs"
    other.write_bytes(b"more")
    task = replace(task, others=(str(other),))
    kept(folder, task, {"size": 4})
    if change == "bytes":
        Path(task.path).write_bytes(b"other pixels")
    if change == "other bytes":
        other.write_bytes(b"even more")
    if change == "time":
        os.utime(task.path, (1, 1))
    if change == "gone":
        Path(task.path).unlink()
    if change == "damage":
        (part,) = folder.iterdir()
        part.write_bytes(part.read_bytes()[:40])
    asked = replace(task, known=SourceLabel(label="stroma")) if change == "label" else task
    asked = replace(asked, details=1) if change == "details" else asked
    store = PartStore(folder, {"size": 8 if change == "options" else 4})
    assert store.get(store.key(asked)) is None


def test_small_sources_share_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmsuite.tiling.parts.SEGMENT_S", 1e9)
    store = PartStore(tmp_path / "parts", None)
    tasks = [SourceTask(f"/{number}", str(number)) for number in range(3000)]
    for number, task in enumerate(tasks):
        store.add(store.key(task), found(task, number))
    store.flush()
    assert len(list((tmp_path / "parts").iterdir())) == 3
    again = PartStore(tmp_path / "parts", None)
    order = np.random.default_rng(0).permutation(3000)
    sources = [s for table in again.tables(again.key(tasks[n]) for n in order) for s in table["source"].to_pylist()]
    assert sources == [f"/{number}" for number in order for _ in range(2)]


def test_a_source_that_waits_for_others_has_facts_and_no_rows(tmp_path: Path, task: SourceTask) -> None:
    store = PartStore(tmp_path / "parts", None)
    store.add(store.key(task), SourceRows(None, FACTS))
    store.flush()
    again = PartStore(tmp_path / "parts", None)
    waiting = again.get(again.key(task))
    assert waiting is not None
    assert waiting.rows is None
    assert waiting.facts == FACTS
    assert list(again.tables([again.key(task)])) == []


def test_rows_that_were_damaged_later_are_an_error_that_says_what_to_do(tmp_path: Path, task: SourceTask) -> None:
    store = kept(tmp_path / "parts", task)
    (part,) = (tmp_path / "parts").iterdir()
    part.unlink()
    with pytest.raises(FmsuiteError, match=r"Remove .*parts and begin again"):
        list(store.tables([store.key(task)]))


def test_without_a_folder_parts_live_as_long_as_the_store(tmp_path: Path, task: SourceTask) -> None:
    store = kept(None, task)
    assert sum(table.num_rows for table in store.tables([store.key(task)])) == 2
    assert PartStore(None, None).get(store.key(task)) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["slide.svs"]


def test_parts_are_removed_when_they_have_served(tmp_path: Path, task: SourceTask) -> None:
    kept(tmp_path / "parts", task)
    discard_parts(tmp_path / "parts")
    assert not (tmp_path / "parts").exists()
