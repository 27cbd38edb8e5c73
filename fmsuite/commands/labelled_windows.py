"""Labelled windows with two sides: what ``bench`` trains its classifiers on, and what it asks them about."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fmsuite.commands.comparison import class_order
from fmsuite.core.data.grouping import group_codes
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.evaluation.folds import Asked, Folds, folds_by_group, lonely
from fmsuite.core.evaluation.results import Item
from fmsuite.core.evaluation.splits import (
    TEST,
    TEST_SHARE,
    TRAIN,
    Split,
    given_split,
    refuse_missing_classes,
    refuse_one_class,
    refuse_shared_groups,
    split_by_group,
)
from fmsuite.core.features import FeatureStore
from fmsuite.core.reports.wording import counted
from fmsuite.errors import UsageError


@dataclass(frozen=True)
class LabelledWindows:
    """
    Attributes:
        index: the windows that have a label and a side.
        rows: (S,) int64 rows of ``index`` that take part, ascending.
        labels: (S,) int64 positions in ``classes``.
        groups: (S,) int64 positions in ``group_names``.
        split: of the S, or the folds that ask about each of them once.
        unit: what a window is called, in the singular.
        seed: of the split, where one is made.
        notes: what was left out, in sentences.
    """

    index: SampleIndex
    rows: Tensor
    labels: Tensor
    groups: Tensor
    classes: list[str]
    group_names: list[str]
    split: Split | Folds
    unit: str
    seed: int
    notes: list[str]

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of(cls, whole: SampleIndex, seed: int, unit: str, where: str, folds: Asked | None = None) -> LabelledWindows:
        """Those of an index, with its own split or one made here; or with folds, whatever sides the index has.

        Args:
            seed: of the split, where one is made.
            where: the data, for messages.
            folds: ask about every window, by so many classifiers that did not see its group. Classes of one group
                are left out: who has not seen the group has not seen the class.

        Raises:
            UsageError: if there are no labels, fewer than two classes, no usable split, a class is missing on a side,
                or a group is on both; for folds that cannot be made.
        """
        labelled = [n for n, label in enumerate(_column(whole, "label")) if label is not None]
        if not labelled:
            raise UsageError(
                f"{where}: none of the {counted(len(whole), unit)} has a label.", _way_to_labels(whole.metadata)
            )
        notes = []
        if len(labelled) < len(whole):
            notes.append(f"Left out: {counted(len(whole) - len(labelled), unit)} without a label.")
        index = whole.select(labelled)
        given = None
        if folds is not None:
            index = cls._in_several_groups(index, unit, notes)
        elif (given := given_split(_column(index, "split"))) is not None:
            index, given = cls._on_sides(index, given, unit, notes)
        groups = [str(group) for group in _column(index, "group")]
        classes = sorted(index.label_names, key=class_order)
        code = {name: number for number, name in enumerate(classes)}
        labels = torch.tensor([code[str(label)] for label in _column(index, "label")])
        refuse_one_class(classes)
        names, position = np.unique(np.asarray(groups), return_inverse=True)
        split: Split | Folds
        if folds is not None:
            split = folds_by_group(one_hot(labels), torch.from_numpy(position), folds, seed, classes)
        else:
            split = given or split_by_group(labels, groups, classes, seed)
            refuse_shared_groups(split, groups)
            refuse_missing_classes(split, labels, classes)
        return cls(
            index,
            torch.arange(len(index)),
            labels,
            torch.from_numpy(position),
            classes,
            [str(name) for name in names],
            split,
            unit,
            seed,
            notes,
        )

    @staticmethod
    def _on_sides(index: SampleIndex, given: Split, unit: str, notes: list[str]) -> tuple[SampleIndex, Split]:
        """Without the windows that are on neither side."""
        kept = torch.cat([given.train, given.test]).sort().values
        left = len(index) - len(kept)
        if left:
            others = sorted({str(side or "none") for side in _column(index, "split")} - {TRAIN, TEST})
            notes.append(f"Left out: {counted(left, unit)} of other sides of the split ({', '.join(others)}).")
        return index.select(kept.numpy()), given.among(kept)

    @staticmethod
    def _in_several_groups(index: SampleIndex, unit: str, notes: list[str]) -> SampleIndex:
        """Without the windows of classes that are of one group; says so, and that sides were not kept to."""
        if any(side is not None for side in _column(index, "split")):
            notes.append("The sides of the split that the data name were not kept to: folds ask about everything.")
        labels, groups = _column(index, "label"), _column(index, "group")
        where: dict[str, set[str]] = {}
        for label, group in zip(labels, groups, strict=True):
            where.setdefault(str(label), set()).add(str(group))
        alone = {label: next(iter(own)) for label, own in where.items() if len(own) == 1}
        for label, group in sorted(alone.items()):
            notes.append(
                f"Left out: {counted(labels.count(label), unit)} of '{label}', all of one group ('{group}'): a "
                "classifier that has not seen the group has not seen the class."
            )
        kept = [row for row, label in enumerate(labels) if label not in alone]
        if len(where) - len(alone) < 2:
            raise UsageError(
                f"Fewer than two classes are of several groups (of one: {', '.join(map(repr, sorted(alone)))}), so "
                "no classifier can be asked about a group that it has not seen.",
                "Label windows of further groups (scenes, patients), or name the groups with data.group_column.",
            )
        return index.select(kept)

    @property
    def said(self) -> str:
        """One sentence on the split."""
        if isinstance(self.split, Folds):
            return (
                f"{self.split.said(self.seed)}; each of {counted(len(self), self.unit)} of "
                f"{counted(len(self.groups.unique()), 'group')} is asked once, by a classifier that did not see its "
                "group."
            )
        sides = " and ".join(
            f"{counted(len(side), self.unit)} of {counted(len(self.groups[side].unique()), 'group')} {purpose}"
            for side, purpose in ((self.split.train, "to train on"), (self.split.test, "to be asked"))
        )
        if self.split.made:
            return (
                f"Made here, as the data name no sides: by group, classes alike on both, {TEST_SHARE:.0%} to be asked, "
                f"seed {self.seed}; {sides}."
            )
        return f"As the data give it; {sides}."

    def restricted(self, stored: Sequence[Tensor]) -> LabelledWindows:
        """Only the windows of which every encoder has features.

        Args:
            stored: for each encoder the rows of ``index`` that it has.

        Raises:
            UsageError: if a class is then missing on a side.
        """
        everywhere = torch.zeros(len(self.index), dtype=torch.int64)
        for rows in stored:
            everywhere[rows] += 1
        kept = torch.nonzero(everywhere == len(stored)).flatten()
        if len(kept) == len(self):
            return self
        split: Split | Folds
        labels, groups = self.labels[kept], self.groups[kept]
        if isinstance(self.split, Folds):
            alone = lonely(labels, groups, len(self.classes))
            if alone:
                raise UsageError(
                    f"Of the windows that can be read, those of '{self.classes[alone[0]]}' are of one group.",
                    "Mend the files that skipped.csv names, or take the labels of that class out.",
                )
            split = folds_by_group(one_hot(labels), groups, self.split.asked, self.seed, self.classes)
        else:
            split = self.split.among(kept)
            refuse_missing_classes(split, labels, self.classes)
        note = f"Left out: {counted(len(self) - len(kept), self.unit)} that could not be read; see skipped.csv."
        return replace(
            self,
            rows=kept,
            labels=labels,
            groups=groups,
            split=split,
            notes=[*self.notes, note],
        )

    def rows_of(self, items: Tensor) -> Tensor:
        """(N,) rows of the index of some items' windows.

        Args:
            items: (n,) int64.
        """
        return self.rows[items]

    def features(self, store: FeatureStore) -> Tensor:
        """(I, D) float32 of the items, in their order."""
        return store.read_all(self.rows.numpy())[0]

    def items(self) -> list[Item]:
        """One for each window, named by its file and, where a file has several, its corner."""
        sources, codes = group_codes(self.index, "source")
        several = np.bincount(codes) > 1
        positions = self.index.table.column("position").to_pylist()
        side: list[str | None] = [None] * len(self)
        for name, members in sides_of(self.split):
            for member in members.tolist():
                side[member] = name
        found = []
        for item, row in enumerate(self.rows.tolist()):
            source = codes[row]
            corner = f" ({', '.join(f'{value:g}' for value in positions[row])})" if several[source] else ""
            found.append(
                Item(
                    id=f"{sources[source]}{corner}",
                    label=int(self.labels[item]),
                    group=self.group_names[int(self.groups[item])],
                    split=side[item],
                )
            )
        return found


def sides_of(split: Split | Folds) -> list[tuple[str, Tensor]]:
    """Names and members of the sides; none of folds."""
    return [] if isinstance(split, Folds) else [(TRAIN, split.train), (TEST, split.test)]


def with_labels_file(paths: Sequence[Path], overrides: Sequence[str]) -> tuple[list[Path], list[str]]:
    """A CSV among the data stands for the folder that it lies in, labelled by it.

    Returns:
        The paths with that folder in its place, and the overrides with ``data.labels``.

    Raises:
        UsageError: for several such files, or one beside a ``data.labels`` of the user's.
    """
    tables = [path for path in paths if path.suffix.lower() == ".csv"]
    if not tables:
        return list(paths), list(overrides)
    if len(tables) > 1 or "labels" in asked_options(overrides):
        raise UsageError(
            f"{tables[0]}: labels come from one CSV, and more were given.",
            "Give one CSV as the data, or folders of tiles and one CSV with --set data.labels=FILE.",
        )
    if not tables[0].is_file():
        raise UsageError(f"{tables[0]}: there is no such file.", "Check --data.")
    folders = [path.absolute().parent if path is tables[0] else path for path in paths]
    return folders, [*overrides, f"data.labels={json.dumps(str(tables[0].absolute()))}"]


def asked_options(overrides: Collection[str]) -> set[str]:
    """Names of the ``data:`` options among ``KEY=VALUE`` items."""
    return {item.partition("=")[0].removeprefix("data.").split(".")[0] for item in overrides}


def named(paths: Sequence[Path]) -> str:
    """The data in a few words."""
    names = [path.parent.name if path.name == "index.parquet" and path.parent.name else path.name for path in paths]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _way_to_labels(metadata: Mapping[str, Any]) -> str:
    files = [str(file) for file in (metadata.get("labels") or {}).get("files", [])]
    if files:
        return (
            f"{', '.join(files)} was read and gives none: name its column of classes with "
            "--set data.label_column=COLUMN (and that of what stays together with data.group_column)."
        )
    return (
        "Put a labels.csv (path, label, group, split) into the folder, or name a table with --set data.labels=FILE and "
        "its columns with data.label_column and the like."
    )


def _column(index: SampleIndex, name: str) -> list[str | None]:
    return index.table.column(name).cast(pa.string()).to_pylist()
