"""The labels file: what is known about each volume, and which volumes belong to one patient."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path

from fmsuite.errors import UsageError, nearest

COLUMNS = ("path", "label", "group", "patient", "split")


@dataclass(frozen=True)
class VolumeLabel:
    """One row; ``None`` where a cell is empty or the column missing."""

    label: str | None = None
    group: str | None = None
    split: str | None = None


def read_labels(path: Path) -> dict[str, VolumeLabel]:
    """The rows of a labels file by the real path of their volume.

    Args:
        path: CSV with the column ``path`` (absolute, or relative to the CSV's folder) and any of ``label``, ``group``
            (or ``patient``, the same thing) and ``split``; other columns are left to other tools.

    Raises:
        UsageError: if the file cannot be read, lacks what is needed, names a volume twice or one that does not exist,
            or puts one patient into two splits.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            columns = list(table.fieldnames or ())
            rows = list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: the labels file cannot be read ({error}).", "Give a CSV file in UTF-8.") from error
    if "path" not in columns:
        raise UsageError(f"{path}: the labels file has no column 'path'.", f"Found: {', '.join(columns) or 'nothing'}.")
    if not {"label", "group", "patient", "split"} & set(columns):
        raise UsageError(f"{path}: no column to take anything from.", nearest(columns[-1], COLUMNS))
    if {"group", "patient"} <= set(columns):
        raise UsageError(
            f"{path}: has both a column 'group' and one 'patient'.", "Keep the one that splits keep whole."
        )
    found: dict[str, VolumeLabel] = {}
    splits: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        given = (row["path"] or "").strip()
        volume = os.path.realpath(path.parent / given)
        if not given or not os.path.isfile(volume):
            raise UsageError(f"{path}: line {number} names '{given}', which does not exist.", "Correct the path.")
        if volume in found:
            raise UsageError(f"{path}: line {number} names '{given}' a second time.", "Keep one line a volume.")
        entry = VolumeLabel(_cell(row, "label"), _cell(row, "group") or _cell(row, "patient"), _cell(row, "split"))
        if entry.group is not None and entry.split is not None:
            other = splits.setdefault(entry.group, entry.split)
            if other != entry.split:
                raise UsageError(
                    f"{path}: patient '{entry.group}' is in split '{other}' and in '{entry.split}'.",
                    "Put all volumes of a patient into one split.",
                )
        found[volume] = entry
    return found


def _cell(row: dict[str, str | None], column: str) -> str | None:
    return (row.get(column) or "").strip() or None
