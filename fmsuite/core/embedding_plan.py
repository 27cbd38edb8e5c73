"""Which windows are embedded together: a function of the groups and the batch size alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import overload

import numpy as np
import pyarrow as pa

from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.features import FeatureStore

BATCHING = 2
"""The number of the rule for batches, see ``batch_edges``; another rule gets another number."""
UNIT_BATCHES = 8
"""Batches of one large group that a worker takes at a time: little enough that a single group is shared out too."""


def batch_edges(counts: np.ndarray, batch_size: int) -> np.ndarray:
    """Where batches begin and end, when groups lie one after the other.

    The last bits of a feature depend on the batch that it was computed in. A group of at least ``batch_size`` windows
    is cut into batches of its own, the last one shorter; smaller ones that are neighbours share a batch as long as it
    holds them whole. So no group's features depend on a large one beside it, and a batch can be computed anywhere.

    Args:
        counts: (G,) windows of each group.

    Returns:
        (B + 1,) int64, from 0 to the number of windows.
    """
    ends = np.cumsum(counts)
    edges = [np.zeros(1, dtype=np.int64)]
    group, start = 0, 0
    while group < len(counts):
        if counts[group] >= batch_size:
            group += 1
            edges.append(np.arange(start + batch_size, ends[group - 1], batch_size))
        else:
            full = int(np.searchsorted(ends, start + batch_size, side="right"))
            # Groups that fit; a large one never does, as the batch has begun with a small one.
            group = full
        start = int(ends[group - 1])
        edges.append(np.array([start], dtype=np.int64))
    return np.concatenate(edges).astype(np.int64)


@dataclass(frozen=True)
class WindowsUnit:
    """Some whole batches, with all that is needed to read them: an index may be too large to send.

    Attributes:
        first: place of the first window in ``FeatureStore.order``.
        rows: (N,) int64 rows of the store's index.
        windows: these rows.
        batches: lengths of the batches, in order; their sum is N.
    """

    first: int
    rows: np.ndarray
    windows: SampleIndex
    batches: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def requests(self) -> Iterator[list[tuple[int, Window]]]:
        """For each batch the windows with their rows."""
        names = ("source", "group", "position", "extent", "spacing", "content", "label", "split")
        columns = (self.windows.table.column(name).to_pylist() for name in names)
        found = (
            (int(row), Window(source, group, tuple(position), tuple(extent), tuple(spacing), content, label, split))
            for row, source, group, position, extent, spacing, content, label, split in zip(self.rows, *columns)
        )
        for length in self.batches:
            yield list(islice(found, length))


class Plan(Sequence[WindowsUnit]):
    """The units that have to be done for the groups that are wanted, made when they are asked for.

    Args:
        store: the groups.
        wanted: ids.
        unit_batches: batches of one group in a unit, at most.

    Attributes:
        wanted: (G,) bool.
        windows: how many are embedded; those of other groups that share a batch are among them.
    """

    def __init__(self, store: FeatureStore, wanted: Sequence[str], unit_batches: int = UNIT_BATCHES) -> None:
        self.store = store
        names = set(wanted)
        self.wanted = np.array([id in names for id in store.keys()])  # noqa: SIM118
        counts = np.bincount(store.codes, minlength=len(self.wanted))
        edges = batch_edges(counts, store.facts.batch_size)
        starts = edges[:-1]
        first, last = store.codes[starts], store.codes[edges[1:] - 1]
        before = np.concatenate([[0], np.cumsum(self.wanted)])
        needed = before[last + 1] > before[first]
        # Batches of one group are numbered from its first, and those that share a batch stand alone.
        begins = np.flatnonzero(np.diff(first, prepend=-1))
        within = np.arange(len(starts)) - np.repeat(begins, np.diff(begins, append=len(starts)))
        heads = np.flatnonzero(within % unit_batches == 0)
        tails = np.append(heads[1:], len(starts))
        # A unit's batches are of one group, or it is one batch.
        kept = needed[heads]
        self._edges = edges
        self._heads, self._tails = heads[kept], tails[kept]
        self.windows = int((edges[self._tails] - edges[self._heads]).sum())

    def __len__(self) -> int:
        return len(self._heads)

    @overload
    def __getitem__(self, number: int) -> WindowsUnit: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[WindowsUnit]: ...
    def __getitem__(self, number: int | slice) -> WindowsUnit | Sequence[WindowsUnit]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        edges = self._edges[self._heads[number] : self._tails[number] + 1]
        rows = self.store.order[edges[0] : edges[-1]]
        return WindowsUnit(int(edges[0]), rows, _alone(self.store.index, rows), tuple(np.diff(edges).tolist()))


def _alone(index: SampleIndex, rows: np.ndarray) -> SampleIndex:
    """Rows of an index without the names of all its sources, which a selection would carry along."""
    table = index.table.take(rows)
    for number, entry in enumerate(table.schema):
        if pa.types.is_dictionary(entry.type):
            names = table.column(number).cast(pa.string()).combine_chunks().dictionary_encode()
            table = table.set_column(number, entry, names)
    return SampleIndex(table)
