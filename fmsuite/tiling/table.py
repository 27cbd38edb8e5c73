"""Index rows of a whole source at once, as columns: a cohort of a hundred million windows needs no object a window."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fmsuite.core.data.index import SCHEMA, SampleIndex, Window

_BATCH_ROWS = 1 << 16


@dataclass(frozen=True)
class WindowRows:
    """Rows of one source.

    Attributes:
        source: as in ``core.data.index.Window``.
        group, label, split: as there, the same for every row or one for each of the N.
        positions: (N, A) corners in the source's finest coordinates.
        extent: (A,) size of every window, same coordinates.
        spacing: (A,) physical length of one unit; empty where unknown.
        content: (N,) or one number.
    """

    source: str
    group: str | Sequence[str]
    positions: np.ndarray
    extent: Sequence[float]
    spacing: Sequence[float] = ()
    content: np.ndarray | float = 1.0
    label: str | Sequence[str | None] | None = None
    split: str | Sequence[str | None] | None = None

    def __len__(self) -> int:
        return len(self.positions)


NO_ROWS = WindowRows("", "", np.zeros((0, 0)), ())


def windows_table(rows: Sequence[WindowRows]) -> pa.Table:
    """Rows of one source after the other, with the columns of ``core.data.index.SCHEMA``."""
    rows = [each for each in rows if len(each)] or [NO_ROWS]
    counts = np.array([len(each) for each in rows])

    def texts(values: Sequence[str | Sequence[str | None] | None]) -> pa.Array:
        names: dict[str, int] = {}
        parts = [np.zeros(0, np.int32)]
        for value, count in zip(values, counts, strict=True):
            known = [value] if value is None or isinstance(value, str) else value
            found = np.array([-1 if name is None else names.setdefault(name, len(names)) for name in known], np.int32)
            parts.append(found.repeat(count if known is not value else 1))
        codes = np.concatenate(parts)
        return pa.DictionaryArray.from_arrays(pa.array(codes, mask=codes < 0), pa.array(list(names), pa.string()))

    def lists(values: Sequence[np.ndarray]) -> pa.Array:
        lengths = np.array([value.shape[1] for value in values]).repeat(counts)
        offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
        flat = np.concatenate([np.asarray(value, dtype=np.float64).reshape(-1) for value in values])
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))

    def repeated(value: Sequence[float], count: int) -> np.ndarray:
        return np.broadcast_to(np.asarray(value, dtype=np.float64), (count, len(value)))

    content = [np.broadcast_to(np.asarray(each.content, dtype=np.float32), (len(each),)) for each in rows]
    columns = {
        "source": texts([each.source for each in rows]),
        "group": texts([each.group for each in rows]),
        "position": lists([np.asarray(each.positions) for each in rows]),
        "extent": lists([repeated(each.extent, len(each)) for each in rows]),
        "spacing": lists([repeated(each.spacing, len(each)) for each in rows]),
        "content": pa.array(np.concatenate(content)),
        "label": texts([each.label for each in rows]),
        "split": texts([each.split for each in rows]),
    }
    return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def join_tables(tables: Iterable[pa.Table], metadata: dict[str, Any], file: Path | None = None) -> SampleIndex:
    """One index of many sources' rows, in the given order; of none, an index without rows.

    The tables are taken one by one. How they were cut has no influence on what comes out.

    Args:
        file: where to put the rows. They are then read from there when they are needed, and take no memory; the file
            may be removed once the index is open. ``None`` keeps them in memory.
    """
    names: dict[str, dict[str, int]] = {entry.name: {} for entry in SCHEMA if pa.types.is_dictionary(entry.type)}
    coded = pa.schema([(entry.name, pa.int32() if entry.name in names else entry.type) for entry in SCHEMA])
    with pa.BufferOutputStream() if file is None else pa.OSFile(str(file), "wb") as sink:
        with pa.ipc.new_file(sink, coded) as writer:
            for batch in _batches(tables, _BATCH_ROWS):
                writer.write_table(_coded(batch, names, coded))
        stored = sink.getvalue() if file is None else None
    table = pa.ipc.open_file(pa.memory_map(str(file)) if stored is None else stored).read_all()
    columns = [_named(table.column(name), names.get(name)) for name in SCHEMA.names]
    return SampleIndex(pa.table(columns, schema=SCHEMA), metadata)


def _batches(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of ``rows`` each, but for the last."""
    waiting: list[pa.Table] = []
    count = 0
    for table in tables:
        waiting.append(table)
        count += table.num_rows
        if count < rows:
            continue
        whole = pa.concat_tables(waiting)
        for start in range(0, count - rows + 1, rows):
            yield whole.slice(start, rows)
        left = count % rows
        waiting, count = [whole.slice(count - left)] if left else [], left
    if count:
        yield pa.concat_tables(waiting)


def _coded(table: pa.Table, names: dict[str, dict[str, int]], schema: pa.Schema) -> pa.Table:
    """With numbers for texts; ``names`` grows by those met for the first time, in the order of the rows."""
    table = table.unify_dictionaries().combine_chunks()
    columns = []
    for name in schema.names:
        column = table.column(name).combine_chunks()
        if name in names:
            texts, known = column.dictionary.to_pylist(), names[name]
            numbers = np.zeros(len(texts) + 1, np.int32)
            for code in pc.unique(column.indices.drop_null()).to_pylist():
                numbers[code] = known.setdefault(texts[code], len(known))
            codes = column.indices.fill_null(len(texts)).to_numpy()
            column = pa.array(numbers[codes], mask=column.is_null().to_numpy(zero_copy_only=False))
        columns.append(column)
    return pa.table(columns, schema=schema)


def _named(column: pa.ChunkedArray, names: dict[str, int] | None) -> pa.ChunkedArray:
    if names is None:
        return column
    texts = pa.array(list(names), pa.string())
    kind = pa.dictionary(pa.int32(), pa.string())
    return pa.chunked_array([pa.DictionaryArray.from_arrays(chunk, texts) for chunk in column.chunks], kind)


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
    """The windows of each source of an index, sources in the order of their first windows."""
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
