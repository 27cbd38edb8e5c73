"""Shares of the training groups: nested, alike in what they hold, drawn several times."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fmsuite.core.evaluation.folds import Folds
from fmsuite.core.evaluation.splits import Split
from fmsuite.core.seeding import generator
from fmsuite.errors import UsageError

DRAWS = 5
"""Orders of the groups that a share is averaged over."""


def check_fractions(fractions: Sequence[float]) -> list[float]:
    """Without those of everything, which is the whole training side, ascending and each once.

    Raises:
        UsageError: for a share that is not above 0 and at most 1.
    """
    for share in fractions:
        if not 0 < share <= 1:
            raise UsageError(f"A share of {share:g} of the patients.", "Give --fractions above 0 and at most 100%.")
    return sorted({share for share in fractions if share < 1})


def group_order(kinds: Tensor, groups: Tensor, seed: int, draw: int) -> tuple[list[int], int]:
    """An order of groups of which every first part is alike to the whole.

    First come as many groups as it takes to have every kind once, rare kinds first. The others follow so that the
    shares of the groups' strata are even all along: group r of the n in its stratum stands at (r + u) / n, u uniform
    for each stratum. A group's stratum is the rarest kind among its items.

    Args:
        kinds: (N, C) bool, what each item is of: its class, the bin of its number, its findings.
        groups: (N,) int64.
        draw: which of several orders.

    Returns:
        The groups, and how many of them have every kind.
    """
    names, member = groups.unique(return_inverse=True)
    held = torch.zeros(len(names), kinds.shape[1], dtype=torch.int64).index_add_(0, member, kinds.long()).numpy() > 0
    random = generator(seed, "fractions", draw)
    shuffle = random.permutation(len(names))
    often = np.where(held.any(0), held.sum(0), len(names) + 1)
    # Of a group without any kind, one beyond the last.
    rarity = np.where(held, often, len(names) + 2)
    stratum = np.where(held.any(1), rarity.argmin(1), held.shape[1])
    first: list[int] = []
    for kind in np.argsort(often, kind="stable"):
        if held[:, kind].any() and not held[first, kind].any():
            first.append(next(int(group) for group in shuffle if held[group, kind]))
    start = random.random(held.shape[1] + 1)
    place = np.empty(len(names))
    for number in np.unique(stratum):
        members = [group for group in shuffle if stratum[group] == number]
        place[members] = (np.arange(len(members)) + start[number]) / len(members)
    chosen = set(first)
    rest = [int(group) for group in np.argsort(place, kind="stable") if int(group) not in chosen]
    return [int(names[group]) for group in (*first, *rest)], max(1, len(first))


def nested_shares(
    kinds: Tensor, groups: Tensor, side: Tensor, fractions: Sequence[float], seed: int, draws: int = DRAWS
) -> dict[float, list[Tensor]]:
    """For each share the training items of each draw. The shares of one draw are the first parts of one order of the
    groups, so a smaller one is within a larger one.

    Args:
        kinds: (I, C) bool and groups: (I,) int64, of every item.
        side: (N,) int64 items to train on.
        fractions: above 0 and below 1; rounded up to whole groups, and to as many as have every kind.

    Returns:
        By share a list of ``draws`` (n,) int64 items, ascending.
    """
    found: dict[float, list[Tensor]] = {share: [] for share in fractions}
    for draw in range(draws):
        order, least = group_order(kinds[side], groups[side], seed, draw)
        for share in fractions:
            # Rounding must not make 30 of 10% of 300.
            count = min(len(order), max(least, math.ceil(share * len(order) - 1e-9)))
            chosen = torch.isin(groups[side], torch.tensor(order[:count]))
            found[share].append(side[chosen])
    return found


def shares_of_sides(
    kinds: Tensor, groups: Tensor, split: Split | Folds, fractions: Sequence[float], seed: int
) -> dict[float, list[list[Split]]]:
    """``nested_shares`` of the training side of every fold (a single split is one).

    Returns:
        By share, for each draw the sides of each fold, of which only the share is trained on.
    """
    found: dict[float, list[list[Split]]] = {share: [[] for _ in range(DRAWS)] for share in fractions}
    for part in split.parts:
        for share, drawn in nested_shares(kinds, groups, part.train, fractions, seed).items():
            for parts, rows in zip(found[share], drawn, strict=True):
                parts.append(Split(rows, part.test, part.made))
    return found


def bins_of(values: Tensor, most: int = 5) -> Tensor:
    """(I,) int64 quantile bin of each number, for splits and shares that hold all sizes.

    Args:
        values: (I,) finite.
    """
    cuts = torch.quantile(values.double(), torch.linspace(0, 1, most + 1, dtype=torch.float64)[1:-1]).unique()
    _, code = torch.searchsorted(cuts, values.double(), right=True).unique(return_inverse=True)
    return code
