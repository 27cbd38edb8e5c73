"""Windows, sources or patients with a target: pooled features, sides of a split, and what is known of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fmsuite.commands.labelled_windows import LabelledWindows, sides_of
from fmsuite.commands.targets import OPTION, Kind, Target, Values
from fmsuite.core.data.grouping import group_codes
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.evaluation.folds import Asked, Folds, folds_by_group, lonely
from fmsuite.core.evaluation.fractions import bins_of
from fmsuite.core.evaluation.results import Item
from fmsuite.core.evaluation.splits import (
    TEST,
    TEST_SHARE,
    TRAIN,
    Split,
    given_split,
    refuse_missing_classes,
    refuse_shared_groups,
    split_by_group,
)
from fmsuite.core.features import FeatureStore
from fmsuite.core.reports.wording import counted, listed
from fmsuite.domains.base import Units
from fmsuite.errors import UsageError
from fmsuite.tiling.labels import SourceLabel

By = Literal["window", "source", "group"]

FEWEST_GROUPS = 4
"""Of a kind, for a split of our own to keep its share alike on both sides."""


@dataclass(frozen=True)
class TargetItems(LabelledWindows):
    """
    Attributes:
        rows: (I,) row of each item's middle window.
        labels: of classes (I,) int64, -1 nowhere; of a number (I,) float64; of findings (I, K) float64, NaN where
            unknown.
        classes: names of classes or findings; empty for a number.
        kind: of the target.
        members: (S,) rows of all windows of all items. item_of: (S,) the item of each.
        ids: (I,) readable and unique.
    """

    kind: Kind
    members: Tensor
    item_of: Tensor
    ids: list[str]

    @classmethod
    def asked(
        cls,
        index: SampleIndex,
        target: Target,
        values: Values,
        known: Sequence[SourceLabel],
        *,
        by: By,
        seed: int,
        units: Units,
        folds: Asked | None = None,
    ) -> TargetItems:
        """
        Args:
            index: all windows.
            values: of the target, known: groups and sides, of every source in the order of
                ``group_codes(index, "source")``; what is not known there is the index's.
            by: what an item is.
            seed: of the split, where one is made.
            folds: as of ``LabelledWindows.of``.

        Raises:
            UsageError: if windows of one item contradict each other, or a side has nothing to learn or ask.
        """
        _, source = group_codes(index, "source")
        groups = _filled([label.group for label in known], source, _texts(index, "group"))
        in_file = any(label.split is not None for label in known)
        sides: list[str | None] = [known[code].split for code in source.tolist()] if in_file else _texts(index, "split")
        unit = {"window": units.window, "source": units.source, "group": units.group}[by]
        names, code = _items(index, by, source, groups)

        has_value = values.known[torch.from_numpy(source)]
        notes: list[str] = []
        given = any(side is not None for side in sides)
        if folds is not None and given:
            notes.append("The sides of the split that the data name were not kept to: folds ask about everything.")
            sides, given = [None] * len(sides), False
        on_a_side = np.array([not given or side in (TRAIN, TEST) for side in sides])
        usable = np.flatnonzero(has_value.numpy() & on_a_side)
        if folds is not None and target.kind == "classes":
            usable = _in_several_groups(usable, values, source, groups, notes)
        if not len(usable):
            raise UsageError(
                f"No {unit} of which {', '.join(target.columns)} is known is on the sides '{TRAIN}' and '{TEST}'.",
                "Correct the split column of the labels file, or leave it out to have a split made.",
            )
        kept, item_of = np.unique(code[usable], return_inverse=True)
        first = usable[np.unique(item_of, return_index=True)[1]]
        ids = [names[number] for number in kept]
        item_groups, item_sides = [groups[row] for row in first], [sides[row] for row in first]
        _refuse_several([groups[row] for row in usable], item_of, item_groups, "groups", ids, unit)
        _refuse_several([sides[row] for row in usable], item_of, item_sides, "sides", ids, unit)
        labels = values.target[torch.from_numpy(source[first])]
        _refuse_contradictions(values.target[torch.from_numpy(source[usable])], labels, item_of, ids, unit, target)
        classes, labels = _present(target.kind, values.names, labels)
        group_names, position = np.unique(np.asarray(item_groups), return_inverse=True)
        split: Split | Folds
        if folds is not None:
            kinds = _kinds(target.kind, labels)
            must = classes if target.kind == "classes" else ()
            split = folds_by_group(kinds, torch.from_numpy(position), folds, seed, must)
        else:
            split = given_split(item_sides) or _made(target.kind, labels, item_groups, classes, seed)
            refuse_shared_groups(split, item_groups)
        total = len(np.unique(code))
        if len(kept) < total:
            notes.append(f"Left out: {counted(total - len(kept), unit)} of which nothing is known, or on no side.")
        order = np.argsort(item_of, kind="stable")
        members, item_of = usable[order], item_of[order]
        starts = np.searchsorted(item_of, np.arange(len(kept) + 1))
        found = cls(
            index=index,
            rows=torch.from_numpy(members[(starts[:-1] + starts[1:]) // 2]),
            labels=labels,
            groups=torch.from_numpy(position),
            classes=classes,
            group_names=[str(name) for name in group_names],
            split=split,
            unit=unit,
            seed=seed,
            notes=notes,
            kind=target.kind,
            members=torch.from_numpy(members),
            item_of=torch.from_numpy(item_of),
            ids=ids,
        )
        found.refuse_sides_without_contrast()
        return found

    def refuse_sides_without_contrast(self) -> None:
        """
        Raises:
            UsageError: if a class is missing on a side, a number is the same everywhere on one, or no finding is there
                on both sides and missing on both.
        """
        if self.kind == "classes":
            if not isinstance(self.split, Folds):
                refuse_missing_classes(self.split, self.labels, self.classes)
            return
        for name, side in sides_of(self.split) or [("all", self.split.test)]:
            values = self.labels[side]
            varies = (values == 1).any(0) & (values == 0).any(0) if self.kind == "findings" else values.std() > 0
            if len(values) < 2 or not bool(varies.any()):
                what = "finding is both there and absent" if self.kind == "findings" else "number differs"
                where = "Of all items" if name == "all" else f"On the side '{name}' of the split"
                raise UsageError(
                    f"{where} no {what} among {counted(len(values), self.unit)}.",
                    f"Label more, or name another column with {OPTION[self.kind]}.",
                )

    @property
    def kinds(self) -> Tensor:
        """(I, C) bool, what the items are of, for shares that hold all of it."""
        return _kinds(self.kind, self.labels)

    def rows_of(self, items: Tensor) -> Tensor:
        return self.members[torch.isin(self.item_of, items)]

    def features(self, store: FeatureStore) -> Tensor:
        """(I, D) float32 mean over each item's windows."""
        values = store.read_all(self.members.numpy())[0]
        if len(self.members) == len(self):
            return values
        total = torch.zeros(len(self), values.shape[1], dtype=torch.float64)
        total.index_add_(0, self.item_of, values.double())
        return (total / torch.bincount(self.item_of)[:, None]).float()

    def restricted(self, stored: Sequence[Tensor]) -> TargetItems:
        everywhere = torch.zeros(len(self.index), dtype=torch.int64)
        for rows in stored:
            everywhere[rows] += 1
        there = everywhere[self.members] == len(stored)
        if bool(there.all()):
            return self
        members, owners = self.members[there], self.item_of[there]
        kept, item_of = owners.unique(return_inverse=True)
        starts = torch.searchsorted(item_of, torch.arange(len(kept) + 1))
        labels, groups = self.labels[kept], self.groups[kept]
        split: Split | Folds
        if isinstance(self.split, Folds):
            must = self.classes if self.kind == "classes" else ()
            split = folds_by_group(_kinds(self.kind, labels), groups, self.split.asked, self.seed, must)
        else:
            split = self.split.among(kept)
        lost = f"{counted(int((~there).sum()), 'window')} and {counted(len(self) - len(kept), self.unit)}"
        found = replace(
            self,
            rows=members[(starts[:-1] + starts[1:]) // 2],
            labels=labels,
            groups=groups,
            split=split,
            members=members,
            item_of=item_of,
            ids=[self.ids[number] for number in kept.tolist()],
            notes=[*self.notes, f"Left out: {lost} that could not be read; see skipped.csv."],
        )
        found.refuse_sides_without_contrast()
        return found

    @property
    def said(self) -> str:
        if not self.split.made or isinstance(self.split, Folds) or self.kind == "classes":
            return super().said
        alike = "findings" if self.kind == "findings" else "small and large numbers"
        return super().said.replace("classes alike", f"{alike} alike")

    def items(self) -> list[Item]:
        side = {item: name for name, members in sides_of(self.split) for item in members.tolist()}
        windows = torch.bincount(self.item_of, minlength=len(self)).tolist()
        found = []
        for number, name in enumerate(self.ids):
            item = Item(
                id=name,
                group=self.group_names[int(self.groups[number])],
                split=side.get(number),
                windows=windows[number],
            )
            if self.kind == "classes":
                item.label = int(self.labels[number])
            elif self.kind == "number":
                item.value = float(self.labels[number])
            else:
                item.findings = [None if value != value else int(value) for value in self.labels[number].tolist()]
            found.append(item)
        return found


def _in_several_groups(
    usable: np.ndarray, values: Values, source: np.ndarray, groups: Sequence[str], notes: list[str]
) -> np.ndarray:
    """The rows whose class is in several groups; says which are not."""
    labels = values.target[torch.from_numpy(source[usable])]
    names, position = np.unique(np.asarray(groups)[usable], return_inverse=True)
    alone = lonely(labels, torch.from_numpy(position), len(values.names))
    for code in alone:
        group = names[position[int((labels == code).nonzero()[0])]]
        notes.append(
            f"Left out: everything of '{values.names[code]}', which is of one group ('{group}'): a classifier that has "
            "not seen the group has not seen the class."
        )
    return usable[~np.isin(labels.numpy(), alone)]


def _kinds(kind: Kind, labels: Tensor) -> Tensor:
    """(I, C) bool, what each item is of."""
    if kind == "findings":
        return labels == 1
    return torch.nn.functional.one_hot(labels if kind == "classes" else bins_of(labels)).bool()


def _items(index: SampleIndex, by: By, source: np.ndarray, groups: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Names of items and the item of every row."""
    if by == "group":
        names, code = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
        return [str(name) for name in names], code
    names_of_sources, _ = group_codes(index, "source")
    if by == "source":
        return names_of_sources, source
    several = np.bincount(source) > 1
    positions = index.table.column("position").to_pylist()
    named = [
        names_of_sources[code] + (f" ({', '.join(f'{value:g}' for value in positions[row])})" if several[code] else "")
        for row, code in enumerate(source)
    ]
    return named, np.arange(len(source))


def _filled(given: Sequence[str | None], source: np.ndarray, own: Sequence[str | None]) -> list[str]:
    return [str(given[code] if given[code] is not None else own[row]) for row, code in enumerate(source.tolist())]


def _texts(index: SampleIndex, name: str) -> list[str | None]:
    return index.table.column(name).cast(pa.string()).to_pylist()


def _refuse_several(
    values: Sequence[str | None],
    item_of: np.ndarray,
    first: Sequence[str | None],
    what: str,
    names: Sequence[str],
    unit: str,
) -> None:
    for value, item in zip(values, item_of.tolist(), strict=True):
        if value != first[item]:
            raise UsageError(
                f"The windows of {unit} '{names[item]}' are of several {what}: '{first[item]}' and '{value}'.",
                "Correct the labels file, or ask about another --by.",
            )


def _refuse_contradictions(
    values: Tensor, labels: Tensor, item_of: np.ndarray, ids: Sequence[str], unit: str, target: Target
) -> None:
    """Of sources that are one item together."""
    mine = labels[torch.from_numpy(item_of)]
    same = (values == mine) | (values.isnan() & mine.isnan() if values.is_floating_point() else False)
    same = same.all(1) if same.dim() > 1 else same
    if not bool(same.all()):
        item = ids[int(item_of[int((~same).nonzero()[0])])]
        raise UsageError(
            f"The sources of {unit} '{item}' have several values of {', '.join(target.columns)}.",
            "Ask about each source (--by source).",
        )


def _present(kind: Kind, names: Sequence[str], labels: Tensor) -> tuple[list[str], Tensor]:
    """Classes that occur, and labels by their positions among them."""
    if kind != "classes":
        return list(names), labels
    present, labels = labels.unique(return_inverse=True)
    if len(present) < 2:
        raise UsageError(
            f"Everything is of one class, {listed([repr(names[int(code)]) for code in present])}: there is nothing to "
            "tell apart.",
            "Name another column with --classify.",
        )
    return [names[int(code)] for code in present], labels


def _made(kind: Kind, labels: Tensor, groups: Sequence[str], classes: Sequence[str], seed: int) -> Split:
    """By group, with classes, sizes or findings alike on both sides."""
    if kind == "classes":
        return split_by_group(labels, groups, classes, seed)
    _, group_of = np.unique(np.asarray(groups), return_inverse=True)
    if len(np.unique(group_of)) < 2:
        raise UsageError(
            f"Everything is of one group, '{groups[0]}', which cannot be on both sides of a split.",
            "Name the groups (patients) with --set data.group_column=COLUMN.",
        )
    codes = _rarest(labels) if kind == "findings" else torch.zeros(len(labels), dtype=torch.int64)
    if kind == "number":
        for most in (5, 4, 3, 2):
            codes = bins_of(labels, most)
            if min(len(set(group_of[codes.numpy() == code])) for code in codes.unique().tolist()) >= FEWEST_GROUPS:
                break
    members = [len(set(group_of[codes.numpy() == code])) for code in range(int(codes.max()) + 1)]
    common = int(np.argmax(members))
    few = torch.tensor([count < FEWEST_GROUPS for count in members])
    codes = torch.where(few[codes], common, codes).unique(return_inverse=True)[1]
    return split_by_group(codes, groups, [str(code) for code in range(int(codes.max()) + 1)], seed, TEST_SHARE)


def _rarest(labels: Tensor) -> Tensor:
    """(I,) int64 the rarest finding of each item, K for none."""
    there = labels == 1
    often = torch.where(there, there.sum(0), len(labels) + 1)
    return torch.where(there.any(1), often.argmin(1), labels.shape[1])
