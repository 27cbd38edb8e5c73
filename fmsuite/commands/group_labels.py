"""What is known about each group of a feature store (slide, folder, patient): from its index, or from a labels file."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from fmsuite.core.data.grouping import By, group_codes
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.errors import UsageError
from fmsuite.tiling.labels import IGNORE, LabelOptions, assign_labels
from fmsuite.tiling.sources import SourceFile

_NAMED = 3
_SUFFIX = re.compile(r"(\.nii|\.ome)?\.[^.]+$", re.IGNORECASE)
_OPTIONS = {
    "data.labels": "--labels",
    "or use the option labels=none": "or leave out --labels to take the index's own labels",
    "Use the option labels=none": "Leave out --labels to take the index's own labels",
    "path_column": "--path-column",
    "split_column=": "--split-column ",
}


@dataclass(frozen=True)
class IndexGroup:
    """What an index says about one group of a store; the columns' values, each once, in the order of their rows.

    Attributes:
        id: as in ``core.data.grouping.group_codes``.
        rows: how many windows it has.
        sources: of its windows.
        labels, patients, splits: values of the index's columns ``label``, ``group`` and ``split``; missing ones are
            left out.
    """

    id: str
    rows: int
    sources: tuple[str, ...]
    labels: tuple[str, ...]
    patients: tuple[str, ...]
    splits: tuple[str, ...]


@dataclass(frozen=True)
class LabelledGroup:
    """A group with a label.

    Attributes:
        patient: groups of one patient (or scene) stay on one side of a split.
        split: its side, if any is known and sides are not ignored.
    """

    id: str
    label: str
    patient: str
    split: str | None


@dataclass(frozen=True)
class LabelColumns:
    """A labels file and the names of its columns; ``None`` for their usual names (``tiling.labels.USUAL_NAMES``)."""

    file: Path | None = None
    path: str | None = None
    label: str | None = None
    patient: str | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        given = {"--path-column": self.path, "--label-column": self.label, "--patient-column": self.patient}
        if self.split != IGNORE:
            given["--split-column"] = self.split
        named = [option for option, column in given.items() if column is not None]
        if named and self.file is None:
            raise UsageError(
                f"{named[0]} names a column of a labels file, and none is given.", "Give it with --labels."
            )


def index_groups(index: SampleIndex, by: By) -> list[IndexGroup]:
    """The groups of an index as a feature store has them, in the order of their first rows."""
    names, codes = group_codes(index, by)
    rows = np.bincount(codes, minlength=len(names))
    columns = {name: _values(index, name, codes, len(names)) for name in ("source", "label", "group", "split")}
    return [
        IndexGroup(
            name,
            int(rows[code]),
            columns["source"][code],
            columns["label"][code],
            columns["group"][code],
            columns["split"][code],
        )
        for code, name in enumerate(names)
    ]


def labelled_groups(
    groups: Sequence[IndexGroup], by: By, unit: str, columns: LabelColumns, skipped: SkippedLog, where: str
) -> list[LabelledGroup]:
    """The groups that have a label; the others, and lines of the labels file that name nothing, go to ``skipped``.

    With a labels file, labels are its alone; patients and sides that it does not give are the index's. A line names a
    group as ``tiling.labels.assign_labels`` says: a slide by its path or name, a patient or scene by the name that the
    index has for it, a folder by its path or name.

    Args:
        by: how the store is grouped.
        unit: what a group is, in the singular.
        where: what the index is, for messages: the store.

    Raises:
        UsageError: as ``assign_labels``; if a group's windows have several labels or sides, a patient is on several
            sides, nothing is labelled, or everything is of one class.
    """
    if columns.file is None:
        known = [_from_index(group, unit, columns.split, where) for group in groups]
        origin = where
    else:
        known = _from_file(groups, by, unit, columns, skipped, where)
        origin = str(columns.file)
    patients = _patients(groups, [found.patient for found in known])
    labelled = [
        LabelledGroup(group.id, found.label, patient, found.split)
        for group, found, patient in zip(groups, known, patients, strict=True)
        if found.label is not None
    ]
    if not labelled:
        raise UsageError(
            f"{origin}: none of the {len(groups)} {unit}s has a label.",
            "Give a CSV file with --labels that has a column of labels; --label-column names it."
            if columns.file is None
            else "Call its column of labels label, class or diagnosis, or name it with --label-column.",
        )
    for group, found in zip(groups, known, strict=True):
        if found.label is None:
            skipped.add(group.id, "labels", f"This {unit} has no label in {origin}, so it is left out.")
    _refuse_several_sides(labelled, origin)
    classes = {group.label for group in labelled}
    if len(classes) < 2:
        raise UsageError(
            f"{origin}: all {len(labelled)} labelled {unit}s are of one class, '{labelled[0].label}': there is nothing "
            "to tell apart.",
            f"Label {unit}s of another class, or name another column with --label-column.",
        )
    return labelled


@dataclass(frozen=True)
class _Known:
    label: str | None
    patient: str | None
    split: str | None


def _values(index: SampleIndex, column: str, codes: np.ndarray, groups: int) -> list[tuple[str, ...]]:
    """For each group the values of a column, each once."""
    encoded = index.table.column(column).cast(pa.string()).combine_chunks().dictionary_encode()
    names = encoded.dictionary.to_pylist()
    values = encoded.indices.fill_null(-1).to_numpy()
    present = np.flatnonzero(values >= 0)
    pairs = codes[present].astype(np.int64) * max(1, len(names)) + values[present]
    _, first = np.unique(pairs, return_index=True)
    found: list[list[str]] = [[] for _ in range(groups)]
    for place in np.sort(first):
        found[codes[present[place]]].append(names[values[present[place]]])
    return [tuple(members) for members in found]


def _from_index(group: IndexGroup, unit: str, split_column: str | None, where: str) -> _Known:
    if len(group.labels) > 1:
        raise UsageError(
            f"{where}: the windows of {unit} '{group.id}' have several labels: {_listed(group.labels)}.",
            f"Give every {unit} one label with --labels, or embed with another --by.",
        )
    return _Known(group.labels[0] if group.labels else None, None, _index_side(group, unit, split_column, where))


def _index_side(group: IndexGroup, unit: str, split_column: str | None, where: str) -> str | None:
    if split_column == IGNORE or not group.splits:
        return None
    if len(group.splits) > 1:
        raise UsageError(
            f"{where}: the windows of {unit} '{group.id}' are on several sides of the split: {_listed(group.splits)}.",
            f"Embed with another --by, or ignore the split with --split-column {IGNORE}.",
        )
    return group.splits[0]


def _from_file(
    groups: Sequence[IndexGroup], by: By, unit: str, columns: LabelColumns, skipped: SkippedLog, where: str
) -> list[_Known]:
    options = LabelOptions(
        labels=columns.file,
        path_column=columns.path,
        label_column=columns.label,
        group_column=columns.patient,
        split_column=columns.split,
    )
    sources, members, places = nameable(groups, by)
    try:
        assigned = assign_labels(options, (), sources, skipped, places)
        known = [assigned.of(*files) for files in members]
    except UsageError as error:
        hint = error.hint
        for option, flag in _OPTIONS.items():
            hint = hint.replace(option, flag)
        raise UsageError(error.message, hint) from error
    # A file without sides leaves those of the index.
    from_index = not any(found.split for found in known)
    sides = [_index_side(group, unit, columns.split, where) if from_index else None for group in groups]
    return [_Known(found.label, found.group, found.split or side) for found, side in zip(known, sides, strict=True)]


def nameable(groups: Sequence[IndexGroup], by: By) -> tuple[list[SourceFile], list[list[SourceFile]], dict[Path, str]]:
    """What lines may name; for each group which of it is the group's; and the place of each source, the index's group.

    A folder of files can be named itself, so it stands among the sources.
    """
    root = _common_folder([source for group in groups for source in group.sources])
    files: list[SourceFile] = []
    folders: list[SourceFile] = []
    members: list[list[SourceFile]] = []
    places: dict[Path, str] = {}
    for group in groups:
        own = []
        for source in group.sources:
            path = Path(source)
            relative = _below(path, root)
            suffix = _SUFFIX.search(path.name)
            name = group.id if by == "source" else relative
            own.append(SourceFile(path, name, relative, root, suffix.group() if suffix else ""))
        files += own
        if by == "folder":
            for folder in dict.fromkeys(Path(source).parent for source in group.sources):
                own.append(SourceFile(folder, group.id, _below(folder, root), root, ""))
                folders.append(own[-1])
        if len(group.patients) == 1:
            places.update((file.path, group.patients[0]) for file in own)
        members.append(own)
    return folders + files, members, places


def _common_folder(sources: Sequence[str]) -> Path:
    try:
        return Path(os.path.commonpath([os.path.dirname(source) for source in sources]))
    except ValueError:
        # On several drives.
        return Path(Path(sources[0]).anchor)


def _below(path: Path, root: Path) -> str:
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _patients(groups: Sequence[IndexGroup], given: Sequence[str | None]) -> list[str]:
    """What a labels file says, or else the index's group. Groups that share one of these belong together; a group with
    several, and what belongs with it, is called by its own name."""
    owners: dict[tuple[str, ...], int] = {}
    parent = list(range(len(groups)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    names = [
        (patient,) if patient is not None else group.patients or (group.id,)
        for group, patient in zip(groups, given, strict=True)
    ]
    for number, own in enumerate(names):
        for name in own:
            parent[root(number)] = root(owners.setdefault((name,), number))
    spans: dict[int, set[str]] = {}
    for number, own in enumerate(names):
        spans.setdefault(root(number), set()).update(own)
    return [
        names[number][0] if len(spans[root(number)]) == 1 else groups[root(number)].id for number in range(len(groups))
    ]


def _refuse_several_sides(labelled: Sequence[LabelledGroup], origin: str) -> None:
    sides: dict[str, set[str]] = {}
    for group in labelled:
        if group.split is not None:
            sides.setdefault(group.patient, set()).add(group.split)
    shared = sorted(patient for patient, found in sides.items() if len(found) > 1)
    if shared:
        examples = [f"'{patient}' ({' and '.join(sorted(sides[patient]))})" for patient in shared[:_NAMED]]
        more = f" and {len(shared) - _NAMED} more" if len(shared) > _NAMED else ""
        raise UsageError(
            f"{origin}: on several sides of the split: {', '.join(examples)}{more}.",
            f"A patient or scene must stay on one side: correct the labels file, or ignore the split with "
            f"--split-column {IGNORE}.",
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(f"'{name}'" for name in names[:_NAMED]) + more
