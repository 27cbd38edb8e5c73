"""When pictures were taken: dates in file names, or in a table; and how many of a series a view shows."""

from __future__ import annotations

import csv
import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fmsuite.core.data.sample import ArraySample
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.errors import ReadFailure, UsageError
from fmsuite.tiling.labels import _Folders, _Names
from fmsuite.tiling.sources import SourceFile

DATE = (
    r"(?<!\d)(?P<year>(?:19|20)\d\d)[-_]?(?P<month>0[1-9]|1[0-2])[-_]?(?P<day>0[1-9]|[12]\d|3[01])"
    r"(?:T(?P<hour>[01]\d|2[0-3])[-:]?(?P<minute>[0-5]\d)(?:[-:]?[0-5]\d)?)?(?!\d)"
)
"""Finds 20240131, 2024-01-31 and 2024_01_31 in a file name, and with a time 20240131T101031."""
DATE_WITHOUT_TIME = (
    r"(?<!\d)(?P<year>(?:19|20)\d\d)[-_]?(?P<month>0[1-9]|1[0-2])[-_]?(?P<day>0[1-9]|[12]\d|3[01])(?!\d)"
)
"""What runs and indexes of earlier versions say where nobody chose a pattern."""
EPOCH = datetime.datetime(2000, 1, 1)
COLUMNS = ("path", "date", "place")
_STEPS = 144
"""Of a day, in which dates are handed out: ten minutes. See ``core.backbones.calendar``."""
_SHOWN = 5
"""Bad lines that a message names."""


class DateOptions(BaseModel):
    """The part of the ``data:`` options that says when pictures were taken.

    Attributes:
        series: files of one place become one time series, axes (time, y, x). Without a ``place_pattern`` the place
            is the file's path below the given folder, without the date, suffix and separators at its ends. A folder in
            eo-learn's layout (``eopatch.py``) is a series by itself.
        date_pattern: regular expression with the groups ``year``, ``month`` and ``day``, and ``hour`` and ``minute``
            where names have them, for ``series``.
        dates: a CSV file with the columns ``path`` and ``date`` (ISO 8601, with or without a time; one with an
            offset is taken to UTC) and, if wanted, ``place``, in place of dates in names. Lines name files as those of
            a labels file do. Without a place, the place is what ``date_pattern`` leaves of the name, or the folder
            where the pattern is not found in it. Files without a line are skipped.
        dates_per_sample: views that are varied show so many dates, drawn anew for each; views that are not (for
            embedding, probes, judging) show all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    series: bool = False
    date_pattern: str = DATE
    dates: Path | None = None
    dates_per_sample: int | None = Field(default=None, ge=1)

    @field_validator("date_pattern")
    @classmethod
    def _finds_dates(cls, pattern: str) -> str:
        try:
            groups = set(re.compile(pattern).groupindex)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        if not {"year", "month", "day"} <= groups:
            raise ValueError("date_pattern needs the named groups year, month and day: (?P<year>...)")
        if "minute" in groups and "hour" not in groups:
            raise ValueError("date_pattern has the group minute and not hour")
        return pattern

    @field_validator("dates")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser().absolute()

    @model_validator(mode="after")
    def _of_series(self) -> DateOptions:
        if not self.series:
            for key, given in (
                ("date_pattern", self.date_pattern not in (DATE, DATE_WITHOUT_TIME)),
                ("dates", self.dates is not None),
                ("dates_per_sample", self.dates_per_sample is not None),
            ):
                if given:
                    raise ValueError(f"{key} has a meaning only with series: true")
        return self


@dataclass(frozen=True)
class Taken:
    """What a table says of a file.

    Attributes:
        day: days since 2000-01-01, with the time as the fraction.
        place: where it says so.
    """

    day: float
    place: str | None = None


def days_of(date: datetime.datetime) -> float:
    """Days since 2000-01-01, with the time as the fraction; a date with an offset is taken to UTC."""
    if date.tzinfo is not None:
        date = date.astimezone(datetime.UTC).replace(tzinfo=None)
    return (date - EPOCH) / datetime.timedelta(days=1)


def carried(days: Sequence[float]) -> np.ndarray:
    """(T,) float32 as samples carry dates: the last whole ten minutes, which float32 can tell apart until 2179."""
    return (np.floor(np.asarray(days, dtype=np.float64) * _STEPS + 1e-6) / _STEPS).astype(np.float32)


def date_in_name(path: str, name: str, pattern: str) -> tuple[float, tuple[int, int]]:
    """The day, and which characters of the name say so.

    Raises:
        ReadFailure: if there is no date in it.
    """
    found = re.search(pattern, name)
    if found is None:
        raise ReadFailure(
            path, "metadata", "no date in its name.", "Set data.date_pattern, data.dates, or series: false."
        )
    parts = {key: int(text) for key, text in found.groupdict().items() if text and key in _PARTS}
    try:
        return days_of(datetime.datetime(**parts)), found.span()  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise ReadFailure(
            path, "metadata", f"'{found[0]}' in its name is not a date ({error}).", "Set data.date_pattern."
        ) from error


_PARTS = ("year", "month", "day", "hour", "minute")


def read_dates(table: Path, files: Sequence[SourceFile], skipped: SkippedLog) -> dict[Path, Taken]:
    """What a table says of files. Lines that name none are recorded in ``skipped`` with the stage ``dates``.

    Raises:
        UsageError: if the table cannot be read, lacks a column, or has a date that cannot be parsed; if no line names a
            file, or two say different things of one.
    """
    lines = _read_lines(table)
    names = _Names(files, {}, _Folders())
    found: dict[Path, Taken] = {}
    unmatched = []
    for number, name, taken in lines:
        members = names.find(name, table)
        if not members:
            unmatched.append((number, name))
        for path in members:
            if found.setdefault(path, taken) != taken:
                raise UsageError(
                    f"{table}: line {number} says another date or place of '{name}' than a line before it.",
                    "Keep one of them.",
                )
    if files and not found:
        raise UsageError(
            f"{table}: none of its {len(lines)} lines names one of the {len(files)} files; its first names "
            f"'{lines[0][1]}', the first file is '{files[0].relative}'.",
            "Name files by their path below the given folder, or give their own table in data.dates.",
        )
    for number, name in unmatched:
        skipped.add(name, "dates", f"{table}, line {number}, names it, and no such file was found. Correct the line.")
    return found


def _read_lines(table: Path) -> list[tuple[int, str, Taken]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True, skipinitialspace=True)
            header = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{table}: the dates cannot be read ({error}).", "Check data.dates.") from error
    missing = [name for name in COLUMNS[:2] if name not in header]
    if missing:
        raise UsageError(
            f"{table}: there is no column '{missing[0]}'; it has {', '.join(header) or 'none'}.",
            "Give a CSV file whose first line names the columns path and date, and place if wanted.",
        )
    lines, wrong = [], []
    for number, row in rows:
        name, text, place = ((row.get(key) or "").strip() for key in COLUMNS)
        if not (name or text or place):
            continue
        try:
            if not name:
                raise ValueError("it names no file")
            lines.append((number, name, Taken(days_of(datetime.datetime.fromisoformat(text)), place or None)))
        except ValueError:
            wrong.append(f"line {number} ({f'{text!r} is no date' if name else 'it names no file'})")
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UsageError(
            f"{table}: {', '.join(wrong[:_SHOWN])}{more}.",
            "Write dates as 2024-01-31 or 2024-01-31T10:05.",
        )
    if not lines:
        raise UsageError(f"{table}: it has no lines below the names of its columns.", "Leave data.dates out.")
    return lines


def taken_of(file: SourceFile, dates: Mapping[Path, Taken], pattern: str) -> tuple[Taken, tuple[int, int] | None]:
    """What the table says of a file, and which characters of its name are a date, if any are.

    Raises:
        ReadFailure: if it says nothing.
    """
    taken = dates.get(file.path)
    if taken is None:
        raise ReadFailure(str(file.path), "dates", "data.dates has no line for it.", "Add one, or leave the file out.")
    found = re.search(pattern, file.path.name)
    return taken, None if found is None else found.span()


def some_dates(sample: ArraySample, count: int, generator: np.random.Generator) -> ArraySample:
    """A series with ``count`` of its dates at most, drawn without replacement from those that show something (or from
    all, if too few do), in their order."""
    days = sample.coords["time"]
    if len(days) <= count:
        return sample
    shown = np.ones(len(days), dtype=bool)
    if sample.valid is not None:
        shown = np.asarray(sample.valid.any(axis=(0, *range(2, sample.valid.ndim))))
    order = generator.permutation(len(days))
    chosen = np.sort(order[np.argsort(~shown[order], kind="stable")][:count])
    return sample.replace(
        values=sample.values[:, chosen],
        valid=None if sample.valid is None else sample.valid[:, chosen],
        coords={**sample.coords, "time": days[chosen]},
        maps={
            name: labels[chosen] if labels.ndim == sample.values.ndim - 1 else labels
            for name, labels in sample.maps.items()
        },
    )
