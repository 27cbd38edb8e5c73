"""A labels file: what is known about each source, and what must stay together in a split."""

from __future__ import annotations

import csv
import os
import posixpath
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from fmsuite.core.data.skipped import SkippedLog
from fmsuite.errors import UsageError, nearest
from fmsuite.tiling.sources import SourceFile

DEFAULT_NAME = "labels.csv"
"""Looked for in every folder that is given, if no labels file is named."""

IGNORE = "none"
"""As the name of the split column: sides are ignored."""

USUAL_NAMES = {
    "path": ("path", "file", "filename", "slide", "slide_id", "image"),
    "label": ("label", "class", "diagnosis"),
    "group": ("group", "patient", "patient_id", "case", "case_id", "scene"),
    "split": ("split", "fold", "set"),
}
"""By role, the columns that are taken where the options name none: the first that the file has, in any case."""


class LabelOptions(BaseModel):
    """The part of a domain's ``data:`` options that says what is known about its sources.

    Attributes:
        labels: a CSV file in UTF-8 whose first line names the columns. If not given, every ``labels.csv`` that lies
            directly in a given folder is used, for the sources below that folder; ``none`` uses no file at all.
        path_column: the column that names the source; see ``assign_labels``.
        label_column: the column of classes.
        group_column: the column of what must stay on one side of a split: patient, scene.
        split_column: the column of sides of the split; ``none`` ignores sides, whatever columns there are. Columns
            that are not named here are found by their usual names, ``USUAL_NAMES``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    labels: Literal["none"] | Path | None = None
    path_column: str | None = None
    label_column: str | None = None
    group_column: str | None = None
    split_column: str | None = None


@dataclass(frozen=True)
class SourceLabel:
    """What labels files say about one source; ``None`` where they say nothing."""

    label: str | None = None
    group: str | None = None
    split: str | None = None

    def merged(self, other: SourceLabel, where: str) -> SourceLabel:
        """Both together.

        Raises:
            UsageError: if they contradict each other; ``where`` names them.
        """
        known = {}
        for name in ("label", "group", "split"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if None not in (mine, theirs) and mine != theirs:
                raise UsageError(
                    f"{where}: lines contradict each other, {name} '{mine}' and '{theirs}'.", "Keep one of them."
                )
            known[name] = theirs if mine is None else mine
        return SourceLabel(**known)


@dataclass(frozen=True)
class Assigned:
    """Labels of sources.

    Attributes:
        by_path: source path to what is known about it; sources without a line are not in it.
        tables: the labels files.
        rows: how many lines these have.
    """

    by_path: dict[Path, SourceLabel] = field(default_factory=dict)
    tables: tuple[Path, ...] = ()
    rows: int = 0

    def of(self, *sources: SourceFile) -> SourceLabel:
        """What is known about a source, or about several that are one thing together (dates of a time series).

        Raises:
            UsageError: if what is known about several contradicts.
        """
        known = SourceLabel()
        for source in sources:
            where = f"{_listed(self.tables)}: '{source.relative}' and files of the same place"
            known = known.merged(self.by_path.get(source.path, SourceLabel()), where)
        return known

    def summary(self) -> dict[str, Any]:
        """For an index's metadata."""
        return {"files": [str(path) for path in self.tables], "rows": self.rows, "matched": len(self.by_path)}


@dataclass(frozen=True)
class _Line:
    source: str
    known: SourceLabel


def assign_labels(
    options: LabelOptions,
    paths: Sequence[str | os.PathLike],
    sources: Sequence[SourceFile],
    skipped: SkippedLog,
    places: Mapping[Path, str] | None = None,
) -> Assigned:
    """What labels files say about sources.

    A line names a source by the first of these forms that fits any: its path, absolute or from the labels file's
    folder; the name of its place; its path below the given folder; one of these paths, or the index's group,
    without the suffix; its file name; its file name without the suffix. A backslash may stand for a slash.

    Lines that name no source are recorded in ``skipped`` with the stage ``labels``. Several lines may name one source,
    as long as none contradicts another.

    Args:
        options: which files, which columns.
        paths: as given to ``tiling.sources.find_files``, which found ``sources``.
        places: source path to the name of what it shows (a place of which there are several dates). A line that names
            a place is about all of its sources, and a source without another group belongs to its place.

    Raises:
        UsageError: if a labels file cannot be read, lacks a column that was named, or has none that names the source;
            if none of its lines names a source; if a line names no or several sources or two lines contradict each
            other; if a group stands on several sides of the split, in whatever lines.
    """
    places = places or {}
    tables = _find_tables(options, paths)
    found: dict[Path, SourceLabel] = {}
    sides: list[tuple[str | None, str | None]] = []
    rows = 0
    folders = _Folders()
    for table in tables:
        lines = _read_table(table, options)
        rows += len(lines)
        candidates = [s for s in sources if options.labels is not None or folders.holds(table.parent, s.path)]
        names = _Names(candidates, places, folders)
        unmatched = []
        for line in lines:
            members = names.find(line.source, table)
            for path in members:
                found[path] = found.get(path, SourceLabel()).merged(line.known, f"{table}: '{line.source}'")
            if not members:
                unmatched.append(line.source)
            sides.append((line.known.group, line.known.split))
        if candidates and len(unmatched) == len(lines):
            raise UsageError(
                f"{table}: none of its {len(lines)} lines names one of the {len(candidates)} sources; "
                f"its first names '{lines[0].source}', the first source is '{candidates[0].relative}'.",
                "Name sources by their path below the given folder, or use the option labels=none.",
            )
        for name in unmatched:
            skipped.add(name, "labels", f"{table} names it, and no such source was found. Correct the line.")
    sides += [(known.group or places.get(path), known.split) for path, known in found.items()]
    refuse_shared_groups(sides, _listed(tables))
    return Assigned(found, tuple(tables), rows)


def _find_tables(options: LabelOptions, paths: Sequence[str | os.PathLike]) -> list[Path]:
    if options.labels == "none":
        return []
    if options.labels is not None:
        return [_absolute(options.labels)]
    beside = (_absolute(path) / DEFAULT_NAME for path in paths)
    return list({os.path.realpath(table): table for table in beside if table.is_file()}.values())


def _read_table(table: Path, options: LabelOptions) -> list[_Line]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            numbered = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except OSError as error:
        raise UsageError(f"{table}: the labels cannot be read ({error.strerror}).", "Check data.labels.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{table}: not a CSV file in UTF-8 ({error}).", "Save the table as CSV in UTF-8.") from error
    except csv.Error as error:
        raise UsageError(
            f"{table}: not a CSV file, from line {reader.line_num} on ({error}).", "Close every quote that is opened."
        ) from error
    rows = [(number, cells) for number, cells in numbered if any(cells)]
    header = rows[0][1] if rows else []
    columns = _columns(table, header, options)
    lines = []
    for number, cells in rows[1:]:
        if any(cells[len(header) :]):
            raise UsageError(
                f"{table}: line {number} has {len(cells)} cells, and the first line names {len(header)} columns.",
                "Put cells that hold a comma in quotes.",
            )
        cell = {role: cells[at] for role, at in columns.items() if at < len(cells)}
        source = cell.pop("path", "")
        if not source:
            raise UsageError(f"{table}: line {number} names no source.", f"Fill in its '{header[columns['path']]}'.")
        lines.append(_Line(source, SourceLabel(**{role: text or None for role, text in cell.items()})))
    if not lines:
        raise UsageError(f"{table}: it has no lines below the names of its columns.", "Use the option labels=none.")
    return lines


def _columns(table: Path, header: list[str], options: LabelOptions) -> dict[str, int]:
    """Position of each role's column; roles without one are left out."""
    named = {role: getattr(options, f"{role}_column") for role in USUAL_NAMES}
    found = {}
    for role, usual in USUAL_NAMES.items():
        name = named[role]
        if role == "split" and name == IGNORE:
            continue
        if name is None:
            # A column that the user gives one role ("group" as the label of emoji) does not play its usual one too.
            free = {column.lower(): column for column in reversed(header) if column not in named.values()}
            name = next((free[column] for column in usual if column in free), None)
        elif name not in header:
            raise UsageError(f"{table}: there is no column '{name}'.", nearest(name, header))
        if name is None:
            continue
        if header.count(name) > 1:
            raise UsageError(f"{table}: there are {header.count(name)} columns '{name}'.", "Rename all but one.")
        found[role] = header.index(name)
    if "path" not in found:
        if len(header) == 1 and any(mark in header[0] for mark in ";\t"):
            raise UsageError(
                f"{table}: its columns are not separated by commas; the first line is {header[0]!r}.",
                "Save the table as CSV with commas.",
            )
        raise UsageError(
            f"{table}: no column names the sources; it has {', '.join(header) or 'none'}.",
            f"Call one {' or '.join(USUAL_NAMES['path'])}, or name it with path_column.",
        )
    return found


class _Folders:
    """Resolves links in folders' paths, each folder once: a cohort has far more files than folders."""

    def __init__(self) -> None:
        self._real: dict[str, str] = {}

    def real(self, path: str | os.PathLike) -> str:
        folder, name = os.path.split(os.path.abspath(path))
        if folder not in self._real:
            self._real[folder] = os.path.realpath(folder)
        return os.path.join(self._real[folder], name)

    def all_real(self, path: str | os.PathLike) -> tuple[str, ...]:
        """With links in its folder resolved, and, for a link, what it leads to."""
        return (self.real(path), os.path.realpath(path)) if os.path.islink(path) else (self.real(path),)

    def holds(self, folder: Path, path: Path) -> bool:
        return path.is_relative_to(folder) or Path(self.real(path)).is_relative_to(os.path.realpath(folder))


class _Names:
    """The names by which lines may call sources, from the most exact form to the loosest."""

    def __init__(self, sources: Sequence[SourceFile], places: Mapping[Path, str], folders: _Folders) -> None:
        self._folders = folders
        self._forms: list[dict[str, list[Path]]] = [{} for _ in range(6)]
        self._place_form = 1
        for source in sources:
            name, place = source.path.name, places.get(source.path)
            stems = (name.removesuffix(source.suffix), source.path.stem)
            below = posixpath.dirname(source.relative)
            real = folders.real(source.path)
            named: tuple[Iterable[str], ...] = (
                folders.all_real(source.path),
                () if place is None else (place,),
                (source.relative,),
                (
                    source.group,
                    *(posixpath.join(below, stem) for stem in stems),
                    *(os.path.join(os.path.dirname(real), stem) for stem in stems),
                ),
                (name,),
                stems,
            )
            for form, calls in zip(self._forms, named, strict=True):
                for call in dict.fromkeys(calls):
                    form.setdefault(call, []).append(source.path)

    def find(self, given: str, table: Path) -> list[Path]:
        """The sources that a line of ``table`` names: none, one, or all of a place.

        Raises:
            UsageError: if it fits several.
        """
        for text in dict.fromkeys((given, given.replace("\\", "/"))):
            absolute = os.path.join(table.parent, os.path.expanduser(text))
            keys = dict.fromkeys((text, posixpath.normpath(text), *self._folders.all_real(absolute)))
            for number, form in enumerate(self._forms):
                fitting = list(dict.fromkeys(path for key in keys for path in form.get(key, ())))
                if len(fitting) > 1 and number != self._place_form:
                    raise UsageError(
                        f"{table}: '{given}' names {len(fitting)} files, such as {fitting[0]} and {fitting[1]}.",
                        "Write the path below the given folder, with its suffix.",
                    )
                if fitting:
                    return fitting
        return []


def refuse_shared_groups(
    pairs: Iterable[tuple[str | None, str | None]], where: str, column: str = "split_column"
) -> None:
    """Refuse groups that stand on several sides of a split.

    Args:
        pairs: group and side.
        where: what says so, for the message.
        column: the option that ignores sides, for the message.

    Raises:
        UsageError: naming some of them.
    """
    sides: dict[str, set[str]] = defaultdict(set)
    for group, split in pairs:
        if group is not None and split is not None:
            sides[group].add(split)
    shared = sorted(group for group, found in sides.items() if len(found) > 1)
    if shared:
        examples = ", ".join(f"'{group}' ({' and '.join(sorted(sides[group]))})" for group in shared[:3])
        more = f" and {len(shared) - 3} more" if len(shared) > 3 else ""
        raise UsageError(
            f"{where}: on several sides of the split: {examples}{more}.",
            f"A patient or scene must stay on one side: correct the labels file, or ignore sides with {column}="
            f"{IGNORE}.",
        )


def _absolute(path: str | os.PathLike) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))


def _listed(tables: Sequence[Path]) -> str:
    return ", ".join(map(str, tables))
