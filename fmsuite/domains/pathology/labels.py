"""A labels file: which class, patient and split each slide or tile belongs to."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fmsuite.errors import UsageError, nearest
from fmsuite.tiling.sources import SourceFile

FILE_NAME = "labels.csv"
PATH_NAMES = ("path", "slide", "slide_id", "file", "filename", "image")
LABEL_NAMES = ("label", "class", "diagnosis")
GROUP_NAMES = ("group", "patient", "patient_id", "case", "case_id")
SPLIT_NAMES = ("split", "fold", "set")


@dataclass(frozen=True)
class Annotation:
    """What the file says of one source; ``None`` where it says nothing."""

    label: str | None = None
    group: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Columns:
    """Names of the file's columns; a name that is ``None`` is looked for among the usual ones."""

    path: str | None = None
    label: str | None = None
    group: str | None = None
    split: str | None = None


class Labels:
    """The rows of a labels file, found by a source's path below the given folder, its file name or its stem.

    Args:
        file: a CSV file with a header.
        columns: names of its columns.

    Raises:
        UsageError: if the file cannot be read, lacks a column that is named, has two different rows for one path, or
            puts one group (patient) on two splits.
    """

    def __init__(self, file: Path, columns: Columns | None = None) -> None:
        self.file = file
        wanted = columns or Columns()
        try:
            with file.open(newline="", encoding="utf-8-sig") as handle:
                reader = csv.DictReader(handle, strict=True)
                header = list(reader.fieldnames or [])
                rows = list(reader)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UsageError(
                f"{file}: the labels cannot be read ({error}).", "Give a CSV file with a header, in UTF-8."
            ) from error
        path = self._column(header, wanted.path, PATH_NAMES, "path")
        if path is None:
            raise UsageError(
                f"{file}: no column says which file a row is about; it has {', '.join(header) or 'none'}.",
                f"Call one '{PATH_NAMES[0]}' or '{PATH_NAMES[1]}', or name yours with path_column.",
            )
        label = self._column(header, wanted.label, LABEL_NAMES, "label")
        group = self._column(header, wanted.group, GROUP_NAMES, "group")
        split = self._column(header, wanted.split, SPLIT_NAMES, "split")
        self._rows: dict[str, Annotation] = {}
        for number, row in enumerate(rows, start=2):
            key = Path((row[path] or "").strip().replace("\\", "/")).as_posix()
            if key in ("", "."):
                raise UsageError(f"{file}: line {number} names no file.", f"Fill in its '{path}'.")
            found = Annotation(_cell(row, label), _cell(row, group), _cell(row, split))
            if self._rows.setdefault(key, found) != found:
                raise UsageError(
                    f"{file}: '{key}' stands there twice with different labels (line {number}).", "Remove one of them."
                )
        refuse_shared_groups(((a.group, a.split) for a in self._rows.values()), str(file))

    def __len__(self) -> int:
        return len(self._rows)

    def match(self, files: Sequence[SourceFile]) -> dict[Path, Annotation]:
        """The annotation of each file that has one.

        Raises:
            UsageError: if a row fits several files, or no row fits any.
        """
        matched: dict[Path, Annotation] = {}
        users: dict[str, list[SourceFile]] = defaultdict(list)
        for file in files:
            key = next((key for key in self._keys(file) if key in self._rows), None)
            if key is not None:
                matched[file.path] = self._rows[key]
                users[key].append(file)
        for key, several in users.items():
            if len(several) > 1:
                raise UsageError(
                    f"{self.file}: '{key}' fits several files: {several[0].path} and {several[1].path}.",
                    "Write the path below the data folder instead of the bare name.",
                )
        if files and not matched:
            raise UsageError(
                f"{self.file}: none of its {len(self._rows)} rows names one of the {len(files)} files; "
                f"its first is '{next(iter(self._rows), '')}', the first file is '{files[0].relative}'.",
                "Rows name a file by its path below the data folder, its name, or its name without the suffix.",
            )
        return matched

    def _keys(self, file: SourceFile) -> Iterable[str]:
        """How a row may name the file, from the most specific to the least."""
        relative = Path(file.relative)
        yield file.path.as_posix()
        if file.path.is_relative_to(self.file.resolve().parent):
            beside = file.path.relative_to(self.file.resolve().parent)
            yield beside.as_posix()
            yield beside.with_suffix("").as_posix()
        yield relative.as_posix()
        yield relative.with_suffix("").as_posix()
        yield relative.name
        yield relative.stem

    def _column(self, header: list[str], named: str | None, usual: Sequence[str], role: str) -> str | None:
        if named is not None:
            if named not in header:
                raise UsageError(f"{self.file}: there is no column '{named}'.", nearest(named, header))
            return named
        lower = {name.strip().lower(): name for name in reversed(header)}
        return next((lower[name] for name in usual if name in lower), None)


def refuse_shared_groups(pairs: Iterable[tuple[str | None, str | None]], origin: str) -> None:
    """One patient, one split.

    Args:
        pairs: (group, split) of every source.
        origin: what to name in the message.

    Raises:
        UsageError: naming the first patients that stand on several splits.
    """
    splits: dict[str, set[str]] = defaultdict(set)
    for group, split in pairs:
        if group is not None and split is not None:
            splits[group].add(split)
    shared = sorted(group for group, found in splits.items() if len(found) > 1)
    if shared:
        example = ", ".join(f"'{group}' ({' and '.join(sorted(splits[group]))})" for group in shared[:3])
        more = f" and {len(shared) - 3} more" if len(shared) > 3 else ""
        raise UsageError(
            f"{origin}: patients on several splits: {example}{more}.",
            "A result on such a split would be about known patients; put each on one side.",
        )


def _cell(row: dict[str, str | None], column: str | None) -> str | None:
    """A cell's text; ``None`` where it is empty or there is no such column."""
    if column is None:
        return None
    text = (row.get(column) or "").strip()
    return text or None
