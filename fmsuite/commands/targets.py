"""What is asked of an encoder beside an index's own labels: columns of a labels file, as classes, number, findings."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fmsuite.commands.comparison import class_order, file_name
from fmsuite.commands.group_labels import index_groups, nameable
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.errors import UsageError
from fmsuite.tiling.labels import DEFAULT_NAME, LabelOptions, SourceLabel, assign_labels

Kind = Literal["classes", "number", "findings"]

OPTION: dict[Kind, str] = {"classes": "--classify", "number": "--regress", "findings": "--findings"}
NOTHING = ("none", "no finding", "no findings")
"""A cell that says so says that none of the findings is there."""
YES, NO, UNSURE = ("1", "true", "yes"), ("0", "false", "no"), ("-1", "uncertain")

_AGE = re.compile(r"(\d{3})([DWMY])")
_YEARS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}
_LONGEST_NAME = 60


@dataclass(frozen=True)
class Target:
    """
    Attributes:
        columns: of the labels file. One for classes and numbers; for findings one that lists those that are there
            (``a|b``), or one for each finding, which says 1 or 0.
    """

    kind: Kind
    columns: tuple[str, ...]

    @property
    def name(self) -> str:
        """Unique among targets of a kind, and fit for a folder."""
        whole = file_name("+".join(self.columns))
        return whole if len(whole) <= _LONGEST_NAME else f"{file_name(self.columns[0])}+{len(self.columns) - 1}-more"


@dataclass(frozen=True)
class Values:
    """A target of every source.

    Attributes:
        target: of classes (U,) int64, -1 where unknown; of a number (U,) float64, NaN where unknown; of findings (U, K)
            float64, 1, 0, or NaN where unknown.
        names: of classes or findings; empty for a number.
    """

    target: Tensor
    names: list[str]

    @property
    def known(self) -> Tensor:
        """(U,) bool; of findings at least one."""
        if self.target.dtype == torch.int64:
            return self.target >= 0
        there = ~self.target.isnan()
        return there.any(1) if there.dim() > 1 else there


def read_columns(
    index: SampleIndex, columns: Sequence[str], labels: Path | None, skipped: SkippedLog
) -> dict[str, list[SourceLabel]]:
    """What labels files say of every source, in the order of ``group_codes(index, "source")``.

    Args:
        columns: each is read in the place of the labels; groups and sides are the files' own.
        labels: a CSV file; if not given, those that the index was labelled by.
        skipped: takes lines that name no source.

    Raises:
        UsageError: if there is no labels file, it lacks a column, or as ``assign_labels``.
    """
    recorded = [Path(file) for file in (index.metadata.get("labels") or {}).get("files", [])]
    files = [labels] if labels is not None else recorded
    if not files:
        raise UsageError(
            "The index was made without a labels file, so there are no columns to ask for.", "Name a CSV with --labels."
        )
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise UsageError(f"{missing}: there is no such labels file.", "Name the CSV with --labels.")
    made_with: dict[str, Any] = index.metadata.get("options") or {}
    roles = {} if labels is not None else {f"{role}_column" for role in ("path", "group", "split")}
    shared = {key: made_with[key] for key in roles if made_with.get(key) is not None}
    # One column may have two roles: what the index took for its group can be asked for as well.
    shared = {key: column for key, column in shared.items() if column not in columns or key == "path_column"}
    several = len(files) > 1 and all(file.name == DEFAULT_NAME for file in files)
    members, places = _members(index)
    sources = list(dict.fromkeys(file for own in members for file in own))
    found = {}
    for number, column in enumerate(columns):
        log = skipped if number == 0 else SkippedLog(None)
        options = {**shared, "label_column": column}
        if several:
            folders = [file.parent for file in files]
            assigned = [assign_labels(LabelOptions(**options), folders, sources, log, places)]
        else:
            assigned = [assign_labels(LabelOptions(labels=file, **options), (), sources, log, places) for file in files]
        found[column] = [_merged([table.of(*own) for table in assigned], column) for own in members]
    return found


def _members(index: SampleIndex) -> tuple[list[list[Any]], dict[Path, str]]:
    _, members, places = nameable(index_groups(index, "source"), "source")
    return members, places


def _merged(known: Sequence[SourceLabel], column: str) -> SourceLabel:
    whole = known[0]
    for other in known[1:]:
        whole = whole.merged(other, f"Labels files, column '{column}'")
    return whole


def parse(target: Target, cells: Sequence[Sequence[str | None]]) -> Values:
    """
    Args:
        cells: for each of the target's columns the cell of every source, ``None`` where there is none.

    Raises:
        UsageError: naming the column and a cell that is no number, or neither yes nor no; if nothing is known.
    """
    if target.kind == "classes":
        values = _classes(cells[0])
    elif target.kind == "number":
        values = Values(torch.tensor([_number(cell, target.columns[0]) for cell in cells[0]], dtype=torch.float64), [])
    elif len(cells) == 1:
        values = _listed(cells[0])
    else:
        rows = [[_there(cell, name) for cell in column] for name, column in zip(target.columns, cells, strict=True)]
        values = Values(torch.tensor(rows, dtype=torch.float64).T.contiguous(), list(target.columns))
    if not bool(values.known.any()):
        raise UsageError(
            f"Nothing is known of {', '.join(target.columns)}: the cells of all sources are empty.",
            f"Name another column with {OPTION[target.kind]}.",
        )
    return values


def _classes(cells: Sequence[str | None]) -> Values:
    names = sorted({cell for cell in cells if cell is not None}, key=class_order)
    code = {name: number for number, name in enumerate(names)}
    return Values(torch.tensor([-1 if cell is None else code[cell] for cell in cells]), names)


def _number(cell: str | None, column: str) -> float:
    """Also DICOM's ages: ``063Y`` is 63, ``018M`` is 1.5."""
    if cell is None:
        return math.nan
    age = _AGE.fullmatch(cell)
    if age is not None:
        return int(age[1]) * _YEARS[age[2]]
    try:
        number = float(cell)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(
            f"The column '{column}' has '{cell}', which is no number.",
            "Leave cells of what is unknown empty, or ask for classes with --classify.",
        )
    return number


def _listed(cells: Sequence[str | None]) -> Values:
    parts = [None if cell is None else [part.strip() for part in cell.split("|") if part.strip()] for cell in cells]
    there = [None if own is None else {part for part in own if part.lower() not in NOTHING} for own in parts]
    names = sorted(set().union(*(own for own in there if own is not None)))
    rows = [[math.nan if own is None else float(name in own) for name in names] for own in there]
    if not names:
        return Values(torch.full((len(cells), 1), torch.nan, dtype=torch.float64), ["none"])
    return Values(torch.tensor(rows, dtype=torch.float64), names)


def _there(cell: str | None, column: str) -> float:
    said = "" if cell is None else cell.lower().removesuffix(".0")
    if not said or said in UNSURE:
        return math.nan
    if said in (*YES, *NO):
        return float(said in YES)
    raise UsageError(
        f"The column '{column}' of findings has '{cell}', which is neither 1 nor 0.",
        "Write 1 where the finding is there, 0 where it is not, nothing where it is unknown; a single column may list "
        "findings as a|b.",
    )
