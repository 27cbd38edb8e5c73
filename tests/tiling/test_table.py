"""Columns of windows against rows of windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.tiling.table import join_tables, spread_rows, window_table, windows_by_source


def test_tables_equal_the_index_made_from_single_windows(tmp_path: Path) -> None:
    positions = np.array([[0.0, 1.5], [2.0, 3.25], [4.0, 5.0]])
    content = np.array([0.25, 0.5, 1.0])
    tables = [
        window_table("/a.svs", "p1", positions, (8.5, 9.0), (0.5, 0.25), content, "tumour", "train"),
        window_table("/b.svs", "p2", positions[:1], (8.0, 8.0)),
        window_table("/c.svs", "p1", positions[:0], (8.0, 8.0)),
    ]
    index = join_tables(tables, {"domain": "x"})
    rows = [
        Window("/a.svs", "p1", tuple(p), (8.5, 9.0), (0.5, 0.25), float(c), "tumour", "train")
        for p, c in zip(positions.tolist(), content, strict=True)
    ]
    expected = SampleIndex.from_windows([*rows, Window("/b.svs", "p2", (0.0, 1.5), (8.0, 8.0))])
    assert index.hash == expected.hash
    assert [index[i] for i in range(4)] == [expected[i] for i in range(4)]
    assert index.label_code(0) == 0
    assert index.label_code(3) == -1
    index.write(tmp_path / "i.parquet")
    assert SampleIndex.read(tmp_path / "i.parquet").hash == expected.hash


def test_no_tables_make_an_index_without_rows() -> None:
    index = join_tables([], {"domain": "x"})
    assert len(index) == 0
    assert index.metadata == {"domain": "x"}
    assert list(windows_by_source(index)) == []


def test_windows_come_source_by_source_in_the_order_of_the_index() -> None:
    random = np.random.default_rng(0)
    positions = {name: random.uniform(0, 100, (5, 3)) for name in ("/b", "/a", "/c")}
    whole = join_tables([window_table(name, name[1:], places, (8, 8, 8)) for name, places in positions.items()], {})
    mixed = whole.select(random.permutation(15))
    found = list(windows_by_source(mixed))
    rows = [mixed[row] for row in range(15)]
    assert [windows.first for windows in found] == [
        next(row for row in rows if row.source == name) for name in dict.fromkeys(row.source for row in rows)
    ]
    for windows in found:
        expected = [row.position for row in rows if row.source == windows.first.source]
        np.testing.assert_array_equal(windows.positions, expected)


def test_rows_are_spread_over_the_whole_index() -> None:
    assert list(spread_rows(3, 10)) == [0, 1, 2]
    rows = spread_rows(1000, 10)
    assert (rows[0], rows[-1], len(rows)) == (0, 999, 10)
    assert set(np.diff(rows)) == {111}
