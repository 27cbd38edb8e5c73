"""Finished sources, kept on disk while an index is being built: what dies on slide 4,812 of 5,000 goes on there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fmsuite import __version__
from fmsuite.core.data.skipped import Skipped
from fmsuite.errors import FmsuiteError
from fmsuite.tiling.table import windows_table
from fmsuite.tiling.tasks import SourceRows, SourceTask

_SOURCES_KEY = b"fmsuite sources"
_OPEN_SEGMENTS = 8
SEGMENT_ROWS = 1 << 16
SEGMENT_SOURCES = 1024
SEGMENT_S = 0.5
"""A file is written when so many rows or sources have been added, or so many seconds have gone by, since the last: a
slide has one of its own, and thousands of icons share one."""


@dataclass(frozen=True)
class Kept:
    """What is known of a source that was looked at; its rows are on disk.

    Attributes:
        rows: how many; ``None`` for a source without, which depends on others (``tasks.SourceRows``).
        facts, notes: as there.
        segment, start: where its rows are.
    """

    rows: int | None
    facts: dict[str, Any]
    notes: tuple[Skipped, ...]
    segment: int
    start: int


class PartStore:
    """Rows of sources that were looked at, by ``SourceTask.identity`` and all else that decided them.

    Args:
        folder: where the parts lie; ``None`` keeps them in memory, for as long as this object lives.
        decided_by: whatever the rows depend on beside the task, as JSON values. Parts of other decisions, or of another
            version of this package, are not found.
    """

    def __init__(self, folder: Path | None, decided_by: Any) -> None:
        self.folder = folder
        self._decided_by = _digest(json.dumps([__version__, decided_by], sort_keys=True))
        self._kept: dict[str, Kept] = {}
        self._segments: list[Path | pa.Table] = []
        self._open: OrderedDict[int, pa.Table] = OrderedDict()
        self._waiting: list[tuple[str, SourceRows]] = []
        self._waiting_rows = 0
        self._written = time.monotonic()
        for path in sorted(folder.glob(f"{self._decided_by}-*.parquet")) if folder is not None else ():
            self._take_over(path)

    @staticmethod
    def key(task: SourceTask) -> str:
        """By which a source is found."""
        return _digest(task.identity())

    def get(self, key: str) -> Kept | None:
        """What is known of a source; ``None`` if it has to be looked at (again)."""
        return self._kept.get(key)

    def add(self, key: str, found: SourceRows) -> None:
        """Keep a source's rows; they are on disk soon, and after ``flush``."""
        rows = None if found.rows is None else len(found.rows)
        # As they will be read back: a second start must not tell them from those of the first.
        facts = json.loads(json.dumps(found.facts))
        self._kept[key] = Kept(rows, facts, found.notes, len(self._segments), self._waiting_rows)
        self._waiting.append((key, found))
        self._waiting_rows += rows or 0
        late = self.folder is not None and time.monotonic() - self._written > SEGMENT_S
        if late or self._waiting_rows >= SEGMENT_ROWS or len(self._waiting) >= SEGMENT_SOURCES:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting; the file is whole or absent."""
        if not self._waiting:
            return
        table = windows_table([found.rows for _, found in self._waiting if found.rows is not None])
        if self.folder is None:
            self._segments.append(table)
        else:
            self._segments.append(self._write(table, self.folder))
        self._waiting, self._waiting_rows, self._written = [], 0, time.monotonic()

    def tables(self, keys: Iterable[str]) -> Iterator[pa.Table]:
        """The rows of sources in the given order; neighbours that were kept together come in one table.

        Raises:
            FmsuiteError: if a file is gone or damaged.
        """
        self.flush()
        segment, start, stop = 0, 0, 0
        for key in keys:
            kept = self._kept[key]
            if not kept.rows:
                continue
            if (kept.segment, kept.start) != (segment, stop):
                if stop > start:
                    yield self._table(segment).slice(start, stop - start)
                segment, start = kept.segment, kept.start
            stop = kept.start + kept.rows
        if stop > start:
            yield self._table(segment).slice(start, stop - start)

    def _write(self, table: pa.Table, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for key, found in self._waiting:
            rows = None if found.rows is None else len(found.rows)
            lines.append([key, rows, found.facts, [astuple(note) for note in found.notes]])
        path = folder / f"{self._decided_by}-{time.time_ns():020d}.parquet"
        partial = path.with_suffix(f".{os.getpid()}")
        described = table.replace_schema_metadata({_SOURCES_KEY: json.dumps(lines).encode()})
        pq.write_table(described, partial, compression="zstd")
        os.replace(partial, path)
        return path

    def _take_over(self, path: Path) -> None:
        """Add what an earlier process wrote. A damaged file is no loss: its sources are looked at again."""
        try:
            lines = json.loads(pq.read_schema(path).metadata[_SOURCES_KEY])
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
            return
        start = 0
        for key, rows, facts, notes in lines:
            self._kept[key] = Kept(rows, facts, tuple(Skipped(*note) for note in notes), len(self._segments), start)
            start += rows or 0
        self._segments.append(path)

    def _table(self, number: int) -> pa.Table:
        segment = self._segments[number]
        if not isinstance(segment, Path):
            return segment
        if number not in self._open:
            try:
                self._open[number] = pq.read_table(segment).replace_schema_metadata(None)
            except (pa.ArrowException, OSError) as error:
                raise FmsuiteError(
                    f"{segment}: finished sources cannot be read ({error}).",
                    f"Remove {segment.parent} and begin again.",
                ) from error
            if len(self._open) > _OPEN_SEGMENTS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def discard_parts(folder: Path) -> None:
    """Remove the parts once the index that they were for has been written."""
    shutil.rmtree(folder, ignore_errors=True)
