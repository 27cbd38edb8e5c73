"""From a table of pairs to the partner of every window of an index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from fmsuite.commands.group_labels import index_groups, nameable
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.pairs import Pairs, PairTable
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.errors import UsageError
from fmsuite.tiling.labels import _Folders, _Names

Find = Callable[[str], Sequence[int] | np.ndarray]
"""A name to the rows of the index that it names; none if there are no such."""


def join_pairs(table: PairTable, index: SampleIndex, skipped: SkippedLog) -> Pairs:
    """The partner of every row of the index that a line of the table names.

    A ``window`` is named by its row in the index, a ``group`` by the index's name for it, and a ``source`` as
    ``tiling.labels.assign_labels`` says, by its path or name; a line is about all windows of what it names. Lines that
    name nothing go to ``skipped``.

    Raises:
        UsageError: if no line names a window, a line could be about several sources, or two are about one window.
    """
    find = {"window": _windows, "source": _files, "group": _groups}[table.key](index, table.path)
    of_row = np.full(len(index), -1, dtype=np.int64)
    unmatched = []
    for line, name in enumerate(table.names):
        rows = np.asarray(find(name), dtype=np.int64)
        if not len(rows):
            unmatched.append(name)
            continue
        taken = rows[of_row[rows] >= 0]
        if len(taken):
            raise UsageError(
                f"{table.path}: '{table.names[of_row[taken[0]]]}' and '{name}' are about the same windows.",
                "Keep one of the lines.",
            )
        of_row[rows] = line
    if len(unmatched) == len(table.names):
        raise UsageError(
            f"{table.path}: none of its {len(table.names)} lines names one of the {len(index)} windows; its first "
            f"names the {table.key} '{table.names[0]}', the first window is of {_described(index, table.key)}.",
            "Name sources by path or file name, groups as the index does, or windows by their row in the index.",
        )
    for name in unmatched:
        skipped.add(name, "pairs", f"{table.path} names it, and no such {table.key} was found. Correct the line.")
    return Pairs(table.values, of_row)


def _described(index: SampleIndex, key: str) -> str:
    first = index[0]
    return {"window": "row 0", "source": f"'{first.source}'", "group": f"the group '{first.group}'"}[key]


def _windows(index: SampleIndex, path: Path) -> Find:
    def find(name: str) -> list[int]:
        return [int(name)] if name.isdecimal() and int(name) < len(index) else []

    return find


def _groups(index: SampleIndex, path: Path) -> Find:
    rows = _rows_of(index, "group")
    return lambda name: rows.get(name, [])


def _files(index: SampleIndex, path: Path) -> Find:
    rows = _rows_of(index, "source")
    files, _, places = nameable(index_groups(index, "source"), "source")
    names = _Names(files, places, _Folders())

    def find(name: str) -> np.ndarray | list[int]:
        members = [rows[str(file)] for file in names.find(name, path)]
        return np.concatenate(members) if members else []

    return find


def _rows_of(index: SampleIndex, column: str) -> dict[str, np.ndarray]:
    """The rows of each value of a column."""
    values = index.table.select([column]).unify_dictionaries().column(0).combine_chunks()
    codes = values.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    present, first = np.unique(codes[order], return_index=True)
    names = values.dictionary.cast(pa.string()).to_pylist()
    return {names[code]: rows for code, rows in zip(present, np.split(order, first[1:]), strict=True)}
