"""Columns of windows against rows of windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.tiling.table import join_tables, window_table


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
