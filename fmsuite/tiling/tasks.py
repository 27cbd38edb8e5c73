"""What a domain says about its sources, one by one: where each lies, what is known about it, and the rows it gives."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fmsuite.core.data.skipped import Skipped, SkippedLog
from fmsuite.tiling.labels import LabelOptions, SourceLabel, assign_labels
from fmsuite.tiling.sources import SourceFile, find_files
from fmsuite.tiling.table import NO_ROWS, WindowRows


@dataclass(frozen=True)
class SourceTask:
    """One source to look at: small, and picklable, since it may be looked at in another process or on another machine.

    Attributes:
        path: its file, absolute; of several files that are one thing, the first.
        name: readable and unique among the tasks; its group where nothing else is known.
        known: what labels files say.
        others: further files that its rows depend on.
        details: whatever else ``Domain.index_source`` has to know, as JSON values.
    """

    path: str
    name: str
    known: SourceLabel = field(default_factory=SourceLabel)
    others: tuple[str, ...] = ()
    details: Any = None

    @classmethod
    def of(cls, file: SourceFile, known: SourceLabel, details: Any = None) -> SourceTask:
        return cls(str(file.path), file.group, known, details=details)

    @property
    def group(self) -> str:
        return self.known.group or self.name

    def rows(
        self,
        positions: np.ndarray,
        extent: Sequence[float],
        spacing: Sequence[float] = (),
        content: np.ndarray | float = 1.0,
        group: str | Sequence[str] | None = None,
    ) -> WindowRows:
        """Its windows, with its path, group, label and side of the split; see ``table.WindowRows``."""
        known = self.known
        return WindowRows(self.path, group or self.group, positions, extent, spacing, content, known.label, known.split)

    def identity(self) -> str:
        """Equal for equal tasks whose files have not changed since: in path, size and time of change."""
        known = (self.known.label, self.known.group, self.known.split)
        files = [(path, _state(path)) for path in (self.path, *self.others)]
        return json.dumps([self.name, known, files, self.details], sort_keys=True)


@dataclass(frozen=True)
class Sources:
    """What ``Domain.find_sources`` found.

    Attributes:
        tasks: in the order of the index.
        metadata: what else the index is to record.
    """

    tasks: Sequence[SourceTask]
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceRows:
    """What ``Domain.index_source`` found.

    Attributes:
        rows: its windows, as ``SourceTask.rows`` makes them. ``None`` where they depend on other sources: then
            ``Domain.settle_sources`` decides what becomes of this one.
        facts: small JSON values, for ``settle_sources`` and ``index_metadata``.
        notes: lines of ``skipped.csv`` about parts of the source that are left out. Of a source without rows they say
            why it has none.
    """

    rows: WindowRows | None
    facts: dict[str, Any] = field(default_factory=dict)
    notes: tuple[Skipped, ...] = ()

    @classmethod
    def unused(cls, *notes: Skipped) -> SourceRows:
        """Of a source that gives no rows, for several reasons; where there is one, ``index_source`` raises it."""
        return cls(NO_ROWS, notes=notes)


@dataclass(frozen=True)
class SourceFacts:
    """A source that was looked at, and what was found."""

    task: SourceTask
    facts: dict[str, Any]


def labelled_sources(
    options: LabelOptions, paths: Sequence[str | os.PathLike], suffixes: Sequence[str], what: str, skipped: SkippedLog
) -> Sources:
    """A task for each file with one of the suffixes, with what labels files say about it.

    Raises:
        UsageError: as ``sources.find_files`` and ``labels.assign_labels``, whose arguments these are.
    """
    files = find_files(paths, suffixes, what)
    labels = assign_labels(options, paths, files, skipped)
    return Sources([SourceTask.of(file, labels.of(file)) for file in files], {"labels": labels.summary()})


def _state(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
