"""SampleIndex: what is written comes back, the hash sees every change, broken files are refused by name."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsuite.core.data.index import SCHEMA, SampleIndex, Window
from fmsuite.errors import FmsuiteError, UsageError

WINDOWS = [
    Window("/s/a.svs", "a", (0.0, 10.5), (512.0, 512.0), (0.25, 0.25), 0.5, "tumour", "train"),
    Window("/s/a.svs", "a", (512.0, 0.0), (512.0, 512.0), (0.25, 0.25), 0.75, None, "train"),
    Window("/s/b.svs", "b", (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), (), 1.0, "normal", None),
]

floats = st.floats(0, 1e6)
windows = st.builds(
    Window,
    source=st.text(min_size=1, max_size=8),
    group=st.text(min_size=1, max_size=4),
    position=st.tuples(floats, floats),
    extent=st.tuples(floats, floats),
    spacing=st.just(()) | st.tuples(floats, floats),
    content=st.floats(0, 1, width=32),
    label=st.none() | st.text(max_size=4),
    split=st.none() | st.sampled_from(["train", "test"]),
)


@settings(deadline=None, max_examples=40)
@given(rows=st.lists(windows, max_size=8))
def test_rows_come_back_from_memory_and_from_disk(rows: list[Window], tmp_path_factory: pytest.TempPathFactory) -> None:
    index = SampleIndex.from_windows(rows, {"domain": "x"})
    path = tmp_path_factory.mktemp("index") / "index.parquet"
    index.write(path)
    again = SampleIndex.read(path)
    assert [again[i] for i in range(len(again))] == rows
    assert [index[i] for i in range(len(index))] == rows
    assert again.hash == index.hash
    assert again.metadata == {"domain": "x"}


def test_the_hash_sees_every_column_and_the_order() -> None:
    changes = [
        {"source": "/s/c.svs"},
        {"group": "c"},
        {"position": (0.0, 10.25)},
        {"extent": (512.0, 513.0)},
        {"spacing": ()},
        {"content": 0.25},
        {"label": None},
        {"split": "test"},
    ]
    assert {name for change in changes for name in change} == set(SCHEMA.names)
    hashes = {SampleIndex.from_windows(WINDOWS).hash, SampleIndex.from_windows(WINDOWS[::-1]).hash}
    for change in changes:
        hashes.add(SampleIndex.from_windows([dataclasses.replace(WINDOWS[0], **change), *WINDOWS[1:]]).hash)
    assert len(hashes) == len(changes) + 2


@pytest.mark.parametrize("rows", [1, 2, 1 << 16])
def test_the_hash_does_not_see_how_rows_are_stored(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr("fmsuite.core.data.index._HASHED_ROWS", rows)
    whole = SampleIndex.from_windows(WINDOWS)
    pieces = pa.concat_tables([SampleIndex.from_windows([window]).table for window in WINDOWS])
    assert SampleIndex(pieces, {"other": 1}).hash == whole.hash
    shuffled = SampleIndex.from_windows(WINDOWS[::-1]).select([2, 1, 0])
    assert shuffled.hash == whole.hash
    assert whole.select([0, 1]).hash == SampleIndex.from_windows(WINDOWS[:2]).hash


def test_labels_are_numbered_by_name_and_absent_ones_are_minus_one() -> None:
    index = SampleIndex.from_windows(WINDOWS)
    assert index.label_names == ["normal", "tumour"]
    assert [index.label_code(row) for row in range(3)] == [1, -1, 0]


def test_filters_keep_metadata_and_order() -> None:
    index = SampleIndex.from_windows(WINDOWS, {"domain": "x"})
    train = index.where("split", "train")
    assert [train[i] for i in range(len(train))] == WINDOWS[:2]
    assert train.metadata == {"domain": "x"}
    assert index.sources == ["/s/a.svs", "/s/b.svs"]
    assert train.groups == ["a"]
    assert train.sources == ["/s/a.svs"]


def test_a_failed_write_leaves_the_old_index_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "index.parquet"
    SampleIndex.from_windows(WINDOWS).write(path)

    def full_disk(table: pa.Table, where: os.PathLike, **options: object) -> None:
        Path(where).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full_disk)
    with pytest.raises(OSError, match="No space"):
        SampleIndex.from_windows(WINDOWS[:1]).write(path)
    assert os.listdir(tmp_path) == ["index.parquet"]
    assert len(SampleIndex.read(path)) == 3


@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "flipped"])
def test_damaged_files_are_refused_by_name(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "index.parquet"
    SampleIndex.from_windows(WINDOWS * 50).write(path)
    blob = path.read_bytes()
    footer = blob[:-400] + bytes(b ^ 0x5A for b in blob[-400:-8]) + blob[-8:]
    path.write_bytes(
        {"empty": b"", "garbage": b"x" * 500, "truncated": blob[: len(blob) // 2], "flipped": footer}[damage]
    )
    with pytest.raises(FmsuiteError, match=r"index\.parquet"):
        SampleIndex.read(path)


def test_missing_files_and_other_tables_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such index"):
        SampleIndex.read(tmp_path / "absent.parquet")
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"source": ["a"], "x": [1]}), other)
    with pytest.raises(UsageError, match=r"other\.parquet: not a sample index, it lacks group"):
        SampleIndex.read(other)


def test_an_index_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    index = SampleIndex.from_windows(WINDOWS)
    pq.write_table(index.table.replace_schema_metadata({b"fmsuite": b'{"format": 99}'}), tmp_path / "new.parquet")
    with pytest.raises(FmsuiteError, match="newer"):
        SampleIndex.read(tmp_path / "new.parquet")


def test_columns_of_a_wrong_type_are_refused_by_name(tmp_path: Path) -> None:
    table = SampleIndex.from_windows(WINDOWS).table
    position = table.schema.get_field_index("position")
    pq.write_table(table.set_column(position, "position", pa.array(["a", "b", "c"])), tmp_path / "typed.parquet")
    with pytest.raises(FmsuiteError, match=r"typed\.parquet"):
        SampleIndex.read(tmp_path / "typed.parquet")
