"""skipped.csv: every source or window that was not used, with the stage and the reason."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from fmsuite.errors import FmsuiteError, ReadFailure

FILE_NAME = "skipped.csv"


@dataclass(frozen=True)
class Skipped:
    """One line of the file."""

    path: str
    stage: str
    reason: str

    @classmethod
    def of(cls, failure: ReadFailure) -> Skipped:
        return cls(failure.path, failure.stage, f"{failure.reason} {failure.hint}".strip())


class SkippedLog:
    """Collects what is skipped and appends it to a file line by line, so that nothing is lost in a crash.

    Args:
        path: the CSV file; ``None`` keeps the list in memory only.
        strict: raise instead of recording.
    """

    def __init__(self, path: str | os.PathLike | None = None, strict: bool = False) -> None:
        self.path = Path(path) if path is not None else None
        self.strict = strict
        self.entries: list[Skipped] = []
        self._seen: dict[Skipped, None] = {}
        self._torn = False
        if self.path is not None and self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                lines = file.readlines()
            # A crash may have cut the last line off.
            self._torn = bool(lines) and not lines[-1].endswith("\n")
            for row in list(csv.reader(lines))[1:]:
                if len(row) == 3:
                    self._seen[Skipped(*row)] = None
            self.entries = list(self._seen)

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, path: str, stage: str, reason: str) -> None:
        """Record one; the same line is written once.

        Raises:
            FmsuiteError: in strict mode.
        """
        if self.strict:
            raise FmsuiteError(f"{path}: {reason}", "(--strict makes a skipped source an error.)")
        entry = _plain(Skipped(path, stage, reason))
        if entry in self._seen:
            return
        self._seen[entry] = None
        self.entries.append(entry)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if self._torn:
                file.write("\r\n")
                self._torn = False
            if new:
                writer.writerow(["path", "stage", "reason"])
            writer.writerow(astuple(entry))

    def forget(self, which: Callable[[Skipped], bool]) -> None:
        """Take out what is about to be tried again; the file is whole or as before."""
        self._replace([entry for entry in self.entries if not which(entry)])

    def put_first(self, entries: Sequence[Skipped]) -> None:
        """Put lines that are there to the beginning, in the given order; the file is whole or as before."""
        moved = {entry: None for entry in map(_plain, entries) if entry in self._seen}
        self._replace([*moved, *(entry for entry in self.entries if entry not in moved)])

    def _replace(self, kept: list[Skipped]) -> None:
        if kept == self.entries:
            return
        self.entries, self._seen, self._torn = kept, dict.fromkeys(kept), False
        if self.path is None:
            return
        if not kept:
            self.path.unlink(missing_ok=True)
            return
        partial = self.path.with_name(f".{self.path.name}.partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("path", "stage", "reason"), *map(astuple, kept)])
        os.replace(partial, self.path)

    def add_failure(self, failure: ReadFailure) -> None:
        self.add(*astuple(Skipped.of(failure)))

    def summary(self) -> str:
        """One sentence: how many, at which stages, and where to look. Empty if none."""
        if not self.entries:
            return ""
        stages = Counter(entry.stage for entry in self.entries)
        counted = ", ".join(f"{count} at {stage}" for stage, count in stages.most_common())
        where = f" See {self.path}." if self.path is not None else ""
        return f"{len(self.entries)} skipped ({counted}).{where}"


def _plain(entry: Skipped) -> Skipped:
    """As it stands in the file: on one line."""
    return Skipped(str(entry.path), entry.stage, " ".join(str(entry.reason).split()))
