"""Cross-validation by group: every item is asked once, by a classifier that did not see its group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fmsuite.core.evaluation.splits import ATTEMPTED_GROUPS, ATTEMPTS, FEWEST_ATTEMPTS, Split
from fmsuite.core.seeding import generator
from fmsuite.errors import UsageError

LEAVE_ONE_OUT: Literal["groups"] = "groups"
Asked = int | Literal["groups"]
"""How many folds, or one for each group."""


@dataclass(frozen=True)
class Folds:
    """Several splits of the same items, whose test sides have each item once and divide no group.

    Attributes:
        parts: one for each fold.
        single: every fold asks about one group.
    """

    parts: tuple[Split, ...]
    single: bool = False
    made = True

    @property
    def asked(self) -> Asked:
        """What ``folds_by_group`` was asked for."""
        return LEAVE_ONE_OUT if self.single else len(self.parts)

    @property
    def train(self) -> Tensor:
        """Items that some fold trains on: all of them."""
        return self.test

    @property
    def test(self) -> Tensor:
        """(I,) int64 items that are asked, ascending: all of them."""
        return torch.cat([part.test for part in self.parts]).sort().values

    def said(self, seed: int) -> str:
        """How the folds were made, as the beginning of a sentence."""
        if self.single:
            return f"Cross-validation made here: {len(self.parts)} folds, each of which leaves one group out"
        return f"Cross-validation made here: {len(self.parts)} folds by group, classes alike in all, seed {seed}"


def check_folds(folds: Asked) -> None:
    """
    Raises:
        UsageError: for fewer than two.
    """
    if folds != LEAVE_ONE_OUT and (not isinstance(folds, int) or folds < 2):
        raise UsageError(f"--folds {folds} divides nothing.", "Give 2 or more, or `groups` to leave one group out.")


def parse_folds(text: str) -> Asked:
    """``5`` or ``groups``.

    Raises:
        UsageError: for anything else, and for fewer than two.
    """
    try:
        folds: Asked = LEAVE_ONE_OUT if text == LEAVE_ONE_OUT else int(text)
    except ValueError:
        raise UsageError(
            f"--folds '{text}' is no number of folds.", "Give 2 or more, or `groups` to leave one group out."
        ) from None
    check_folds(folds)
    return folds


def lonely(labels: Tensor, groups: Tensor, classes: int) -> list[int]:
    """Classes whose items are all of one group: who has not seen the group has not seen the class.

    Args:
        labels: (I,) int64 below ``classes``. groups: (I,) int64.
    """
    return [code for code in range(classes) if len(groups[labels == code].unique()) == 1]


def folds_by_group(kinds: Tensor, groups: Tensor, folds: Asked, seed: int, names: Sequence[str] = ()) -> Folds:
    """Folds that keep groups together and are alike in what they hold.

    Groups come in random order, and each joins the fold that has least of its kinds; of equal ones that with the
    fewest groups. Of up to ``splits.ATTEMPTS`` orders the one is kept whose fullest fold has the least share of a
    kind, and before that, where ``names`` are given, the one that leaves fewest kinds in a single fold.

    Args:
        kinds: (I, C) bool, what each item is of: its class, the bin of its number, its findings.
        groups: (I,) int64.
        names: of the kinds, if each of them must be in two folds at least: a classifier that is asked about a class has
            then seen it.

    Raises:
        UsageError: for more folds than groups, fewer than two of either; naming a kind that has to be in two folds
            and could not be spread over them.
    """
    check_folds(folds)
    labels, member = groups.unique(return_inverse=True)
    count = len(labels) if folds == LEAVE_ONE_OUT else int(folds)
    if not 2 <= count <= len(labels):
        raise UsageError(
            f"{count} folds of {len(labels)} {'group' if len(labels) == 1 else 'groups'} (scenes, patients), none of "
            "which is divided, cannot be made.",
            f"Give --folds from 2 to {len(labels)}, or `groups`."
            if len(labels) > 1
            else "Name the groups with data.group_column, or label items of another one.",
        )
    if count == len(labels):
        return _splits(member, count, single=True)
    held = torch.zeros(len(labels), kinds.shape[1], dtype=torch.float64).index_add_(0, member, kinds.double()).numpy()
    attempts = min(ATTEMPTS, max(FEWEST_ATTEMPTS, ATTEMPTED_GROUPS // (len(labels) * count)))
    found = [_dealt(held, count, generator(seed, "folds by group", number)) for number in range(attempts)]
    _, best = min(enumerate(found), key=lambda entry: (_unevenness(held, entry[1], count, bool(names)), entry[0]))
    in_one = [code for code in _in_one_fold(held, best, count) if names]
    if in_one:
        raise UsageError(
            f"No {count} folds of the {len(labels)} groups were found that have '{names[in_one[0]]}' in more than one.",
            "Ask for more folds, or `--folds groups`.",
        )
    return _splits(torch.from_numpy(best)[member], count)


def _dealt(held: np.ndarray, folds: int, random: np.random.Generator) -> np.ndarray:
    """(G,) int64 fold of each group, of which (G, C) items of each kind are given."""
    total = np.maximum(held.sum(0), 1)
    have = np.zeros((folds, held.shape[1]))
    sizes = np.zeros(folds)
    fold = np.empty(len(held), dtype=np.int64)
    for group in random.permutation(len(held)):
        fullness = (have * (held[group] / total**2)).sum(1)
        fold[group] = np.lexsort((sizes, fullness))[0]
        have[fold[group]] += held[group]
        sizes[fold[group]] += 1
    return fold


def _unevenness(held: np.ndarray, fold: np.ndarray, folds: int, spread: bool) -> tuple[int, float]:
    have = np.zeros((folds, held.shape[1]))
    np.add.at(have, fold, held)
    share = have / np.maximum(held.sum(0), 1)
    return len(_in_one_fold(held, fold, folds)) if spread else 0, float(share.max())


def _in_one_fold(held: np.ndarray, fold: np.ndarray, folds: int) -> list[int]:
    there = np.zeros((folds, held.shape[1]), dtype=bool)
    np.logical_or.at(there, fold, held > 0)
    return np.flatnonzero(there.sum(0) == 1).tolist()


def _splits(fold: Tensor, count: int, single: bool = False) -> Folds:
    return Folds(
        tuple(Split((fold != n).nonzero().flatten(), (fold == n).nonzero().flatten(), made=True) for n in range(count)),
        single,
    )
