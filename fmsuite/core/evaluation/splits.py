"""Who is trained on and who is asked: the split that labels come with, or one made here; and shuffled labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmsuite.core.seeding import generator
from fmsuite.errors import UsageError

TRAIN, TEST = "train", "test"
TEST_SHARE = 0.3
ATTEMPTS = 50
FEWEST_ATTEMPTS = 4
ATTEMPTED_GROUPS = 50_000
"""Random orders tried for a split: fewer of so many groups that any order comes close."""

_NAMED = 3


@dataclass(frozen=True)
class Split:
    """Two sides without a group in common, with every class on both.

    Attributes:
        train, test: int64 positions of items, ascending.
        made: it was made here rather than given.
    """

    train: Tensor
    test: Tensor
    made: bool = False

    @property
    def parts(self) -> tuple[Split, ...]:
        """Itself: of folds there are several."""
        return (self,)

    def among(self, kept: Tensor) -> Split:
        """The same sides of some of the items, numbered anew.

        Args:
            kept: int64 positions, ascending.
        """
        size = int(torch.cat([self.train, self.test, kept]).max()) + 1
        place = torch.full((size,), -1)
        place[kept] = torch.arange(len(kept))
        train, test = (place[side] for side in (self.train, self.test))
        return Split(train[train >= 0], test[test >= 0], self.made)


def given_split(sides: Sequence[str | None]) -> Split | None:
    """The split as given; ``None`` if no item names a side.

    Args:
        sides: (S,) name of each item's side. Items of other sides than ``train`` and ``test``, and of none, are on
            neither.

    Raises:
        UsageError: if items are on only one of the two sides, or on neither.
    """
    known = sorted({side for side in sides if side is not None})
    if not known:
        return None
    train, test = (torch.tensor([n for n, side in enumerate(sides) if side == name]) for name in (TRAIN, TEST))
    for name, rows in ((TRAIN, train), (TEST, test)):
        if not len(rows):
            raise UsageError(
                f"No labelled window is on the side '{name}' of the split; the sides are {_listed(known)}.",
                f"Call the sides '{TRAIN}' and '{TEST}' in the labels file, or leave the split out to have one made.",
            )
    return Split(train, test)


def refuse_shared_groups(split: Split, groups: Sequence[str]) -> None:
    """
    Args:
        groups: (S,) group of each item.

    Raises:
        UsageError: naming groups that stand on both sides.
    """
    shared = sorted({groups[n] for n in split.train.tolist()} & {groups[n] for n in split.test.tolist()})
    if shared:
        raise UsageError(
            f"On both sides of the split: {_listed(shared)}.",
            "A patient or scene must stay on one side: correct the split.",
        )


def refuse_one_class(classes: Sequence[str]) -> None:
    """
    Raises:
        UsageError: if there are fewer than two.
    """
    if len(classes) < 2:
        raise UsageError(
            f"All labelled windows are of one class, {_listed(classes)}: there is nothing to tell apart.",
            "Label windows of another class, or name the right column with data.label_column.",
        )


def refuse_missing_classes(split: Split, labels: Tensor, classes: Sequence[str]) -> None:
    """
    Args:
        labels: (S,) int64 positions in ``classes``.

    Raises:
        UsageError: naming classes that one side lacks, or if there are fewer than two.
    """
    refuse_one_class(classes)
    for name, rows in ((TRAIN, split.train), (TEST, split.test)):
        present = set(labels[rows].tolist())
        missing = [label for code, label in enumerate(classes) if code not in present]
        if missing:
            raise UsageError(
                f"The side '{name}' of the split has no window of {_listed(missing)}.",
                "Every class must be on both sides: correct the split, or take the labels of that class out.",
            )


def split_by_group(
    labels: Tensor, groups: Sequence[str], classes: Sequence[str], seed: int, share: float = TEST_SHARE
) -> Split:
    """A seeded split that keeps groups together and the classes' shares alike.

    Groups come in random order, and each joins the side that is emptier for its classes, relative to what that side
    should have. Of up to ``ATTEMPTS`` orders the one is kept whose worst class is nearest to ``share``.

    Args:
        labels: (S,) int64 positions in ``classes``.
        groups: (S,) group of each item.
        share: of each class's items that are to be asked.

    Raises:
        UsageError: if no attempt has every class on both sides; names a class whose items are all of one group.
    """
    names, group_of = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    counts = np.zeros((len(names), len(classes)))
    np.add.at(counts, (group_of, labels.numpy()), 1)
    total = counts.sum(0)
    alone = [code for code in range(len(classes)) if (counts[:, code] > 0).sum() < 2]
    if alone:
        where = next(names[row] for row in np.flatnonzero(counts[:, alone[0]]))
        raise UsageError(
            f"All windows of '{classes[alone[0]]}' belong to one group, '{where}', which cannot be on both sides of a "
            "split.",
            "Add windows of another group, or name the groups with data.group_column.",
        )
    attempts = min(ATTEMPTS, max(FEWEST_ATTEMPTS, ATTEMPTED_GROUPS // len(names)))
    orders = np.stack([generator(seed, "split by group", n).permutation(len(names)) for n in range(attempts)])
    asked = _fill(counts, share, orders)
    total = counts.sum(0)
    got = asked @ counts
    miss = np.abs(got / total - share).max(1)
    miss[((got == 0) | (got == total)).any(1)] = np.inf
    best = int(miss.argmin())
    if np.isinf(miss[best]):
        raise UsageError(
            f"No split of the {len(names)} groups with every class on both sides was found.",
            "Give one in the split column of the labels file.",
        )
    test = torch.from_numpy(asked[best][group_of])
    return Split(torch.nonzero(~test).flatten(), torch.nonzero(test).flatten(), made=True)


def _fill(counts: np.ndarray, share: float, orders: np.ndarray) -> np.ndarray:
    """The sides of groups that come in several orders.

    Args:
        counts: (G, C) items of each group and class.
        orders: (A, G) permutations of the groups.

    Returns:
        (A, G) bool, True for the groups that are asked.
    """
    total = counts.sum(0)
    # (2, C): by how much an item fills each side for its class, times what the class's items count.
    filling = 1 / (np.array([[1 - share], [share]]) * total**2)
    attempts = np.arange(len(orders))
    have = np.zeros((len(orders), *filling.shape))
    asked = np.zeros(orders.shape, dtype=bool)
    for group in orders.T:
        fullness = (counts[group][:, None] * filling * have).sum(2)
        # Equally empty sides: a class's first group is trained on.
        side = fullness[:, 1] < fullness[:, 0]
        asked[attempts, group] = side
        have[attempts, side.astype(np.int64)] += counts[group]
    return asked


def trained_on(parts: Sequence[Split], groups: Tensor) -> dict[str, Any]:
    """Settings of folds: how many there are, and how many groups they train on at least and at most."""
    counts = [len(groups[part.train].unique()) for part in parts]
    return {"folds": len(parts), "training_groups": [min(counts), max(counts)]}


def shuffled_labels(labels: Tensor, groups: Tensor, seed: int, number: int = 0) -> Tensor:
    """The same labels on other items, most items of a group under labels that stood together in one before.

    The labels are laid out group after group, in a random order of groups and a random order within each; the items
    take them in another such order. So the number of items of each class is kept, and labels remain as unevenly spread
    over groups as they are, as far as the groups' sizes allow.

    Args:
        labels, groups: (S,) int64.
        number: which of several shuffles.
    """
    give, take = (
        _group_after_group(groups, generator(seed, "shuffled labels", number, role)) for role in ("give", "take")
    )
    shuffled = torch.empty_like(labels)
    shuffled[take] = labels[give]
    return shuffled


def _group_after_group(groups: Tensor, random: np.random.Generator) -> Tensor:
    """(S,) int64 items in a random order in which groups stay together."""
    _, code = np.unique(groups.numpy(), return_inverse=True)
    place = random.permutation(int(code.max(initial=-1)) + 1)
    within = random.random(len(code))
    return torch.from_numpy(np.lexsort((within, place[code])))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(f"'{name}'" for name in names[:_NAMED]) + more
