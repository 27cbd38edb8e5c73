"""labels.csv: which raster, or place, is of which class, and which side of a split it stands on."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fmsuite.errors import UsageError

DEFAULT_NAME = "labels.csv"
COLUMNS = ("file", "label", "group", "split")


@dataclass(frozen=True)
class Label:
    """One line; an empty cell is ``None``."""

    file: str
    label: str | None = None
    group: str | None = None
    split: str | None = None


def find_labels(asked: Path | None, paths: Sequence[Path]) -> list[tuple[Path, Label]]:
    """The lines of the file asked for, or of every ``labels.csv`` that lies directly in a given folder.

    Raises:
        UsageError: if the file asked for does not exist, or a file is not a labels file.
    """
    if asked is not None:
        return [(asked, line) for line in read_labels(asked)]
    defaults = [Path(path) / DEFAULT_NAME for path in paths]
    return [(path, line) for path in defaults if path.is_file() for line in read_labels(path)]


def read_labels(path: Path) -> list[Label]:
    """
    Raises:
        UsageError: if the file is missing, is not text, or lacks the columns ``file`` and ``label``.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            names = table.fieldnames or []
            if not {"file", "label"} <= set(names):
                raise UsageError(
                    f"{path}: needs the columns file and label, and has {', '.join(names) or 'none'}.",
                    "Its first line must name the columns.",
                )
            rows = [{key: (row.get(key) or "").strip() or None for key in COLUMNS} for row in table]
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}).", "Check data.labels.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: not a CSV file in UTF-8 ({error}).", "Check data.labels.") from error
    return [Label(row["file"], row["label"], row["group"], row["split"]) for row in rows if row["file"]]


@dataclass(frozen=True)
class Labelled:
    """What the lines say about one source, and how it can be named in them.

    Attributes:
        group: the source's own group.
        exact, loose: names by which a line may call it; a loose name must fit one source only.
    """

    group: str
    exact: frozenset[str]
    loose: frozenset[str]


def assign_labels(lines: Iterable[tuple[Path, Label]], sources: Sequence[Labelled]) -> tuple[list[Label], list[str]]:
    """
    Returns:
        one ``Label`` for each source, with its final group (without label where no line names it); and the names of
        lines that fit no source.

    Raises:
        UsageError: if a line fits several sources, two lines contradict each other, or a group stands on two sides of
            the split.
    """
    found: dict[int, Label] = {}
    exact: dict[str, list[int]] = {}
    loose: dict[str, list[int]] = {}
    for number, source in enumerate(sources):
        for name in source.exact:
            exact.setdefault(name, []).append(number)
        for name in source.loose:
            loose.setdefault(name, []).append(number)
    unknown = []
    for path, line in lines:
        name = line.file.replace("\\", "/").removeprefix("./")
        members = exact.get(name) or loose.get(name) or []
        if not members:
            unknown.append(line.file)
        if len(members) > 1 and name not in exact:
            raise UsageError(f"{path}: '{line.file}' names {len(members)} files.", "Give the path below the folder.")
        for number in members:
            earlier = found.setdefault(number, line)
            if (earlier.label, earlier.group, earlier.split) != (line.label, line.group, line.split):
                raise UsageError(
                    f"{path}: '{line.file}' is labelled '{earlier.label}' and '{line.label}'.", "Keep one of the lines."
                )
    result = []
    sides: dict[str, str | None] = {}
    for number, source in enumerate(sources):
        line = found.get(number, Label(source.group))
        group = line.group or source.group
        if sides.setdefault(group, line.split) != line.split:
            raise UsageError(
                f"The place '{group}' stands on two sides of the split ('{sides[group]}' and '{line.split}').",
                "Windows of one place must stay together: correct the labels file.",
            )
        result.append(Label(line.file, line.label, group, line.split))
    return result, unknown
