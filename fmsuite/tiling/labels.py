"""A labels file: what is known about each source, and what must stay together in a split."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fmsuite.errors import UsageError, nearest
from fmsuite.tiling.sources import SourceFile

DEFAULT_NAME = "labels.csv"
"""Looked for in every folder that is given, if no labels file is named."""

SOURCE_COLUMNS = ("path", "file", "filename", "slide", "image")
GROUP_COLUMNS = ("group", "patient", "scene")


@dataclass(frozen=True)
class LabelColumns:
    """Names of a labels file's columns; ``None`` takes the first of the usual names that the file has.

    Attributes:
        source: names the source file; usual names are ``SOURCE_COLUMNS``.
        label: its class.
        group: what must stay together in a split (patient, scene); usual names are ``GROUP_COLUMNS``.
        split: the side of a split.
    """

    source: str | None = None
    label: str | None = None
    group: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class SourceLabel:
    """What a labels file says about one source; ``None`` where it says nothing."""

    label: str | None = None
    group: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Assigned:
    """Labels of sources.

    Attributes:
        by_path: source path to what is known about it; sources without a line are not in it.
        unmatched: lines that name no source that was found.
    """

    by_path: dict[Path, SourceLabel] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()

    def of(self, source: SourceFile) -> SourceLabel:
        return self.by_path.get(source.path, SourceLabel())


def find_labels(asked: str | os.PathLike | None, paths: Sequence[Path]) -> list[Path]:
    """The labels file that was asked for, or every ``labels.csv`` that lies directly in a given folder."""
    if asked is not None:
        return [Path(asked)]
    beside = [Path(path) / DEFAULT_NAME for path in paths]
    return [path for path in beside if path.is_file()]


def assign_labels(
    tables: Sequence[Path], sources: Sequence[SourceFile], columns: LabelColumns | None = None
) -> Assigned:
    """What labels files say about sources.

    A line names a source by its path (absolute, relative to the labels file, or below the folder that was given), by
    its file name, or by either without the suffix. The longest form that fits decides.

    Raises:
        UsageError: if a file cannot be read, lacks a column that was named or has no source column; if a line fits
            several sources, two lines contradict each other, or a group stands on two sides of the split.
    """
    names = _names_of(sources)
    found: dict[Path, SourceLabel] = {}
    unmatched: list[str] = []
    for table in tables:
        for given, line in read_labels(table, columns or LabelColumns()):
            fitting = _fitting(given, table, names)
            if len(fitting) > 1:
                raise UsageError(
                    f"{table}: '{given}' names {len(fitting)} files, such as {fitting[0]} and {fitting[1]}.",
                    "Give the path below the folder.",
                )
            if not fitting:
                unmatched.append(given)
                continue
            before = found.setdefault(fitting[0], line)
            if before != line:
                raise UsageError(f"{table}: two lines contradict each other about '{given}'.", "Keep one of them.")
    _check_splits(found)
    return Assigned(found, tuple(unmatched))


def read_labels(path: Path, columns: LabelColumns) -> list[tuple[str, SourceLabel]]:
    """``(source as written, what is said about it)`` for every line.

    Raises:
        UsageError: if the file cannot be read, lacks a column that was named, or has no source column.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            header = [name for name in table.fieldnames or [] if name]
            rows = list(table)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}).", "Check the labels file's path.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: not a CSV file in UTF-8 ({error}).", "Save the table as CSV in UTF-8.") from error
    source = _column(path, header, columns.source, SOURCE_COLUMNS)
    if source is None:
        raise UsageError(
            f"{path}: no column names the files; it has {', '.join(header) or 'none'}.",
            f"Call one {' or '.join(SOURCE_COLUMNS)}, or name it in the options.",
        )
    label = _column(path, header, columns.label, ("label",))
    group = _column(path, header, columns.group, GROUP_COLUMNS)
    split = _column(path, header, columns.split, ("split",))
    lines = []
    for row in rows:
        given = _cell(row, source)
        if given is not None:
            lines.append((given, SourceLabel(_cell(row, label), _cell(row, group), _cell(row, split))))
    return lines


def _column(path: Path, header: list[str], asked: str | None, usual: tuple[str, ...]) -> str | None:
    if asked is None:
        return next((name for name in usual if name in header), None)
    if asked not in header:
        raise UsageError(f"{path}: there is no column '{asked}'.", nearest(asked, header))
    return asked


def _cell(row: dict[str, str], column: str | None) -> str | None:
    return None if column is None else (row.get(column) or "").strip() or None


def _names_of(sources: Sequence[SourceFile]) -> list[dict[str, list[Path]]]:
    """Names by which a line may call each source, from the most exact form to the loosest."""
    forms: list[dict[str, list[Path]]] = [{}, {}, {}, {}]
    for source in sources:
        relative = source.relative
        stem = relative.removesuffix("".join(Path(relative).suffixes[-1:]))
        named = (os.path.realpath(source.path), relative, source.path.name, Path(stem).name)
        for form, name in zip(forms, named, strict=True):
            form.setdefault(name, []).append(source.path)
        forms[1].setdefault(source.group, []).append(source.path)
        if stem not in (relative, source.group):
            forms[1].setdefault(stem, []).append(source.path)
    return forms


def _fitting(given: str, table: Path, names: list[dict[str, list[Path]]]) -> list[Path]:
    absolute = os.path.realpath(os.path.join(table.parent, given))
    plain = given.replace("\\", "/").removeprefix("./")
    for name, form in zip((absolute, plain, plain, plain), names, strict=True):
        if name in form:
            return list(dict.fromkeys(form[name]))
    return []


def _check_splits(found: dict[Path, SourceLabel]) -> None:
    sides: dict[str, str] = {}
    for line in found.values():
        if line.group is None or line.split is None:
            continue
        other = sides.setdefault(line.group, line.split)
        if other != line.split:
            raise UsageError(
                f"'{line.group}' is in split '{other}' and in split '{line.split}'.",
                "A patient or scene must stay on one side: correct the labels file.",
            )
