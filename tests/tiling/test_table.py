"""Columns of windows against rows of windows."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.tiling.table import WindowRows, join_tables, spread_rows, windows_by_source, windows_table


def table_of(*columns: Any) -> pa.Table:
    return windows_table([WindowRows(*columns)])


def test_tables_equal_the_index_made_from_single_windows(tmp_path: Path) -> None:
    positions = np.array([[0.0, 1.5], [2.0, 3.25], [4.0, 5.0]])
    content = np.array([0.25, 0.5, 1.0])
    tables = [
        table_of("/a.svs", "p1", positions, (8.5, 9.0), (0.5, 0.25), content, "tumour", "train"),
        table_of("/b.svs", "p2", positions[:1], (8.0, 8.0)),
        table_of("/c.svs", "p1", positions[:0], (8.0, 8.0)),
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


def test_rows_of_one_source_may_have_groups_labels_and_sides_of_their_own() -> None:
    positions = np.array([[0.0, 1.5], [2.0, 3.25], [4.0, 5.0]])
    tables = windows_table(
        [
            WindowRows(
                "/a", ["g", "h", "g"], positions, (8.0, 8.0), label=["x", None, "y"], split=[None, "test", None]
            ),
            WindowRows("/b", "h", positions[:2], (8.0, 8.0), label="x"),
        ]
    )
    index = join_tables([tables], {})
    found = [(w.source, w.group, w.label, w.split) for w in map(index.__getitem__, range(5))]
    assert found == [
        ("/a", "g", "x", None),
        ("/a", "h", None, "test"),
        ("/a", "g", "y", None),
        ("/b", "h", "x", None),
        ("/b", "h", "x", None),
    ]


def test_rows_of_sources_that_differ_in_everything_stand_one_after_the_other() -> None:
    rows = [
        WindowRows("/a", "g", np.zeros((0, 2)), (1.0, 1.0)),
        WindowRows("/b", "g", np.array([[1.0, 2.0], [3.0, 4.0]]), (8.0, 9.0), (0.5, 0.25), np.array([0.5, 1]), "x"),
        WindowRows("/c", "h", np.array([[5.0, 6.0, 7.0]]), (1.0, 2.0, 3.0), split="test"),
    ]
    whole = join_tables([windows_table(rows)], {})
    assert [whole[row] for row in range(len(whole))] == [
        Window("/b", "g", (1.0, 2.0), (8.0, 9.0), (0.5, 0.25), 0.5, "x"),
        Window("/b", "g", (3.0, 4.0), (8.0, 9.0), (0.5, 0.25), 1.0, "x"),
        Window("/c", "h", (5.0, 6.0, 7.0), (1.0, 2.0, 3.0), split="test"),
    ]


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_how_tables_are_cut_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    random = np.random.default_rng(batch)
    labels = [None, "a", "b"]
    rows = [
        WindowRows(f"/{n}", f"g{n % 4}", random.uniform(0, 9, (n * 5 % 13, 2)), (n, n), (), 0.5, labels[n % 3])
        for n in range(40)
    ]
    monkeypatch.setattr("fmsuite.tiling.table._BATCH_ROWS", batch)
    written = []
    for number, cuts in enumerate([[], [20], sorted(random.choice(40, 9, replace=False).tolist()), range(40)]):
        edges = [0, *cuts, 40]
        tables = [windows_table(rows[a:b]) for a, b in itertools.pairwise(edges)]
        # The rows of what is not asked for stand in the same tables.
        more = pa.concat_tables([windows_table([WindowRows("/x", "y", np.ones((3, 2)), (1, 1))]), *tables])
        tables = tables if number % 2 else [more.unify_dictionaries().combine_chunks().slice(3)]
        index = join_tables(iter(tables), {"a": 1}, tmp_path / "rows" if number < 3 else None)
        index.write(tmp_path / f"{number}.parquet")
        written.append((tmp_path / f"{number}.parquet").read_bytes())
        assert index.sources == [each.source for each in rows if len(each)]
    assert len(set(written)) == 1


def test_rows_in_a_file_outlive_it(tmp_path: Path) -> None:
    index = join_tables([table_of("/a", "g", np.ones((3, 2)), (1, 1))], {}, tmp_path / "rows")
    before = index.hash
    (tmp_path / "rows").unlink()
    assert index.hash == before
    assert index[2].position == (1.0, 1.0)


def test_no_tables_make_an_index_without_rows() -> None:
    index = join_tables([], {"domain": "x"})
    assert len(index) == 0
    assert index.metadata == {"domain": "x"}
    assert list(windows_by_source(index)) == []


def test_windows_come_source_by_source_in_the_order_of_the_index() -> None:
    random = np.random.default_rng(0)
    positions = {name: random.uniform(0, 100, (5, 3)) for name in ("/b", "/a", "/c")}
    whole = join_tables([table_of(name, name[1:], places, (8, 8, 8)) for name, places in positions.items()], {})
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
