"""Index rows of a whole source at once, as columns: a cohort of a hundred million windows needs no object a window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from fmsuite.core.data.index import SCHEMA, SampleIndex, Window


def window_table(
    source: str,
    group: str,
    positions: np.ndarray,
    extent: Sequence[float],
    spacing: Sequence[float] = (),
    content: np.ndarray | float = 1.0,
    label: str | None = None,
    split: str | None = None,
) -> pa.Table:
    """Rows of one source, whose windows all have one size.

    Args:
        source, group, label, split: as in ``core.data.index.Window``, the same for every row.
        positions: (N, A) corners in the source's finest coordinates.
        extent: (A,) size of every window, same coordinates.
        spacing: (A,) physical length of one unit; empty where unknown.
        content: (N,) or one number.

    Returns:
        A table with the columns of ``core.data.index.SCHEMA``.
    """
    count = len(positions)

    def text(value: str | None) -> pa.Array:
        codes = pa.array(np.zeros(count, np.int32), mask=np.full(count, value is None))
        return pa.DictionaryArray.from_arrays(codes, pa.array([] if value is None else [value], pa.string()))

    def numbers(values: np.ndarray) -> pa.Array:
        offsets = np.arange(count + 1, dtype=np.int32) * values.shape[1]
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.ascontiguousarray(values).reshape(-1)))

    def repeated(values: Sequence[float]) -> np.ndarray:
        return np.tile(np.asarray(values, dtype=np.float64), (count, 1))

    columns = {
        "source": text(source),
        "group": text(group),
        "position": numbers(np.asarray(positions, dtype=np.float64)),
        "extent": numbers(repeated(extent)),
        "spacing": numbers(repeated(spacing)),
        "content": pa.array(np.broadcast_to(np.asarray(content, dtype=np.float32), (count,)).copy()),
        "label": text(label),
        "split": text(split),
    }
    return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def join_tables(tables: Sequence[pa.Table], metadata: dict[str, Any]) -> SampleIndex:
    """One index of many sources' rows, in the given order; of none, an index without rows."""
    if not tables:
        return SampleIndex.from_windows([], metadata)
    table = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
    return SampleIndex(table.cast(SCHEMA), metadata)


@dataclass(frozen=True)
class SourceWindows:
    """The windows of one source.

    Attributes:
        first: the first of them.
        positions: (N, A) corners of all of them, in the index's order.
    """

    first: Window
    positions: np.ndarray


def windows_by_source(index: SampleIndex) -> Iterator[SourceWindows]:
    """The windows of each source of an index made by ``window_table``, sources in the order of their first windows."""
    if not len(index):
        return
    column = index.table.column("source").cast(pa.string()).to_numpy(zero_copy_only=False)
    names, first, codes = np.unique(column, return_index=True, return_inverse=True)
    positions = np.asarray(index.table.column("position").combine_chunks().flatten()).reshape(len(index), -1)
    order = np.argsort(codes, kind="stable")
    edges = np.searchsorted(codes[order], np.arange(len(names) + 1))
    for code in np.argsort(first):
        yield SourceWindows(index[int(first[code])], positions[order[edges[code] : edges[code + 1]]])


def spread_rows(length: int, count: int) -> np.ndarray:
    """At most ``count`` of ``length`` rows, evenly spread: (K,) int64, ascending, without repetition."""
    if length <= count:
        return np.arange(length)
    return np.unique(np.linspace(0, length - 1, count).round().astype(np.int64))
