"""Who a few-shot comparison classifies: the labelled groups of its stores, their classes, patients and sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fmsuite.commands.comparison import class_order
from fmsuite.commands.group_labels import IGNORE, LabelColumns, LabelledGroup, index_groups, labelled_groups
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.evaluation.bags import Bags
from fmsuite.core.evaluation.splits import TEST, TRAIN
from fmsuite.core.evaluation.store_bags import StoredBags, stored_bags, without_features
from fmsuite.core.features import FeatureStore
from fmsuite.core.reports.wording import counted
from fmsuite.domains.base import Units, load_domain
from fmsuite.errors import UsageError


def units_of(domain: str) -> Units:
    """What a domain calls things; general words where it is not installed, which stores do not need."""
    try:
        return load_domain(domain).units
    except UsageError:
        return Units()


@dataclass(frozen=True)
class Cohort:
    """Who is classified, the same for every encoder.

    Attributes:
        labels: position of each group's label in ``classes``.
        train, test: positions of groups; ``None`` where there are no sides.
        unit, owner: what a group is, and what it belongs to (a patient), in the singular.
        origin: where the labels come from.
        notes: what was left out.
    """

    groups: list[LabelledGroup]
    classes: list[str]
    labels: list[int]
    train: Tensor | None
    test: Tensor | None
    unit: str
    owner: str
    origin: str
    notes: list[str]

    @property
    def patients(self) -> list[int]:
        """A number for each group, equal for groups of one patient."""
        codes: dict[str, int] = {}
        return [codes.setdefault(group.patient, len(codes)) for group in self.groups]

    def without_vectors(self) -> Bags:
        """What draws depend on."""
        count = len(self.groups)
        labels, patients = torch.tensor(self.labels), torch.tensor(self.patients)
        return Bags.of_single(torch.zeros(count, 1), labels, patients, len(self.classes))

    def of(self, store: FeatureStore) -> StoredBags:
        return stored_bags(store, [group.id for group in self.groups], self.labels, self.patients, len(self.classes))

    def split_sentence(self) -> str:
        if self.train is None or self.test is None:
            everybody = self._counted(range(len(self.groups)))
            asked = f"{self.unit}s that are no examples"
            if self.unit != self.owner:
                asked = f"{self.unit}s of every {self.owner} that gave no example"
            return f"No fixed split: examples are drawn from all {everybody}; in every episode the {asked} are asked."
        return (
            f"Examples are drawn from the training side, {self._counted(self.train.tolist())}; in every episode the "
            f"whole test side is asked, {self._counted(self.test.tolist())}. No {self.owner} is on both sides."
        )

    def _counted(self, members: Sequence[int]) -> str:
        owners = {self.groups[number].patient for number in members}
        mine = counted(len(members), self.unit)
        return mine if self.unit == self.owner else f"{mine} of {counted(len(owners), self.owner)}"


def find_cohort(stores: Sequence[FeatureStore], columns: LabelColumns, skipped: SkippedLog) -> Cohort:
    """The groups that have a label, and features in every store; who is left out goes to ``skipped``.

    Raises:
        UsageError: as ``group_labels.labelled_groups``; if nobody is on the training or the test side of a split, or
            fewer than two classes are left.
    """
    store = stores[0]
    units = units_of(store.facts.domain)
    unit, owner = units.of(store.facts.by), units.group
    origin = str(columns.file or store.path)
    known = index_groups(store.index, store.facts.by)
    labelled = labelled_groups(known, store.facts.by, unit, columns, skipped, str(store.path))
    lacking = without_features(stores)
    groups = [group for group in labelled if group.id not in lacking]
    for group in labelled:
        if group.id in lacking:
            skipped.add(group.id, "features", f"This {unit} is left out: {lacking[group.id]}")
    classes = sorted({group.label for group in groups}, key=class_order)
    if len(classes) < 2:
        raise UsageError(
            f"{origin}: of {len(labelled)} labelled {unit}s {len(groups)} have features, and these are not of two "
            "classes or more: there is nothing to tell apart.",
            "See why the others could not be read, and embed again.",
        )
    train, test, notes = _sides(groups, unit, origin, skipped)
    if len(known) > len(labelled):
        notes.insert(0, f"Left out: {counted(len(known) - len(labelled), unit)} without a label.")
    if len(labelled) > len(groups):
        notes.append(f"Left out: {counted(len(labelled) - len(groups), unit)} of which no window could be read.")
    nameless = sum(entry.stage == "labels" for entry in skipped.entries) - (len(known) - len(labelled))
    if nameless:
        notes.append(f"Left out: {counted(nameless, 'line')} of {origin} for which there is no {unit}.")
    codes = {name: code for code, name in enumerate(classes)}
    return Cohort(groups, classes, [codes[g.label] for g in groups], train, test, unit, owner, origin, notes)


def _sides(
    groups: Sequence[LabelledGroup], unit: str, origin: str, skipped: SkippedLog
) -> tuple[Tensor | None, Tensor | None, list[str]]:
    """Training and test side, and who is on neither.

    Raises:
        UsageError: if there are sides, and nobody is on one of these two.
    """
    sides = Counter(group.split for group in groups if group.split is not None)
    if not sides:
        return None, None, []
    found = {}
    for side in (TRAIN, TEST):
        found[side] = torch.tensor([n for n, group in enumerate(groups) if group.split == side], dtype=torch.int64)
        if not len(found[side]):
            raise UsageError(
                f"{origin}: no labelled {unit} is on the side '{side}' of the split; the sides are "
                f"{', '.join(f'{name!r}' for name in sorted(sides))}.",
                f"Call the sides {TRAIN} and {TEST}, or ignore them with --split-column {IGNORE}.",
            )
    for group in groups:
        if group.split is None:
            skipped.add(group.id, "split", f"This {unit} is on no side of the split: it is neither shown nor asked.")
    others = [f"{count} of the side '{side}'" for side, count in sorted(sides.items()) if side not in found]
    nowhere = sum(group.split is None for group in groups)
    others += [f"{nowhere} on no side"] if nowhere else []
    notes = [f"Neither shown nor asked: {unit}s of other sides ({', '.join(others)})."] if others else []
    return found[TRAIN], found[TEST], notes
