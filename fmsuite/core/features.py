"""The feature store: a vector for every window of an index, in Zarr, in groups: slides, folders, patients, scenes."""

from __future__ import annotations

import difflib
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor

from fmsuite.core.data.grouping import default_by, group_codes, group_ids, group_key
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.lock import WriterLock
from fmsuite.core.store_root import INDEX, LOCK, UNREADABLE, StoreFacts, begin_store, damage, read_facts
from fmsuite.core.zarr_arrays import Damaged, array_length, read_array, write_array
from fmsuite.errors import FmsuiteError, UsageError

__all__ = ["FeatureStore", "StoreFacts", "StoredGroup", "default_by", "group_ids"]

ROWS_PER_CHUNK = 512
_PARTIAL = ".partial"
_ARRAYS = ("features", "rows", "position", "extent")

_NOT_FINITE_ADVICE = (
    "Look at that window: leave it out of the index if its values are wrong; if they are fine, the encoder overflows: "
    "try --device cpu, which computes in float32."
)


@dataclass(frozen=True)
class StoredGroup:
    """One group, read whole.

    Attributes:
        id: as ``group_ids`` names it.
        rows: (N,) int64, ascending rows of the store's index: the windows that could be read.
        features: (N, D) float32, finite.
        position, extent: (N, A) float64, as in the index.
    """

    id: str
    rows: np.ndarray
    features: np.ndarray
    position: np.ndarray
    extent: np.ndarray


class FeatureStore:
    """A folder ``*.zarr`` with a Zarr group for each group of windows, which is there whole or not at all.

    A group has the arrays of ``StoredGroup``, without compression (float32 features of a network shrink by less than a
    tenth, at twice the time) and with a checksum in every chunk. The index lies inside as ``index.parquet``, so that
    a store is enough to know labels and splits, and to read the windows again.

    Made by ``open`` for reading, or by ``create_or_resume`` for writing too, which locks it until ``close``.

    Attributes:
        path: the folder.
        facts, index: what it was made of.
        order: (T,) int64 rows of the index, group after group; within a group ascending.
        codes: (T,) int64 the group (position in ``keys()``) of each element of ``order``.
    """

    def __init__(self, path: Path, facts: StoreFacts, index: SampleIndex, lock: WriterLock | None = None) -> None:
        self.path = path
        self.facts = facts
        self.index = index
        self._lock = lock
        self._ids, codes = group_codes(index, facts.by)
        self._number = {id: number for number, id in enumerate(self._ids)}
        self.order = np.argsort(codes, kind="stable")
        self.codes = codes[self.order]
        self._edges = np.searchsorted(self.codes, np.arange(len(self._ids) + 1))

    @classmethod
    def open(cls, path: str | os.PathLike) -> FeatureStore:
        """For reading.

        Raises:
            UsageError: if there is no store, or it was written by a newer version.
            FmsuiteError: if it is damaged.
        """
        path = Path(path)
        if not path.exists():
            raise UsageError(f"{path}: there is no such feature store.", "Make one with `fmsuite embed`.")
        facts = read_facts(path)
        if facts is None:
            raise UsageError(f"{path}: not a feature store.", "Make one with `fmsuite embed`.")
        return cls(path, facts, _read_index(path))

    @classmethod
    def create_or_resume(
        cls, path: str | os.PathLike, facts: StoreFacts, index: SampleIndex, overwrite: bool = False
    ) -> FeatureStore:
        """For writing: a new store, or one that was begun with the same facts.

        A store in which no group is finished yet is begun anew, whatever it was begun with.

        Args:
            facts: what will decide the features.
            index: the windows; ``facts.index_hash`` is its hash.
            overwrite: begin anew in any case. The old store is removed once the new one stands.

        Raises:
            UsageError: if the store is of other facts and ``overwrite`` is False (naming both), if what lies there is
                no store, or if another process writes to it.
            FmsuiteError: if it cannot be written.
        """
        # Resolved, so that no link or ".." decides what is renamed or removed.
        path = Path(path).resolve()
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return cls(path, facts, index, begin_store(path, facts, index, replace=False))
        old = read_facts(path)
        if old is None:
            raise UsageError(
                f"{path}: there is something else here, which is no feature store; nothing was changed.",
                "Choose another place.",
            )
        lock = WriterLock(path / LOCK, str(path))
        try:
            store = None if overwrite else cls(path, old, _read_index(path), lock)
            if store is None or len(store.missing()) == len(store.keys()):
                new_lock = begin_store(path, facts, index, replace=True)
                lock.close()
                return cls(path, facts, index, new_lock)
            different = old.differences(facts)
            if different:
                raise UsageError(
                    f"{path}: this store was made otherwise: {'; '.join(different)}.",
                    "Use what it was made with, choose another place, or replace it with --overwrite.",
                )
            # What a killed process was writing.
            shutil.rmtree(path / _PARTIAL, ignore_errors=True)
        except BaseException:
            lock.close()
            raise
        return store

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let others write."""
        if self._lock is not None:
            try:
                # Empty, as every write ends in moving or removing what it made there.
                with suppress(OSError):
                    os.rmdir(self.path / _PARTIAL)
            finally:
                self._lock.close()
                self._lock = None

    def keys(self) -> list[str]:
        """Ids of all groups of the index, stored or not, in the order of their first windows."""
        return list(self._ids)

    def __contains__(self, id: object) -> bool:
        return id in self._number and self._folder(str(id)).is_dir()

    def stored(self) -> list[str]:
        """Ids of the groups that are there, in order."""
        present = set(os.listdir(self.path))
        return [id for id in self._ids if group_key(id) in present]

    def unreadable(self) -> dict[str, str]:
        """Groups of which no window could be read, and why; they are in neither ``stored`` nor ``missing``."""
        try:
            recorded = json.loads((self.path / UNREADABLE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise damage(self.path / UNREADABLE, str(error)) from error
        if not isinstance(recorded, dict):
            raise damage(self.path / UNREADABLE, "not a JSON object")
        return {id: reason for id, reason in recorded.items() if id in self._number and id not in self}

    def missing(self) -> list[str]:
        """Ids of the groups that have not been done, in order."""
        done = {*self.stored(), *self.unreadable()}
        return [id for id in self._ids if id not in done]

    def windows(self) -> int:
        """How many windows have features here.

        Raises:
            FmsuiteError: if a group is damaged, naming the file.
        """
        total = 0
        for id in self.stored():
            try:
                total += array_length(self._folder(id) / "rows")
            except Damaged as error:
                raise damage(error.file, error.reason, self._folder(id)) from error
        return total

    def rows_of(self, id: str) -> np.ndarray:
        """(N,) int64, ascending rows of the index that belong to a group, readable or not.

        Raises:
            UsageError: if the index has no such group.
        """
        if id not in self._number:
            close = difflib.get_close_matches(id, self._ids, n=1)
            raise UsageError(
                f"{self.path}: there is no group '{id}'.",
                f"Did you mean '{close[0]}'?" if close else f"It has {len(self._ids)}, the first is '{self._ids[0]}'.",
            )
        number = self._number[id]
        return self.order[self._edges[number] : self._edges[number + 1]]

    def start_of(self, code: int) -> int:
        """Where in ``order`` a group begins.

        Args:
            code: its position in ``keys()``.
        """
        return int(self._edges[code])

    def __getitem__(self, id: str) -> StoredGroup:
        """
        Raises:
            UsageError: if the index has no such group, or it is not stored.
            FmsuiteError: if it is damaged, naming the file, or has a feature that is not finite, naming the row.
        """
        expected = self.rows_of(id)
        folder = self._folder(id)
        if id not in self:
            reason = self.unreadable().get(id)
            raise UsageError(
                f"{self.path}: the group '{id}' is not stored"
                + (f"; none of its windows could be read: {reason}" if reason else "."),
                "Run `fmsuite embed` again to add what is missing.",
            )
        try:
            features, rows, position, extent = (read_array(folder / name) for name in _ARRAYS)
        except Damaged as error:
            raise damage(error.file, error.reason, folder) from error
        if features.shape != (len(rows), self.facts.dim) or not np.isin(rows, expected).all():
            raise damage(folder, f"features {features.shape} and {len(rows)} rows do not fit the index", folder)
        self.refuse_non_finite(id, rows, features, f"Remove {folder} and run `fmsuite embed` again.")
        return StoredGroup(id, rows, features, position, extent)

    def read_all(self, rows: Sequence[int] | np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """Features of all stored groups at once.

        Args:
            rows: only these rows of the index; those that are not stored are left out.

        Returns:
            (T, D) float32 features and (T,) int64 rows, ascending.

        Raises:
            FmsuiteError: as ``__getitem__``.
        """
        wanted = np.ones(len(self.index), dtype=bool)
        if rows is not None:
            wanted[:] = False
            wanted[np.asarray(rows, dtype=np.int64)] = True
        ids = [id for id in self.stored() if wanted[self.rows_of(id)].any()]
        place = np.cumsum(wanted) - 1
        # As if all were stored: what is not is taken out below, which costs a copy only then.
        features = np.empty((int(wanted.sum()), self.facts.dim), dtype=np.float32)
        filled = np.zeros(len(features), dtype=bool)
        for id in ids:
            group = self[id]
            mine = wanted[group.rows]
            features[place[group.rows[mine]]] = group.features[mine]
            filled[place[group.rows[mine]]] = True
        numbers = np.flatnonzero(wanted)
        if not filled.all():
            features, numbers = features[filled], numbers[filled]
        return torch.from_numpy(features), torch.from_numpy(numbers)

    def write(self, id: str, rows: np.ndarray, features: np.ndarray) -> None:
        """Store one group: it appears whole, or not at all.

        Args:
            rows: (N,) int64, ascending rows of the index, N >= 1, all of this group.
            features: (N, D) float32.

        Raises:
            FmsuiteError: if a feature is not finite, naming slide and row, or the disk is full.
            ValueError: if the store is open for reading only, the group is there, or the arrays do not fit it.
        """
        self._check_writing(id, rows)
        if features.shape != (len(rows), self.facts.dim) or features.dtype != np.float32:
            raise ValueError(f"features of '{id}' are {features.dtype} {features.shape}")
        self.refuse_non_finite(id, rows, features)
        windows = self.index.table.take(rows)
        position, extent = (_matrix(windows.column(name)) for name in ("position", "extent"))
        partial = self.path / _PARTIAL / group_key(id)
        try:
            shutil.rmtree(partial, ignore_errors=True)
            zarr.open_group(str(partial), mode="w-", attributes={"id": id})
            write_array(partial / "features", features, min(len(rows), ROWS_PER_CHUNK))
            for name, values in (("rows", rows), ("position", position), ("extent", extent)):
                write_array(partial / name, values, len(rows))
            os.replace(partial, self._folder(id))
        except OSError as error:
            raise FmsuiteError(
                f"{self._folder(id)}: cannot be written ({error.strerror or error}).",
                "Make room, and run the same command again: the groups that are finished stay.",
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def mark_unreadable(self, id: str, reason: str) -> None:
        """Record that no window of a group could be read."""
        self._check_writing(id, self.rows_of(id))
        recorded = {**self.unreadable(), id: reason}
        partial = self.path / f".{UNREADABLE}"
        partial.write_text(json.dumps(recorded, ensure_ascii=False, indent=1), encoding="utf-8")
        os.replace(partial, self.path / UNREADABLE)

    def refuse_non_finite(
        self, id: str, rows: np.ndarray, features: np.ndarray, advice: str = _NOT_FINITE_ADVICE
    ) -> None:
        """
        Args:
            rows, features: of the group ``id``, as in ``write``; any part of it.
            advice: the way out.

        Raises:
            FmsuiteError: if a feature is not finite, naming group, slide and row.
        """
        bad = np.flatnonzero(~np.isfinite(features).all(1))
        if len(bad):
            row = int(rows[bad[0]])
            window = self.index[row]
            raise FmsuiteError(
                f"{self.path}: {len(bad)} of {len(rows)} feature vectors of '{id}' are not finite, the first of them "
                f"that of row {row} of the index, {window.source} at {window.position}.",
                advice,
            )

    def _check_writing(self, id: str, rows: np.ndarray) -> None:
        if self._lock is None:
            raise ValueError(f"{self.path} is open for reading only")
        if id in self:
            raise ValueError(f"{self.path}: '{id}' is stored already")
        if not len(rows) or (np.diff(rows) <= 0).any() or not np.isin(rows, self.rows_of(id)).all():
            raise ValueError(f"the rows given for '{id}' are not ascending rows of it")

    def _folder(self, id: str) -> Path:
        return self.path / group_key(id)


def _read_index(store: Path) -> SampleIndex:
    """The index inside a store.

    Raises:
        FmsuiteError: if it is damaged or missing.
    """
    try:
        return SampleIndex.read(store / INDEX)
    except UsageError as error:
        raise FmsuiteError(
            error.message, f"Make the whole store again: `fmsuite embed` with --overwrite, into {store}."
        ) from error


def _matrix(column: Any) -> np.ndarray:
    """(N, A) float64 of a list column."""
    values = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(values, dtype=np.float64).reshape(len(column), -1)
