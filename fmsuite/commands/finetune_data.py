"""What a task is fine-tuned on and judged by: windows with targets, cases, and who is on which side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional

from fmsuite.commands.comparison import class_order
from fmsuite.commands.finetune_config import FinetuneConfig, SplitOptions
from fmsuite.commands.pairs import join_pairs
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.pairs import read_targets
from fmsuite.core.data.sample import Array
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.evaluation.cases import DENSE, Case
from fmsuite.core.evaluation.fractions import bins_of
from fmsuite.core.evaluation.sides import first_share, fold_sides, spread_order
from fmsuite.core.evaluation.splits import TEST, TRAIN
from fmsuite.core.reports.wording import counted
from fmsuite.domains.base import Domain
from fmsuite.errors import UsageError

TEST_SHARE = 0.2
GROUPED_BY = {"blocks": "block", "places": "place"}
"""By what an index's metadata hold, what its groups then are."""


class NumberedIndex(SampleIndex):
    """Windows whose labels are numbered as the task numbers its classes, whichever of them occur."""

    def __init__(self, index: SampleIndex, classes: Sequence[str]) -> None:
        super().__init__(index.table, index.metadata)
        self.label_names = list(classes)
        self._label_codes = {name: code for code, name in enumerate(classes)}

    def select(self, rows: Sequence[int] | np.ndarray) -> NumberedIndex:
        return NumberedIndex(super().select(rows), self.label_names)


@dataclass(frozen=True)
class Fold:
    """
    Attributes:
        number: ``None`` of a single split.
        train, test: groups.
    """

    number: int | None
    train: list[str]
    test: list[str]


@dataclass(frozen=True)
class TaskData:
    """
    Attributes:
        index: the windows that take part.
        group_of_row: (N,) names.
        targets: (N, D) float32 of a multilabel task (-1 where unknown) or a regression (NaN); ``None`` of others.
        classes: names; see ``Network.classes``.
        cases: what can be judged; a fold judges those whose group it holds out.
        rows_of_case: rows of the index.
        kinds: (N, C) bool, what sides and fractions are to be alike in: classes, labels, quantiles of a number.
        truth: (cases,) int64 class numbers, or (cases, D) as ``targets``; ``None`` of label maps.
        folds: at least one.
        said: one sentence on the split.
        notes: what was left out, in sentences.
    """

    domain: Domain
    index: NumberedIndex
    group_of_row: list[str]
    targets: Array | None
    classes: tuple[str, ...]
    cases: list[Case]
    rows_of_case: list[Array]
    truth: Array | None
    kinds: Tensor
    folds: list[Fold]
    said: str
    notes: list[str] = field(default_factory=list)

    def train_groups(self, fold: Fold, fraction: float, seed: int) -> list[str]:
        """Those of a fraction, in a fixed order; as many at least as have every class."""
        rows = self.rows_of(fold.train)
        order, least = spread_order([self.group_of_row[row] for row in rows], self.kinds[rows], seed)
        return first_share(order, fraction, least)

    def rows_of(self, groups: Sequence[str]) -> Array:
        wanted = set(groups)
        return np.flatnonzero([group in wanted for group in self.group_of_row])

    def cases_of(self, fold: Fold) -> list[int]:
        held = set(fold.test)
        return [number for number, case in enumerate(self.cases) if case.group in held]


def group_unit(domain: Domain, index: SampleIndex) -> str:
    """What a group of an index is called: as its domain does, or what was made the group in its place."""
    return next((unit for key, unit in GROUPED_BY.items() if index.metadata.get(key)), domain.units.group)


def collect(
    config: FinetuneConfig, domain: Domain, whole: SampleIndex, skipped: SkippedLog, targets: Path | None
) -> TaskData:
    """
    Raises:
        UsageError: if labels are missing or are not the task's, a case has several, or there is no usable split.
    """
    notes = [str(note) for note in whole.metadata.get("notes", [])]
    kept, values, classes = _targets(config, whole, skipped, targets, notes)
    index = whole.select(kept)
    sides = _column(index, "split")
    if config.split.folds is None and _by_column(config.split, sides):
        on_side = np.flatnonzero([side in (TRAIN, TEST) for side in sides])
        if len(on_side) < len(index):
            notes.append(f"Left out: {counted(len(index) - len(on_side), 'window')} on no side of the split.")
        index, sides = index.select(on_side), [sides[n] for n in on_side]
        values = None if values is None else values[on_side]
    numbered = NumberedIndex(index, classes if config.task_name == "classification" else index.label_names)
    groups = [str(group) for group in _column(index, "group")]
    by = "source" if config.task_name in DENSE else config.judge.by
    codes = numbered.label_codes if config.task_name == "classification" else None
    lowest = 0.0 if config.task_name == "multilabel" else -np.inf
    parted = config.task_name in DENSE
    cases, rows, truth = _cases(numbered, groups, by, codes, values, lowest, classes, parted)
    kinds = _kinds(len(groups), codes, values, lowest)
    seed = config.seed if config.split.seed is None else config.split.seed
    folds, said = _folds(config.split, groups, sides, kinds, seed, group_unit(domain, index))
    return TaskData(domain, numbered, groups, values, classes, cases, rows, truth, kinds, folds, said, notes)


def _targets(
    config: FinetuneConfig,
    whole: SampleIndex,
    skipped: SkippedLog,
    table: Path | None,
    notes: list[str],
) -> tuple[Array, Array | None, tuple[str, ...]]:
    """The rows that take part, their (N, D) numbers if the task has such, and the names of its classes."""
    labels = _column(whole, "label")
    everything = np.arange(len(whole))
    if config.task_name in DENSE:
        return everything, None, config.classes
    if table is not None:
        found = read_targets(table, config.classes)
        if found.key == "window" and config.training.windows == "random":
            raise UsageError(
                f"{table}: gives numbers to the index's windows, and training.windows=random draws others.",
                "Name sources or groups, or use training.windows=fixed.",
            )
        pairs = join_pairs(found, whole, skipped)
        kept = np.flatnonzero(pairs.of_row >= 0)
        assert isinstance(pairs.values, np.ndarray)
        values = pairs.values[pairs.of_row[kept]]
        if config.task_name == "multilabel":
            wrong = values[~np.isnan(values) & (values != 0) & (values != 1)]
            if len(wrong):
                raise UsageError(f"{table}: a label is {wrong[0]:g}, not 0, 1 or nothing.", "Correct the table.")
            values = np.where(np.isnan(values), np.float32(-1), values)
        _say_left(len(whole) - len(kept), "without a line in the table of targets", notes)
        return kept, values, config.classes
    kept = np.flatnonzero([label is not None for label in labels])
    if not len(kept):
        raise UsageError(
            "None of the windows has a label.",
            "Give a labels.csv with the columns path and label beside the data, or name one in data.labels.",
        )
    _say_left(len(whole) - len(kept), "without a label", notes)
    if config.task_name == "regression":
        return kept, _as_numbers([str(labels[n]) for n in kept]), ("value",)
    names = sorted({str(labels[n]) for n in kept}, key=class_order)
    classes = config.classes or tuple(names)
    unknown = [name for name in names if name not in classes]
    if unknown or len(classes) < 2:
        raise UsageError(
            f"The labels are {', '.join(names)}, and the classes {', '.join(classes)}.",
            "Name all of them in task.classes, two at least, or leave it out.",
        )
    return kept, None, classes


def _as_numbers(labels: Sequence[str]) -> Array:
    values = np.empty((len(labels), 1), dtype=np.float32)
    for row, label in enumerate(labels):
        try:
            values[row] = float(label)
        except ValueError:
            raise UsageError(
                f"The label '{label}' is no number, and a regression predicts numbers.",
                "Name the column of numbers with data.label_column, or give a table with targets.",
            ) from None
    if not np.isfinite(values).all():
        raise UsageError("A label is not a finite number.", "Leave out what is not known.")
    return values


def _cases(
    index: NumberedIndex,
    groups: Sequence[str],
    by: str,
    codes: Array | None,
    values: Array | None,
    lowest: float,
    classes: Sequence[str],
    parted: bool,
) -> tuple[list[Case], list[Array], Array | None]:
    """Windows of one source or group together, in the order in which they come.

    Args:
        lowest: of the numbers that are known.
        parted: a source whose windows are in several groups is as many cases.
    """
    sources = [str(source) for source in _column(index, "source")]
    members: dict[tuple[str, str], list[int]] = {}
    for row, name in enumerate(sources if by == "source" else groups):
        members.setdefault((name, groups[row] if parted else ""), []).append(row)
    names = [name for name, _ in members]
    if by == "source":
        short = dict(zip(dict.fromkeys(names), _short(list(dict.fromkeys(names))), strict=True))
        several = Counter(names)
        names = [f"{short[name]}, {group}" if several[name] > 1 else short[name] for name, group in members]
    cases, truth = [], []
    for name, rows in zip(names, members.values(), strict=True):
        own = {groups[row] for row in rows}
        if len(own) > 1:
            raise UsageError(f"{name} belongs to several groups: {', '.join(sorted(own)[:3])}.", "Correct the labels.")
        said: list[str | float | None] = []
        if codes is not None or values is not None:
            of_row = codes[rows] if codes is not None else values[rows]  # type: ignore[index]
            if not all(np.array_equal(row, of_row[0], equal_nan=values is not None) for row in of_row):
                raise UsageError(
                    f"The windows of {name} have several labels, and are judged together.",
                    "Use judge.by=source, or one label a group.",
                )
            truth.append(of_row[0])
            said = [classes[int(of_row[0])]] if codes is not None else [_known(v, lowest) for v in of_row[0]]
        used = list(dict.fromkeys(sources[row] for row in rows))
        cases.append(Case(id=name, sources=used, group=next(iter(own)), truth=said))
    return cases, [np.asarray(rows) for rows in members.values()], np.stack(truth) if truth else None


def _known(value: float, lowest: float) -> float | None:
    return float(value) if value >= lowest else None


def _short(paths: Sequence[str]) -> list[str]:
    """File names, with as many folders before them as tell them apart."""
    parts = [Path(path).parts for path in paths]
    lengths = [1] * len(parts)
    while True:
        names = ["/".join(part[-length:]) for part, length in zip(parts, lengths, strict=True)]
        count = Counter(names)
        longer = [n for n, name in enumerate(names) if count[name] > 1 and lengths[n] < len(parts[n])]
        if not longer:
            return names
        for n in longer:
            lengths[n] += 1


def _kinds(rows: int, codes: Array | None, values: Array | None, lowest: float) -> Tensor:
    """See ``TaskData.kinds``; one kind for all where nothing tells windows apart."""
    if codes is not None:
        return functional.one_hot(torch.from_numpy(codes)).bool()
    if values is None:
        return torch.ones(rows, 1, dtype=torch.bool)
    if lowest == 0.0:
        return torch.from_numpy(values > 0)
    columns = []
    for column in torch.from_numpy(values).T:
        known = column.isfinite()
        table = torch.zeros(rows, 5, dtype=torch.bool)
        table[known] = functional.one_hot(bins_of(column[known]), 5).bool()
        columns.append(table)
    return torch.cat(columns, dim=1)


def _by_column(split: SplitOptions, sides: Sequence[str | None]) -> bool:
    """
    Raises:
        UsageError: if the column is asked for and there is none.
    """
    there = any(side is not None for side in sides)
    if split.test == "column" and not there:
        raise UsageError(
            "split.test is column, and the data name no sides.", "Name the column in data.split_column, or a share."
        )
    return there if split.test in (None, "column") else False


def _folds(
    split: SplitOptions,
    groups: Sequence[str],
    sides: Sequence[str | None],
    kinds: Tensor,
    seed: int,
    unit: str,
) -> tuple[list[Fold], str]:
    everyone = sorted(set(groups))
    if split.folds is None and _by_column(split, sides):
        train, test = ({g for g, s in zip(groups, sides, strict=True) if s == name} for name in (TRAIN, TEST))
        both = sorted(train & test)
        if both:
            raise UsageError(
                f"On both sides of the split: {', '.join(both[:3])}.",
                f"A {unit} must stay on one side: correct the split.",
            )
        if not train or not test:
            raise UsageError("The split has an empty side.", f"Call the sides '{TRAIN}' and '{TEST}'.")
        how = "As the data give it"
        folds = [Fold(None, sorted(train), sorted(test))]
    elif split.folds is not None:
        held = fold_sides(spread_order(groups, kinds, seed)[0], split.folds)
        folds = [Fold(n, sorted({*everyone} - {*test}), sorted(test)) for n, test in enumerate(held)]
        return folds, (
            f"Made here by {unit}, seed {seed}: {split.folds} folds of {counted(len(everyone), unit)}, each of them "
            "held out once, by networks that were not trained on it."
        )
    else:
        share = TEST_SHARE if split.test is None else float(split.test)
        held_out = first_share(spread_order(groups, kinds, seed)[0], share)
        if len(held_out) == len(everyone):
            raise UsageError(f"{counted(len(everyone), unit)} cannot be split.", "Give more data.")
        how = f"Made here by {unit}, seed {seed}"
        folds = [Fold(None, sorted({*everyone} - {*held_out}), sorted(held_out))]
    only = folds[0]
    return folds, f"{how}: {counted(len(only.train), unit)} to train on, {counted(len(only.test), unit)} held out."


def _say_left(count: int, why: str, notes: list[str]) -> None:
    if count:
        notes.append(f"Left out: {counted(count, 'window')} {why}.")


def _column(index: SampleIndex, name: str) -> list[str | None]:
    return index.table.column(name).cast(pa.string()).to_pylist()  # type: ignore[no-any-return]
